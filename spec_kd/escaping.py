"""Text from data, made safe where it becomes Markdown, a label, Python or a shell command; and names without paths."""

import os
import re
import shlex
from collections.abc import Iterable, Sequence
from html import escape as escape_html
from pathlib import Path
from urllib.parse import urlsplit

# Control characters, which move a terminal's cursor and which HTML forbids, as their pictures; those of the second
# block, halves of surrogate pairs (which no file holds) and overrides of the direction of text as a replacement mark.
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
_REPLACED = [*range(0x80, 0xA0), *range(0xD800, 0xE000), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
CONTROLS = {**_PICTURES, **dict.fromkeys(_REPLACED, 0xFFFD)}
# Also what makes a link of an address, and a mention of a user or an issue, on GitHub and the Hub.
MARKDOWN = re.compile(r"[\\`*_~|$@]|\](?=[(\[:])|:(?=//)|(?<=www)\.|#(?=\d)|^#", re.IGNORECASE)
SNAPSHOT = re.compile(r"models--(?P<id>[^/\\]+)[/\\]snapshots[/\\]")
ADDRESS = re.compile(r"\w+://")
UNNAMED = "unnamed"
HUB_ID = re.compile(r"[\w.-]+(?:/[\w.-]+)?", re.ASCII)


def show_controls(text: str) -> str:
    """Text whose control characters are visible and do nothing; line breaks and tabs stay."""
    return text.translate(CONTROLS)


def to_one_line(text: str) -> str:
    """The same with all white space as single spaces."""
    return show_controls(" ".join(text.split()))


def escape_markdown(text: str) -> str:
    """Text that means itself anywhere in a line of Markdown or in a table's cell; line breaks become spaces."""
    text = MARKDOWN.sub(lambda match: f"\\{match[0]}", to_one_line(text))
    return escape_html(text, quote=False)


def make_code_span(text: str, in_table: bool = False) -> str:
    """Text in backticks, as many as it needs, for a line of Markdown.

    Args:
        text (`str`): What it shows; line breaks become spaces.
        in_table (`bool`, *optional*, defaults to `False`): Whether it stands in a cell of a table.
    """
    text = to_one_line(text) or " "
    ticks = "`" * (1 + _find_longest(text))
    padding = " " if text[0] == "`" or text[-1] == "`" else ""
    span = f"{ticks}{padding}{text}{padding}{ticks}"
    return span.replace("|", r"\|") if in_table else span


def make_code_block(text: str, language: str = "text") -> str:
    """A code block that no run of backticks in the text can end.

    Args:
        text (`str`): What it shows.
        language (`str`, *optional*, defaults to `"text"`): What it is.
    """
    ticks = "`" * max(3, 1 + _find_longest(text))
    return f"{ticks}{language}\n{show_controls(text)}\n{ticks}"


def make_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table.

    Args:
        header (`Sequence[str]`), rows (`Iterable[Sequence[str]]`): Cells, which are Markdown already.
    """
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, *rows)]
    return [lines[0], "|---" * len(header) + "|", *lines[1:]]


def escape_label(text: str) -> str:
    """Text that matplotlib neither reads as a formula nor, for a leading underscore, leaves out of a legend."""
    text = to_one_line(text)
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def quote_python(text: str) -> str:
    """A literal of Python that is the text."""
    literal = repr(text)
    is_plain = not any(character in literal[1:-1] for character in "\"'\\")
    return f'"{literal[1:-1]}"' if is_plain else literal


def quote_argument(text: str) -> str:
    """One word of a shell command that is the text, and is no option of the program: `-x` becomes `./-x`."""
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def make_public_name(name: str | os.PathLike[str]) -> str:
    """What a model or dataset is called in front of others: its Hub id, or the last name of its path.

    Args:
        name (`str` or `os.PathLike`):
            Hub id, path, or address; a snapshot in the cache of the Hub is called by its id.

    Returns:
        `str`: One line, without a folder, a user or a host of this machine.
    """
    name = os.fspath(name)
    if snapshot := SNAPSHOT.search(name):
        return to_one_line(snapshot["id"].replace("--", "/"))
    if is_hub_id(name):
        return to_one_line(name)
    name = urlsplit(name).path if ADDRESS.match(name) else os.path.expanduser(name)
    parts = [part for part in re.split(r"[/\\]", name) if part.strip()]
    if parts and set(parts[-1]) <= {"."}:
        parts = list(Path(name).resolve().parts[1:])
    return to_one_line(parts[-1]) if parts else UNNAMED


def is_hub_id(name: str | os.PathLike[str]) -> bool:
    """Whether a name can be an id on the Hub, and is no folder or file here."""
    name = os.fspath(name)
    is_dotted = any(set(part) <= {"."} for part in name.split("/"))
    return HUB_ID.fullmatch(name) is not None and not is_dotted and not os.path.exists(name)


def _find_longest(text: str) -> int:
    """The length of the longest run of backticks."""
    return max(map(len, re.findall("`+", text)), default=0)
