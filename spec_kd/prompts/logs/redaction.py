"""Replaces personal and secret strings in logs by placeholders, before a draft can learn them."""

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence

from spec_kd.open_types import JsonValue

# No text makes these patterns slow: quantifiers are never ambiguous, and what is read in vain after a possible start is
# bounded or ends at the next possible start.
EMAIL = re.compile(r"\b[\w.!#$%&'*+/=?^`{|}~-]{1,64}@(?:[\w-]{1,63}\.){1,8}[^\W\d_]{2,24}\b", re.ASCII)
# International numbers with their plus, and national ones that are written with brackets or separators.
PHONE = re.compile(
    r"(?<![\w.+])(?:\+\d{1,3}[ .\-/]?(?:\(\d{1,4}\)[ .\-/]?)?\d(?:[ .\-/]?\d){5,12}"
    r"|\(\d{2,5}\)[ .\-/]?\d(?:[ .\-/]?\d){4,9}"
    r"|\d{3}[ .\-]\d{3}[ .\-]\d{4}"
    r"|(?<!\d[ .])0[1-9]\d{0,3}[ \-/]\d{3,9}(?:[ \-]\d{2,6}){0,3}"
    r"|1[3-9]\d(?:[ \-]?\d{4}){2})(?![\w.]?\d)",
    re.ASCII,  # ideographs stand next to numbers without a space
)
# Prefixes of the providers' keys (as detect-secrets and gitleaks list them), and values named as secrets. Web tokens
# (`eyJ`) may have any length where they begin a word, and a bounded length after a hyphen. A private key ends with its
# mark or, if the text was cut, with its last line of base64.
KEY = re.compile(
    r"\b(?:sk-[\w-]{16,}|[sr]k_(?:live|test)_\w{16,}|(?:ghp|gho|ghu|ghs|ghr)_\w{30,}|github_pat_\w{22,}|glpat-[\w-]{20,}"
    r"|hf_[A-Za-z0-9]{30,}|xox[abeoprs]-[\w-]{10,}|(?:AKIA|ASIA)[0-9A-Z]{16}|AIza[\w-]{35}|ya29\.[\w-]{20,}"
    r"|npm_\w{36}|pypi-[\w-]{40,}|SG\.[\w-]{20,}\.[\w-]{20,}"
    r"|(?<![\w-])eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,}"
    r"|(?<=-)eyJ[\w-]{8,512}\.eyJ[\w-]{8,4096}\.[\w-]{8,1024})(?![\w-])"
    r"|-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----"
    r"(?:(?:(?!-----).)*+-----END [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----"
    r"|(?:\\[nr]|\s)*+(?:[A-Za-z0-9+/=]{32,}+(?:\\[nr]|\s)*+)++)",
    re.ASCII | re.DOTALL,
)
NAMED_KEY = re.compile(
    r"(\bbearer |(?:api[_-]?key|access[_-]?token|client[_-]?secret|secret[_-]?key|password)"
    r"[\"']?\s{0,3}[:=]\s{0,3}[\"']?)"
    r"[\w.~+/-]{16,}=*",
    re.ASCII | re.IGNORECASE,
)
CARD = re.compile(r"(?<![\w.-])\d(?:[ -]?\d){12,18}(?![\w-])", re.ASCII)
# Without one of these a text has no key, which is found out ten times as fast.
KEY_MARKS = (
    "sk-", "k_live_", "k_test_", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "glpat-", "hf_", "xox", "AKIA",
    "ASIA", "AIza", "ya29.", "npm_", "pypi-", "SG.", "eyJ", "-----BEGIN ",
)  # fmt: skip
NAMED_KEY_MARKS = ("bearer ", "key", "token", "secret", "password")  # in lower case
DIGIT = re.compile(r"\d", re.ASCII)
SHORTEST_KEY = 15  # characters
KEPT_KEYS = {"role", "type"}  # of messages and schemas; their values are words of the format
ID_KEYS = {"id", "tool_call_id"}  # of calls; their values are random, so digits in them are no telephone numbers
CARD_STARTS = "23456"  # first digits of all issuers; a number that begins with 1 is more likely a time


