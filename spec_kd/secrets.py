"""Secrets that options may hold, kept out of files, logs and errors.

A secret is known by the name of its option (`token`, `api_key`, `password`, `Authorization`, ...), by its form (the
prefixes of the Hugging Face Hub, OpenAI, GitHub), or by its place in a URL (`user:password@host`, `?api_key=`).
"""

import re
from collections.abc import Iterator, Mapping
from urllib.parse import parse_qsl, unquote, urlsplit

from spec_kd.open_types import JsonValue

HIDDEN = "[hidden]"
SECRET_NAME = re.compile(
    r"(?:^|_)(?:token|pass(?:word|wd|phrase)|secret|credentials?|authorization|(?:api|access|auth|private|secret)_?key)$"
)
# First words of names that end in `token` and mean one of a text.
TEXT_TOKENS = frozenset(
    ("assistant", "audio", "bos", "boi", "cls", "eoi", "eos", "first", "image", "last", "mask", "max", "min", "new",
     "num", "pad", "per", "sep", "unk", "video", "written")
)  # fmt: skip
SECRET_FORM = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{8,}|api_org_[A-Za-z0-9]{8,}|sk-[\w-]{8,}|gh[pousr]_\w{16,}|github_pat_\w{16,})",
    re.ASCII,
)
BEARER = re.compile(r"\b((?:bearer|basic)\s{1,3})[\w.~+/-]{6,}={0,2}", re.ASCII | re.IGNORECASE)
# A user's part, which has no slash; bounded, so that no text makes it slow.
USERINFO = re.compile(r"\b([a-z][a-z0-9+.-]{1,15}://)[^\s/@'\"]{1,256}@", re.ASCII | re.IGNORECASE)
# `name=value`, `name: value` and `"name": "value"` in text that was written by people or by `repr`.
NAMED = re.compile(
    r"(?P<name>(?:token|password|passwd|secret|api[_-]?key|access[_-]?key|authorization)"
    r"[\"']?\s{0,3}[:=]\s{0,3})"
    r"(?P<value>\"[^\"]{0,512}\"|'[^']{0,512}'|(?!\[|bearer\s|basic\s)[^\s\"',;&}\])]{6,512})",
    re.ASCII | re.IGNORECASE,
)
NAME_LENGTH = 40


def is_secret_name(name: object) -> bool:
    """Whether an option of this name holds a secret, as `hub_token`, `apiKey` and `X-Api-Key` do.

    Options of text and models (`eos_token`, `max_new_tokens`, `token_selection`) and names of places where a secret is
    (`api_key_env`) do not.
    """
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", str(name)).lower().replace("-", "_")
    return SECRET_NAME.search(name) is not None and name.split("_")[0] not in TEXT_TOKENS


def strip_secrets(value: JsonValue, replacement: str | None = HIDDEN) -> JsonValue:
    """A copy of options without the secrets in them, at any depth.

    Args:
        value (`JsonValue`): Mappings, lists and plain values; other objects stay as they are.
        replacement (`str`, *optional*, defaults to `"[hidden]"`):
            What stands for a secret. With `None` an option that is one is left out, as where the result is compared: a
            new token changes nothing about what it gives access to.
    """
    if isinstance(value, Mapping):
        return {
            name: replacement if _is_secret(name, item) else strip_secrets(item, replacement)
            for name, item in value.items()
            if replacement is not None or not _is_secret(name, item)
        }
    if type(value) in (list, tuple):
        return type(value)(strip_secrets(item, replacement) for item in value)
    return hide_secrets(value) if isinstance(value, str) else value


def find_secrets(value: object) -> set[str]:
    """The secrets in options, at any depth: values of options that are one, passwords in URLs, known forms."""
    return {secret for secret in _list_secrets(value) if len(secret) > 3}


def hide_secrets(text: str, options: object = None) -> str:
    """Text in which `[hidden]` stands for every secret.

    Args:
        text (`str`): Such as the message of an error.
        options (`object`, *optional*): Options whose secrets the text may repeat; by default those are found that look
            like one.
    """
    for secret in sorted(find_secrets(options), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    for pattern, shown in ((SECRET_FORM, HIDDEN), (BEARER, rf"\1{HIDDEN}"), (USERINFO, rf"\1{HIDDEN}@")):
        text = pattern.sub(shown, text)
    return NAMED.sub(_hide_named, text)


def _hide_named(match: re.Match[str]) -> str:
    name, value = match["name"], match["value"]
    before = re.findall(r"[\w-]*$", match.string[max(0, match.start() - NAME_LENGTH) : match.start()])[0]
    quote = value[0] if value[0] in "\"'" else ""
    inner = value.strip(quote) if quote else value
    if not is_secret_name(before + re.split(r"[^\w-]", name)[0]) or len(inner) < 6 or HIDDEN in inner:
        return match[0]
    return f"{name}{quote}{HIDDEN}{quote}"


def _list_secrets(value: object) -> Iterator[str]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            if _is_secret(name, item):
                yield from (str(item), str(item).removeprefix("Bearer ").removeprefix("Basic "))
            else:
                yield from _list_secrets(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _list_secrets(item)
    elif isinstance(value, str):
        yield from SECRET_FORM.findall(value)
        if "://" in value:
            yield from _list_url_secrets(value)


def _list_url_secrets(url: str) -> Iterator[str]:
    try:
        parts = urlsplit(url)
        user, password = parts.username, parts.password
    except ValueError:
        return
    for secret in (password, user if password is None else None):
        if secret:
            yield from (secret, unquote(secret))
    yield from (text for name, text in parse_qsl(parts.query) if is_secret_name(name))


def _is_secret(name: object, value: object) -> bool:
    # `token=True` means the one that is logged in with, and is none
    is_value = isinstance(value, str | int) and not isinstance(value, bool) and value != ""
    return is_value and is_secret_name(name)
