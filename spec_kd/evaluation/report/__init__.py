"""The report of an evaluation: as data, as a page, as Markdown and as a picture."""

from spec_kd.evaluation.report.content import EvaluationReport
from spec_kd.evaluation.report.plots import plot_report
from spec_kd.evaluation.report.rendering import load_report, render_html, render_markdown, save_report
from spec_kd.evaluation.report.sections import register_section

__all__ = [
    "EvaluationReport",
    "load_report",
    "plot_report",
    "register_section",
    "render_html",
    "render_markdown",
    "save_report",
]
