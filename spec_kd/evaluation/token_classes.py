"""Classes of tokens, such as words, digits and argument names: a draft often fails at tokens of a few classes."""

import json
import unicodedata
from collections.abc import Sequence
from typing import cast

from spec_kd.open_types import Arguments
from spec_kd.vocabulary import ProcessingClass, get_tokenizer

SPECIAL = "special token"
WHITESPACE, WORD, DIGITS, PUNCTUATION, IDEOGRAPH = "whitespace", "word", "digits", "punctuation", "ideograph"
TOOL_NAME, KEY, VALUE, JSON_PUNCTUATION = "tool name", "argument name", "argument value", "JSON punctuation"
# Keys of a function call whose values name the tool, in the formats that models are trained on
TOOL_KEYS = ("name", "function", "tool")
ARGUMENT_KEYS = ("arguments", "parameters", "args")


def split_into_pieces(ids: Sequence[int], processing_class: ProcessingClass) -> list[str]:
    """The text of each token, special tokens included. The pieces joined together are the decoded text.

    Several tokens can encode one character, as the bytes of an ideograph or an emoji. The last of them then gets the
    whole character, and the others are empty.
    """
    tokenizer = get_tokenizer(processing_class)
    options: Arguments = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    pieces: list[str] = []
    start = read = 0  # decoding begins at `start`; the pieces of the tokens before `read` are known
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

    A completion that begins as JSON, as function calls do, is read as JSON: its classes are tool names, names and
    values of arguments, and punctuation. Any other completion is classified character by character. A token gets the
    class that most of its characters have, whitespace left out. An empty piece gets the class of the character that it
    is a part of.

    Args:
        pieces (`Sequence[str]`): Text of each token, from [`split_into_pieces`].
        special_tokens (`Sequence[str]`, *optional*, defaults to `()`): Texts of special tokens, such as the EOS.
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
    """Replaces the classes of a JSON text from `start` on, as far as it is whole: completions can be cut off."""
    depth = arguments_depth = 0  # number of open objects and lists, and that number where the arguments begin
    position, key = start, ""
    while position < len(text) and (depth or position == start):
        character = text[position]
        if character == '"':
            end = _find_string_end(text, position)
            is_key = text[end:].lstrip()[:1] == ":"
            key = text[position + 1 : end - 1] if is_key else key
            if is_key:
                name = KEY if arguments_depth else JSON_PUNCTUATION
            else:
                name = TOOL_NAME if key in TOOL_KEYS and not arguments_depth else VALUE
            string = [JSON_PUNCTUATION, *[name] * (end - position - 2), JSON_PUNCTUATION]
            classes[position:end] = string[: end - position]
            position = end
            continue
        if character == "{":
            arguments_depth = arguments_depth or (depth + 1 if key in ARGUMENT_KEYS else 0)
            key = ""
        elif character in "}]" and depth == arguments_depth:
            arguments_depth = 0
        depth += (character in "{[") - (character in "}]")
        if not character.isspace():
            classes[position] = JSON_PUNCTUATION if character in "{}[],:" else VALUE  # numbers, true, false, null
        position += 1


def _find_string_end(text: str, start: int) -> int:
    """The position after the closing quote of the string that begins at `start`, or the end of the text."""
    try:
        return json.JSONDecoder(strict=False).raw_decode(text, start)[1]
    except json.JSONDecodeError:
        return len(text)
