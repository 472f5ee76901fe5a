"""The report section of docs/architecture.md, in the page and in the Markdown, where it was registered."""

import dataclasses
import re
from pathlib import Path

import pytest

from spec_kd.evaluation.report import register_section, render_html, render_markdown
from spec_kd.evaluation.report.sections import SECTIONS
from spec_kd.reports import Section

PAGE = Path(__file__).parents[3] / "docs/architecture.md"


@pytest.fixture(autouse=True)
def registered():
    """Runs the block, and takes the section out of the report afterwards."""
    code = re.search(r"```python\n((?:(?!```).)*class DraftSizes.*?)```", PAGE.read_text(encoding="utf-8"), re.S)[1]
    before = list(SECTIONS)
    exec(compile(code, str(PAGE), "exec"), {"__name__": "toy"})
    yield
    SECTIONS[:] = before


def test_every_rendering_has_the_section_in_its_place(report):
    provenance = {**report.provenance, "drafts": {"a <small> one": {"parameters": 1234567}}}
    report = dataclasses.replace(report, provenance=provenance)
    page, text = render_html(report), render_markdown(report)
    assert page.index("<h2>Worst prompts</h2>") < page.index("<h2>Sizes</h2>") < page.index("<h2>Provenance</h2>")
    assert text.index("## Worst prompts") < text.index("## Sizes\n\n**Parameters") < text.index("## Provenance")
    assert re.search(r'<th scope="row" class="name">a &lt;small&gt; one</th>\n<td>1,234,567</td>', page)
    assert "| a &lt;small&gt; one | 1,234,567 |" in text


def test_a_section_without_content_is_left_out(small_report):
    assert small_report.provenance == {}
    assert "Sizes" not in render_html(small_report) and "## Sizes" not in render_markdown(small_report)


@pytest.mark.parametrize(("title", "before"), [("Sizes", "Terms"), ("New", "Conclusion")])
def test_a_title_that_is_taken_and_a_place_that_is_not_there_are_refused(title, before):
    section = Section()
    section.title = title
    with pytest.raises(ValueError, match=f"The section '{title}' cannot stand before '{before}': there are Metrics"):
        register_section(section, before)
