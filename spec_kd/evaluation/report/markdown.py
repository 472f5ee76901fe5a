"""The report as Markdown, as GitHub renders it: the tables of the page, without its charts."""

from spec_kd.evaluation.report.content import EvaluationReport
from spec_kd.evaluation.report.formatting import INTERVALS, build_headline
from spec_kd.evaluation.report.sections import SECTIONS
from spec_kd.reports.rendering import render_document, walk_markdown


def render_markdown(report: EvaluationReport) -> str:
    """The report as text; every name and text in it is escaped, and prompts stand in code blocks.

    Args:
        report (`EvaluationReport`): What to show. Sections without content are left out.
    """
    heading = f"Speculative decoding with {report.draft.name}"
    return render_document(heading, [build_headline(report), INTERVALS], walk_markdown(SECTIONS, report))
