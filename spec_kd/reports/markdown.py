"""Parts of a report as Markdown, as GitHub renders it."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape as escape_html

from spec_kd.escaping import escape_markdown, make_table, to_one_line
from spec_kd.reports.tables import Table


def render_document(heading: str, paragraphs: Sequence[str], sections: Iterable[tuple[str, Sequence[str]]]) -> str:
    """A whole document; heading, paragraphs and titles are escaped.

    Args:
        heading (`str`): Its heading.
        paragraphs (`Sequence[str]`): What follows it.
        sections (`Iterable[tuple[str, Sequence[str]]]`): Title of each section, and its parts in Markdown.
    """
    parts = [f"# {escape_markdown(heading)}", *map(escape_markdown, paragraphs)]
    for title, section in sections:
        parts += [f"## {escape_markdown(title)}", *section]
    return "\n\n".join(parts) + "\n"


def render_table(table: Table) -> str:
    """A table with its title in bold above it."""
    cells = [list(map(escape_markdown, line)) for line in (table.header, *table.rows)]
    return "\n".join([f"**{escape_markdown(table.title)}**", "", *make_table(cells[0], cells[1:])])


def fold(summary: str, parts: Sequence[str]) -> list[str]:
    """Parts that show when their summary is opened."""
    return [f"<details><summary>{escape_html(to_one_line(summary))}</summary>", *parts, "</details>"]


def render_counts(title: str, counts: Mapping[str, int], total: int | None = None) -> list[str]:
    """Lines of a table of numbers by label.

    Args:
        title (`str`): Header of the labels; Markdown already.
        counts (`Mapping[str, int]`): The numbers.
        total (`int`, *optional*): Number of which the shares are shown; no shares by default.
    """
    rows = [
        [escape_markdown(label), f"{number:,}", *([] if total is None else [f"{number / total:.1%}"])]
        for label, number in counts.items()
    ]
    return make_table([title, "number", *([] if total is None else ["share"])], rows)
