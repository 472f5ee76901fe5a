"""The report as one HTML page."""

from spec_kd.evaluation.report.content import EvaluationReport
from spec_kd.evaluation.report.formatting import INTERVALS, build_headline
from spec_kd.evaluation.report.sections import SECTIONS
from spec_kd.reports.rendering import render_page, walk_html


def render_html(report: EvaluationReport) -> str:
    """The page as text; every name and text of the report is escaped.

    Args:
        report (`EvaluationReport`): What to show. Sections without content are left out.
    """
    name = report.draft.name
    rule = f"Rule of acceptance ({report.serving_engine}): {report.serving_rule}"
    return render_page(
        f"{name}: report on speculative decoding",
        f"Speculative decoding with {name}",
        build_headline(report),
        [rule, INTERVALS],
        walk_html(SECTIONS, report),
    )