def is_card_number(text: str) -> bool:
    """Whether 13 to 19 digits pass the Luhn check of payment cards (ISO/IEC 7812-1); other characters do not count."""
    digits = [int(character) for character in text if character in "0123456789"]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return 13 <= len(digits) <= 19 and len(set(digits)) > 1 and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def redact_keys(text: str) -> str:
    """Replaces keys of known forms, and values that are named as secrets."""
    if len(text) < SHORTEST_KEY:
        return text
    if any(mark in text for mark in KEY_MARKS):
        text = KEY.sub("[KEY]", text)
    lowered = text.lower()
    return NAMED_KEY.sub(r"\1[KEY]", text) if any(mark in lowered for mark in NAMED_KEY_MARKS) else text


def redact_cards(text: str) -> str:
    """Replaces numbers of payment cards."""
    if not DIGIT.search(text):
        return text
    return CARD.sub(lambda match: "[CARD]" if is_card_number(match[0]) else match[0], text)


# The order matters: a key may contain what looks like a number, and a card number looks like a telephone number.
REDACTIONS: dict[str, Callable[[str], str]] = {
    "key": redact_keys,
    "email": lambda text: EMAIL.sub("[EMAIL]", text) if "@" in text else text,
    "card": redact_cards,
    "phone": lambda text: PHONE.sub("[PHONE]", text) if DIGIT.search(text) else text,
}


def check_redactions(kinds: Sequence[str]) -> None:
    """Raises `ValueError` for a kind that is none of [`REDACTIONS`]."""
    if isinstance(kinds, str) or set(kinds) - set(REDACTIONS):
        raise ValueError(f"`redact` must be a list of {', '.join(map(repr, REDACTIONS))}, got {kinds!r}.")


def redact_text(text: str, kinds: Collection[str] = tuple(REDACTIONS)) -> str:
    """Replaces strings that look like personal data or secrets by `[EMAIL]`, `[PHONE]`, `[KEY]` or `[CARD]`.

    Patterns find only what is written in a usual way. They lower the risk but do not anonymize: names and addresses
    stay. Card numbers must pass the Luhn check. Telephone numbers must have a plus, brackets or separators, or be
    Chinese mobile numbers, so that plain numbers stay.

    Args:
        text (`str`): Any text.
        kinds (`Collection[str]`, *optional*, defaults to all): Keys of [`REDACTIONS`].

    Returns:
        `str`: The text; the same object if nothing was found.
    """
    for kind, replace in REDACTIONS.items():
        if kind in kinds:
            text = replace(text)
    return text


def redact_messages(value: JsonValue, kinds: Sequence[str]) -> JsonValue:
    """Redacts messages or tool schemas: texts, names, ids, arguments of tool calls and their keys.

    A number in an argument that is a card or telephone number becomes the placeholder as text.

    Args:
        value (`str`, number, `list`, `dict` or `None`): A JSON value.
        kinds (`Sequence[str]`): Keys of [`REDACTIONS`].

    Returns:
        A value of the same shape. Keys that become equal get a number appended.
    """
    if isinstance(value, str):
        return redact_text(value, kinds)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return _redact_number(value, kinds)
    if isinstance(value, list | tuple):
        return [redact_messages(item, kinds) for item in value]
    if not isinstance(value, Mapping):
        return value
    redacted: dict[JsonValue, JsonValue] = {}
    for key, item in value.items():
        new_key = name = redact_text(key, kinds) if isinstance(key, str) else key
        while new_key in redacted or (new_key != key and new_key in value):
            new_key = f"{name} {len(redacted) + 1}"
        if isinstance(item, str) and key in KEPT_KEYS | ID_KEYS:
            redacted[new_key] = item if key in KEPT_KEYS else redact_text(item, set(kinds) - {"card", "phone"})
        else:
            redacted[new_key] = redact_messages(item, kinds)
    return redacted


def _redact_number(value: float, kinds: Sequence[str]) -> float | str:
    if not math.isfinite(value) or value != int(value) or abs(value) >= 1e19:
        return value
    text = str(int(value))
    redacted = redact_text(text, kinds)
    return value if redacted == text or ("[CARD]" in redacted and text[0] not in CARD_STARTS) else redacted
