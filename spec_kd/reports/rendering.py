"""Sections and tables of a report, and what renders them as Markdown and as HTML that needs no network or scripts."""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape as escape_html
from pathlib import Path
from typing import Generic, TypeVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from spec_kd.escaping import escape_markdown, make_table, show_controls, to_one_line
from spec_kd.reports import charts
from spec_kd.reports.numbers import RATE_DIGITS, format_interval, format_number

Report = TypeVar("Report")

FOLDER = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table whose cells are text that is not escaped yet.

    Args:
        title (`str`): What the table shows.
        header (`list[str]`): A name for each column.
        rows (`list[list[str]]`): One cell for each column; no rows if there is nothing to show.
        labels (`int`, *optional*, defaults to `1`): Number of columns, from the first one, that name the row.
    """

    title: str
    header: list[str]
    rows: list[list[str]]
    labels: int = 1


class Section(Generic[Report]):
    """A title and the parts under it. A subclass lists tables, or renders its parts itself.

    A section without parts is left out of the report.

    Attributes:
        title (`str`): Title of the section.
    """

    title = ""

    def find_title(self, report: Report) -> str:
        """The title in this report; `title` unless a subclass says otherwise."""
        return self.title

    def list_tables(self, report: Report) -> list[Table]:
        """The tables of the section; those without rows are left out."""
        return []

    def render_html(self, report: Report) -> list[Markup]:
        """The parts of the section as HTML; by default its tables."""
        return [render_part("show_table", table) for table in self.list_tables(report) if table.rows]

    def render_markdown(self, report: Report) -> list[str]:
        """The parts of the section as Markdown; by default its tables."""
        return [render_table(table) for table in self.list_tables(report) if table.rows]


def render_document(
    heading: str, paragraphs: Sequence[str], sections: Iterable[Section[Report]], report: Report
) -> str:
    """A whole report in Markdown; heading, paragraphs and titles are escaped.

    Args:
        heading (`str`): Heading of the document.
        paragraphs (`Sequence[str]`): Paragraphs after the heading.
        sections (`Iterable[Section]`): The sections; those without parts are left out.
        report (`Report`): Report that the sections show.
    """
    parts = [f"# {escape_markdown(heading)}", *map(escape_markdown, paragraphs)]
    for section in sections:
        if shown := section.render_markdown(report):
            parts += [f"## {escape_markdown(section.find_title(report))}", *shown]
    return "\n\n".join(parts) + "\n"


def render_table(table: Table) -> str:
    """A table in Markdown, with its title in bold above it."""
    header, *rows = ([escape_markdown(cell) for cell in line] for line in (table.header, *table.rows))
    return "\n".join([f"**{escape_markdown(table.title)}**", "", *make_table(header, rows)])


def fold(summary: str, parts: Sequence[str]) -> list[str]:
    """Parts in Markdown that show when their summary is opened."""
    return [f"<details><summary>{escape_html(to_one_line(summary))}</summary>", *parts, "</details>"]


def render_counts(title: str, counts: Mapping[str, int], total: int) -> list[str]:
    """Lines of a Markdown table of numbers by label, with their shares of a total.

    Args:
        title (`str`): Header of the labels; Markdown already.
        counts (`Mapping[str, int]`): The numbers.
        total (`int`): Number of which the shares are shown.
    """
    rows = ((escape_markdown(label), f"{number:,}", f"{number / total:.1%}") for label, number in counts.items())
    return make_table((title, "number", "share"), rows)


def render_page(
    title: str,
    heading: str,
    headline: str,
    paragraphs: Sequence[str],
    sections: Iterable[Section[Report]],
    report: Report,
) -> str:
    """A whole report as an HTML page; every text is escaped.

    Args:
        title (`str`): Title of the browser's tab.
        heading (`str`): Heading of the page.
        headline (`str`): The most important sentence.
        paragraphs (`Sequence[str]`): Paragraphs after the headline.
        sections (`Iterable[Section]`): The sections; those without parts are left out.
        report (`Report`): Report that the sections show.
    """
    return _load_template("page.html", FOLDER).render(
        title=title,
        heading=heading,
        headline=headline,
        paragraphs=paragraphs,
        sections=[(one.find_title(report), parts) for one in sections if (parts := one.render_html(report))],
    )


def render_part(macro: str, *values: object, template: str = "parts.html", folder: Path = FOLDER) -> Markup:
    """A part of an HTML page, by a macro of a template; every text in `values` is escaped.

    Args:
        macro (`str`): Name of the macro.
        values: Its arguments.
        template (`str`, *optional*, defaults to `"parts.html"`): File of the macro.
        folder (`Path`, *optional*): Folder of that file; this room's by default. It may import macros of `parts.html`.
    """
    return getattr(_load_template(template, folder).module, macro)(*values)


def show_whitespace(text: str) -> str:
    """A token's text with line breaks, tabs, control characters and blank tokens made visible."""
    is_blank = text and not text.strip(" ")
    return "·" * len(text) if is_blank else show_controls(text.replace("\n", "⏎\n").replace("\t", "⇥"))


def _finalize(value: object) -> object:
    """Every text without control characters, which HTML forbids and a terminal obeys."""
    return show_controls(value) if isinstance(value, str) and not isinstance(value, Markup) else value


@functools.cache
def _load_template(name: str, folder: Path) -> Template:
    environment = Environment(
        loader=FileSystemLoader([folder, FOLDER]),
        autoescape=True,
        # HTML forbids control characters, and a terminal obeys them.
        finalize=_finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {
        "drawing": charts,
        "format_number": format_number,
        "format_rate": functools.partial(format_interval, digits=RATE_DIGITS),
        "format_times": format_interval,
        "is_finite": math.isfinite,
        "show_whitespace": show_whitespace,
    }
    return environment.get_template(name)
