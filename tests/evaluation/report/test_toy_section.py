"""A new section of the report is one class; the page and the Markdown show it where it was registered."""

import pytest

from spec_kd.evaluation.report import render_html, render_markdown
from spec_kd.evaluation.report.sections import SECTIONS, register_section
from spec_kd.reports.sections import Section
from spec_kd.reports.tables import Table


class NamesSection(Section):
    """The length of each draft's name, for drafts whose name is short."""

    title = "Names <of> drafts"

    def list_tables(self, report):
        """One table."""
        rows = [[draft.name, str(len(draft.name))] for draft in report.drafts if len(draft.name) < 10]
        return [Table(title="Names", header=["draft", "characters"], rows=rows)]


@pytest.fixture
def registered():
    before = list(SECTIONS)
    register_section(NamesSection(), before="Terms")
    yield
    SECTIONS[:] = before


@pytest.mark.usefixtures("registered")
def test_every_rendering_has_the_section_in_its_place(small_report):
    page, text = render_html(small_report), render_markdown(small_report)
    title = "Names &lt;of&gt; drafts"
    assert page.index("<h2>Provenance</h2>") < page.index(f"<h2>{title}</h2>") < page.index("<h2>Terms</h2>")
    assert text.index("## Provenance") < text.index(f"## {title}\n\n**Names**") < text.index("## Terms")
    assert '<th scope="row">draft</th>\n<td>5</td>' in page and "| draft | 5 |" in text


@pytest.mark.usefixtures("registered")
def test_a_section_without_content_is_left_out(report):
    assert all(len(draft.name) >= 10 for draft in report.drafts)
    assert "Names" not in render_html(report) and "## Names" not in render_markdown(report)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(("title", "before"), [("Names <of> drafts", "Terms"), ("New", "Conclusion")])
def test_a_title_that_is_taken_and_a_place_that_is_not_there_are_refused(title, before):
    section = NamesSection()
    section.title = title
    with pytest.raises(ValueError, match=f"The section '{title}' cannot stand before '{before}': there are Metrics"):
        register_section(section, before)
