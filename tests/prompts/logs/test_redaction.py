"""What is replaced, and what looks like it and stays."""

import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spec_kd.prompts.logs import redaction
from spec_kd.prompts.logs.redaction import REDACTIONS, check_redactions, is_card_number, redact_messages, redact_text

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


CARD, MAIL = 4111111111111111, "someone@example.com"


@pytest.mark.parametrize(
    ("value", "redacted"),
    [
        ({"card": CARD}, {"card": "[CARD]"}),  # as a number
        ({"card": float(CARD), "list": [CARD, [str(CARD)]]}, {"card": "[CARD]", "list": ["[CARD]", ["[CARD]"]]}),
        ({MAIL: {MAIL: MAIL}}, {"[EMAIL]": {"[EMAIL]": "[EMAIL]"}}),
        ({MAIL: 1, "other@example.com": 2}, {"[EMAIL]": 1, "[EMAIL] 2": 2}),  # nothing is lost
        ({"[EMAIL]": 1, MAIL: 2}, {"[EMAIL]": 1, "[EMAIL] 2": 2}),
        ({MAIL: 1, "[EMAIL]": 2}, {"[EMAIL] 1": 1, "[EMAIL]": 2}),
        ({"role": "user", "name": MAIL}, {"role": "user", "name": "[EMAIL]"}),
        ({"tool_call_id": MAIL, "id": "415-555-2671"}, {"tool_call_id": "[EMAIL]", "id": "415-555-2671"}),
        ((MAIL,), ["[EMAIL]"]),
        # times, counts and fractions stay
        ([1732924800000, 1.5, True, None, 7, -3, 10**30, 4111.111111111111], None),
        ([float("inf"), 0.1 + 0.2], None),
    ],
)
def test_all_that_messages_can_hold(value, redacted):
    assert redact_messages(value, ["email", "card"]) == (value if redacted is None else redacted)


@pytest.mark.parametrize(
    "key",
    [
        "-----BEGIN PRIVATE KEY-----\\nMIIE\\nabc\\n-----END PRIVATE KEY-----",
        "-----BEGIN PGP PRIVATE KEY BLOCK-----\nabc\n-----END PGP PRIVATE KEY BLOCK-----",
        "-----BEGIN OPENSSH PRIVATE KEY-----\n"
        + "\n".join(["b3BlbnNzaC1rZXktdjEAAAAABG5vbmUAAAAEbm9uZQ"] * 3),  # cut off
        "eyJ" + "a" * 5000 + ".eyJ" + "b" * 90_000 + "." + "c" * 600,
    ],
)
def test_keys_of_any_length_or_without_their_end(key):
    assert redact_text(f"use {key} now", ["key"]) in ("use [KEY] now", "use [KEY]now")


def test_a_sentence_about_private_keys_stays():
    text = "A file begins with -----BEGIN RSA PRIVATE KEY----- and then holds base64."
    assert redact_text(text) == text
    assert redact_text("x-eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0.dozjgNryP4J3") == "x-[KEY]"


UNITS = [
    "eyJ-", "eyJ", "eyJaaaaaaaa.", "eyJaaaaaaaa.eyJ", "-eyJaaaaaaaa.eyJaaaaaaaa.", "a.", "a@", "a@a.", "@", "1 ", "+1",
    "1-", "(1", "0", "0 1", "4 ", "sk-", "ghp_", "-----BEGIN PRIVATE KEY-----", "-----BEGIN A",
    "-----BEGIN PRIVATE KEY-----" + "A" * 32 + "\n", "bearer ", "api_key=", "password:   '", "xoxb-", "SG.", "AIza",
    "-", "-----END PRIVATE KEY-----", "pypi-a", "SG.aaaaaaaaaaaaaaaaaaaaa.", "a-",
    "_", "{", "\n", "\\n", "é1", "手1", "access-token", "a@aaaaaaaaaaaa.",
]  # fmt: skip


@pytest.mark.parametrize("kind", REDACTIONS)
def test_no_text_makes_it_slow(kind):
    texts = [(unit * (100_000 // len(unit) + 1))[:100_000] for unit in UNITS]
    texts += ["0123 " + "4" * 20000, "+1" + "2-" * 20000]
    rng = random.Random(0)
    texts += ["".join(rng.choices(UNITS, k=5000)) for _ in range(10)]
    texts += ["".join(rng.choices(rng.sample(UNITS, 2), k=20_000)) for _ in range(10)]
    for text in texts:
        start = time.process_time()
        redact_text(text, [kind])
        # a pattern that is not linear takes 5 s and more
        assert time.process_time() - start < 2, text[:60]


MARKS = [*redaction.KEY_MARKS, *redaction.NAMED_KEY_MARKS, "Bearer ", "API-Key", "PASSWORD", *"_-.:= @"]
PIECES = st.one_of(st.sampled_from(MARKS), st.text("aZ0+/= -._\n", max_size=40), st.text(max_size=8))


@given(st.lists(PIECES, max_size=8).map("".join))
def test_marks_leave_out_no_text_that_a_pattern_finds(text):
    replaced = redaction.NAMED_KEY.sub(r"\1[KEY]", redaction.KEY.sub("[KEY]", text))
    assert REDACTIONS["key"](text) == replaced
    assert REDACTIONS["email"](text) == redaction.EMAIL.sub("[EMAIL]", text)
    assert REDACTIONS["phone"](text) == redaction.PHONE.sub("[PHONE]", text)
    cards = redaction.CARD.sub(lambda match: "[CARD]" if is_card_number(match[0]) else match[0], text)
    assert REDACTIONS["card"](text) == cards
