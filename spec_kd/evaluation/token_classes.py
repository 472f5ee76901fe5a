"""What kind of token it is: where in a completion a draft fails is often a matter of this, and of little else."""

import json
import unicodedata
from collections.abc import Sequence
from typing import cast

from spec_kd.open_types import Arguments
from spec_kd.vocabulary import ProcessingClass, get_tokenizer

SPECIAL = "special token"
WHITESPACE, WORD, DIGITS, PUNCTUATION, IDEOGRAPH = "whitespace", "word", "digits", "punctuation", "ideograph"
TOOL_NAME, KEY, VALUE, JSON_PUNCTUATION = "tool name", "argument name", "argument value", "JSON punctuation"
# Keys of a call whose values name a tool, in the formats that models are trained on
TOOL_KEYS = ("name", "function", "tool")
ARGUMENT_KEYS = ("arguments", "parameters", "args")


def split_into_pieces(ids: Sequence[int], processing_class: ProcessingClass) -> list[str]:
    """The text of each token, special tokens included; the pieces joined are the decoded text.

    Of a character that several tokens make together (bytes of an ideograph or emoji), the last one has all of it and
    the others are empty.
    """
    tokenizer = get_tokenizer(processing_class)
    options: Arguments = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    pieces: list[str] = []
    start = read = 0  # decoded from `start`; tokens before `read` have their text
    for end in range(1, len(ids) + 1):
        before, text = (cast(str, tokenizer.decode(list(ids[start:i]), **options)) for i in (read, end))
        is_whole = len(text) > len(before) and not text.endswith("\ufffd")
        if is_whole or end == len(ids):
            pieces.append(text[len(before) :])
            start, read = read, end
        else:
            pieces.append("")
    return pieces


def classify_tokens(pieces: Sequence[str], special_tokens: Sequence[str] = ()) -> list[str]:
    """The class of each token of a completion.

    Text that is JSON, as function calls are, is read as such: names of tools, names and values of arguments, and the
    punctuation between them. Everything else goes by its characters. A token belongs to the class of most of its
    characters, whitespace aside; an empty piece to that of the token that completes its character.

    Args:
        pieces (`Sequence[str]`): From [`split_into_pieces`].
        special_tokens (`Sequence[str]`): Texts of special tokens, such as the EOS.
    """
    specials = set(special_tokens)
    text = "".join("" if piece in specials else piece for piece in pieces)
    classes = classify_characters(text)
    found: list[str] = []
    position = 0
    for piece in pieces:
        if piece in specials:
            found.append(SPECIAL)
            continue
        own = classes[position : position + len(piece)] or classes[position : position + 1] or [PUNCTUATION]
        position += len(piece)
        counted = [name for name in own if name != WHITESPACE] or own
        found.append(max(dict.fromkeys(counted), key=counted.count))
    return found


def classify_characters(text: str) -> list[str]:
    """The class of each character of a completion; see [`classify_tokens`]."""
    classes = [_classify_character(character) for character in text]
    start = next((i for i, character in enumerate(text) if not character.isspace()), 0)
    if text[start : start + 1] in ("{", "["):
        _mark_json(text, start, classes)
    return classes


def _classify_character(character: str) -> str:
    if character.isspace():
        return WHITESPACE
    if character.isdigit():
        return DIGITS
    if "CJK" in unicodedata.name(character, "") and character.isalpha():
        return IDEOGRAPH
    return WORD if character.isalpha() or unicodedata.category(character).startswith("M") else PUNCTUATION


def _mark_json(text: str, start: int, classes: list[str]) -> None:
    """Classes of a JSON text from `start` on, as far as it goes: what was cut off or is broken is read up to there."""
    depth_of_arguments: list[int] = []  # depths at which an object of arguments is open
    depth, position, pending_key = 0, start, None
    while position < len(text):
        character = text[position]
        if character == '"':
            end = _find_string_end(text, position)
            is_key = text[end:].lstrip()[:1] == ":"
            content = text[position + 1 : end - 1]
            if is_key:
                pending_key = content
                name = KEY if depth_of_arguments else JSON_PUNCTUATION
            elif not depth_of_arguments and pending_key in TOOL_KEYS:
                name = TOOL_NAME
            else:
                name = VALUE
            classes[position:end] = [JSON_PUNCTUATION, *[name] * (end - position - 2), JSON_PUNCTUATION][
                : end - position
            ]
            position = end
            continue
        if character in "{[":
            depth += 1
            if character == "{" and pending_key in ARGUMENT_KEYS and not depth_of_arguments:
                depth_of_arguments.append(depth)
            pending_key = None if character == "{" else pending_key
        elif character in "}]":
            if depth_of_arguments and depth_of_arguments[-1] == depth:
                depth_of_arguments.pop()
            depth -= 1
        if character in "{}[],:":
            classes[position] = JSON_PUNCTUATION
        elif not character.isspace():
            classes[position] = VALUE  # numbers, true, false, null
        position += 1
        if depth == 0 and character in "}]":
            return


def _find_string_end(text: str, start: int) -> int:
    """The position after the closing quote of the string that opens at `start`, or the end of the text."""
    try:
        return json.JSONDecoder(strict=False).raw_decode(text, start)[1]
    except json.JSONDecodeError:
        return len(text)
