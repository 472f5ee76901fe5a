"""What is replaced, and what looks like it and stays."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spec_kd.queries.redaction import REDACTIONS, check_redactions, is_card_number, redact_messages, redact_text

# Test numbers that payment providers publish.
CARDS = ["4111111111111111", "5500005555555559", "378282246310005", "6011111111111117", "3530111333300000"]
KEYS = [
    "sk-proj-abcdefghijklmnopqrst1234", "ghp_0123456789abcdefghijklmnopqrstuvwxyzAB", "AKIAIOSFODNN7EXAMPLE",
    "hf_abcdefghijklmnopqrstuvwxyzABCDEFGH", "xoxb-1234567890-abcdefghij", "AIzaSyA-1234567890abcdefghijklmnopqrstu",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N",
    "-----BEGIN RSA PRIVATE KEY-----\nMIIE\nabc\n-----END RSA PRIVATE KEY-----",
]  # fmt: skip


def compute_check_digit(digits: str) -> str:
    """The Luhn digit by the table of the standard, written differently from the module."""
    doubled = {str(d): value for d, value in enumerate([0, 2, 4, 6, 8, 1, 3, 5, 7, 9])}
    total = sum(doubled[d] if i % 2 == 0 else int(d) for i, d in enumerate(reversed(digits)))
    return str(-total % 10)


@pytest.mark.parametrize("number", CARDS)
def test_cards(number):
    spaced = " ".join(number[start : start + 4] for start in range(0, len(number), 4))
    assert redact_text(f"pay with {number} or {spaced}.") == "pay with [CARD] or [CARD]."
    wrong = number[:-1] + str((int(number[-1]) + 1) % 10)
    assert redact_text(wrong, ["card"]) == wrong


@given(st.text("0123456789", min_size=12, max_size=18).filter(lambda digits: len(set(digits)) > 1))
def test_luhn(digits):
    number = digits + compute_check_digit(digits)
    assert is_card_number(number)
    assert not is_card_number(digits + str((int(number[-1]) + 5) % 10))


@pytest.mark.parametrize("key", KEYS)
def test_keys(key):
    assert redact_text(f"use {key} now") == "use [KEY] now"


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("write to jane.o'neil+x@mail.example.co.uk.", "write to [EMAIL]."),
        ("call +1 (415) 555-2671, 415-555-2671 or (030) 1234567", "call [PHONE], [PHONE] or [PHONE]"),
        ("手机13812345678。", "手机[PHONE]。"),
        ("+49 30 901820", "[PHONE]"),
        ('{"api_key": "abcdefgh12345678zz"}', '{"api_key": "[KEY]"}'),
        ("Authorization: Bearer abcdefghijklmnopqrstuvwxyz", "Authorization: Bearer [KEY]"),
    ],
)
def test_usual_writings(text, redacted):
    assert redact_text(text) == redacted


@pytest.mark.parametrize(
    "text",
    [
        "version 1.2.3.4 of 2024-05-06 12:30:45", "order 1234567890", "pi is 3.14159265358979", "192.168.100.200",
        "100 000 000 people", "2019-2020", "a@b, @user and x = y@z", "1 2 3 4 5 6 7 8 9 10 11 12 13 14",
        "task-123456789012345678901", "skip-ahead_to_the_next_chapter", "0000000000000000", "def f(x): return x @ w.T",
    ],
)  # fmt: skip
def test_what_only_looks_like_it_stays(text):
    assert redact_text(text) == text


def test_kinds():
    text = "a@example.org +49 30 901820"
    assert redact_text(text, ["phone"]) == "a@example.org [PHONE]"
    assert redact_text(text, []) == text
    for kinds in (["name"], "email"):
        with pytest.raises(ValueError, match="redact"):
            check_redactions(kinds)
    check_redactions(list(REDACTIONS))


def test_messages_keep_names_and_ids():
    message = {
        "role": "assistant",
        "content": "a@example.org",
        "tool_calls": [
            {"id": "4111111111111111", "function": {"name": "mail", "arguments": {"to": ["a@example.org"], "n": 3}}}
        ],
    }
    assert redact_messages([message], ["email", "card"]) == [
        {
            "role": "assistant",
            "content": "[EMAIL]",
            "tool_calls": [
                {"id": "4111111111111111", "function": {"name": "mail", "arguments": {"to": ["[EMAIL]"], "n": 3}}}
            ],
        }
    ]


@pytest.mark.parametrize("text", ["0123 " + "4" * 20000, "a." * 20000, "+1" + "2-" * 20000, "1 " * 20000, "eyJ" * 9000])
def test_no_text_makes_it_slow(text):
    redact_text(text)  # a pattern that backtracks would take minutes
