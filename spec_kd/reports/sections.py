"""A section of a report, in every form that the report is rendered in."""

from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

from markupsafe import Markup

from spec_kd.reports.html import render_part
from spec_kd.reports.markdown import render_table
from spec_kd.reports.tables import Table

Report = TypeVar("Report")


class Section(Generic[Report]):
    """A title and what stands under it. A subclass lists tables, or renders its parts itself.

    A section without parts is left out.

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


def walk_html(sections: Iterable[Section[Report]], report: Report) -> Iterator[tuple[str, list[Markup]]]:
    """Title and parts of every section that has any, as HTML."""
    return ((one.find_title(report), parts) for one in sections if (parts := one.render_html(report)))


def walk_markdown(sections: Iterable[Section[Report]], report: Report) -> Iterator[tuple[str, list[str]]]:
    """Title and parts of every section that has any, as Markdown."""
    return ((one.find_title(report), parts) for one in sections if (parts := one.render_markdown(report)))
