"""HTML pages that need nothing else: no network, no scripts, no fonts."""

import functools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from spec_kd.escaping import show_controls
from spec_kd.reports import charts
from spec_kd.reports.numbers import RATE_DIGITS, format_interval, format_number

FOLDER = Path(__file__).parent


def render_page(
    title: str,
    heading: str,
    headline: str,
    paragraphs: Sequence[str],
    sections: Iterable[tuple[str, Sequence[Markup]]],
) -> str:
    """A whole page; every text is escaped.

    Args:
        title (`str`): Title of the browser's tab.
        heading (`str`): Heading of the page.
        headline (`str`): The most important sentence.
        paragraphs (`Sequence[str]`): What follows it.
        sections (`Iterable[tuple[str, Sequence[Markup]]]`): Title and parts of each section, see [`render_part`].
    """
    return _load_template("page.html", FOLDER).render(
        title=title, heading=heading, headline=headline, paragraphs=paragraphs, sections=list(sections)
    )


def render_part(macro: str, *values: object, template: str = "parts.html", folder: Path = FOLDER) -> Markup:
    """A part of a page, by a macro of a template; every text in `values` is escaped.

    Args:
        macro (`str`): Name of the macro.
        values: Its arguments.
        template (`str`, *optional*, defaults to `"parts.html"`): File of the macro.
        folder (`Path`, *optional*): Folder of that file; this room's by default. It may import macros of `parts.html`.
    """
    return getattr(_load_template(template, folder).module, macro)(*values)


def show_whitespace(text: str) -> str:
    """A token's text with line breaks, tabs, control characters and blank tokens made visible."""
    if text and not text.strip(" "):
        return "·" * len(text)
    return show_controls(text.replace("\n", "⏎\n").replace("\t", "⇥"))


def _finalize(value: object) -> object:
    """Every text without control characters, which HTML forbids and a terminal obeys."""
    return show_controls(value) if isinstance(value, str) and not isinstance(value, Markup) else value


@functools.cache
def _load_template(name: str, folder: Path) -> Template:
    environment = Environment(
        loader=FileSystemLoader([folder, FOLDER]),
        autoescape=True,
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
