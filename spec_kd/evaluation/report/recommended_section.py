"""The section of a report on what to set in the serving engine."""

from markupsafe import Markup

from spec_kd.escaping import escape_markdown, make_code_block
from spec_kd.evaluation.report.content import EvaluationReport
from spec_kd.evaluation.report.recommended import WORDS
from spec_kd.reports.numbers import DASH, format_interval, format_number
from spec_kd.reports.rendering import Section, Table, render_part, render_table


def tabulate_plans(report: EvaluationReport) -> Table:
    """What each way of drafting gives, for every draft."""
    rows = [
        [
            plan.setting,
            str(plan.batch_size),
            draft.name,
            WORDS[plan.method] + (f" ({plan.threshold:g})" if plan.threshold else ""),
            str(plan.num_assistant_tokens),
            format_interval(plan.block_efficiency),
            _format_range(*plan.drafted),
            format_interval(plan.predicted_speedup),
            DASH if plan.highest_speedup == plan.predicted_speedup.value else format_number(plan.highest_speedup),
            "yes" if plan.is_recommended else "",
        ]
        for draft in report.drafts
        if draft.recommendations is not None
        for plan in draft.recommendations.plans
    ]
    header = ["setting", "batch size", "draft", "drafting", "most drafted tokens", "tokens per target pass"]
    header += ["drafted in a round", "predicted speed-up", "at most", "recommended"]
    return Table(
        title="What each way of drafting gives, at its best number of tokens", header=header, rows=rows, labels=4
    )


def _format_range(least: float, most: float) -> str:
    low, high = format_number(least), format_number(most)
    return low if low == high else f"{low} to {high}"


class RecommendedSection(Section[EvaluationReport]):
    """The configurations of the draft that the report is about, ready to paste, and what they were chosen from."""

    title = "Recommended configuration"

    def list_tables(self, report: EvaluationReport) -> list[Table]:
        """The plans of all drafts, and the notes on the report's."""
        known = report.draft.recommendations
        notes = [] if known is None else [[note] for note in known.notes]
        return [tabulate_plans(report), Table(title="Notes", header=["what"], rows=notes)]

    def render_html(self, report: EvaluationReport) -> list[Markup]:
        """A code block for each configuration, then the tables."""
        known = report.draft.recommendations
        parts = [] if known is None else known.configurations
        shown = [
            part
            for one in parts
            for part in (render_part("show_heading", one.title), render_part("show_code", one.command))
        ]
        return [*shown, *super().render_html(report)]

    def render_markdown(self, report: EvaluationReport) -> list[str]:
        """A code block for each configuration, then the tables."""
        known = report.draft.recommendations
        parts = [] if known is None else known.configurations
        shown = [
            part
            for one in parts
            for part in (f"**{escape_markdown(one.title)}**", make_code_block(one.command, one.language))
        ]
        return [*shown, *(render_table(table) for table in self.list_tables(report) if table.rows)]
