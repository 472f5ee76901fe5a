"""The charts of an evaluation report."""

from spec_kd.evaluation.report.content import EvaluationReport
from spec_kd.evaluation.report.tables import find_setting
from spec_kd.reports.charts import LineChart, Series, draw_lines
from spec_kd.reports.numbers import format_number


def draw_positions(report: EvaluationReport, name: str) -> LineChart | None:
    """Acceptance of drafted token k for each draft, at one setting."""
    series = [
        Series(index=index, label=draft.name, points=list(enumerate(setting.acceptance_rate_per_position, start=1)))
        for index, draft, setting in find_setting(report, name)
    ]
    return draw_lines(name, "drafted token", "share of rounds", series, floor=0, ceiling=1)


def draw_block_efficiency(report: EvaluationReport, name: str) -> LineChart | None:
    """Block efficiency over gamma for each draft, at one setting."""
    series = [
        Series(
            index=index,
            label=draft.name,
            points=[(at_gamma.num_assistant_tokens, at_gamma.block_efficiency) for at_gamma in setting.by_gamma],
        )
        for index, draft, setting in find_setting(report, name)
    ]
    return draw_lines(f"Block efficiency, {name}", "gamma", "tokens per target pass", series, floor=1)


def draw_speedup(report: EvaluationReport, name: str, batch_size: str) -> LineChart | None:
    """Predicted speed-up over gamma for each draft with known costs, at one setting and batch size."""
    series = []
    for index, draft, setting in find_setting(report, name):
        points = [
            (at_gamma.num_assistant_tokens, at_gamma.predicted_speedup[batch_size])
            for at_gamma in setting.by_gamma
            if batch_size in at_gamma.predicted_speedup
        ]
        if points:
            best, label = setting.best_gamma.get(batch_size), draft.name
            if best is not None:
                label += f": {format_number(dict(points)[best].value)}x at its best gamma, {best}"
            series.append(Series(index=index, label=label, points=points, marked_x=best))
    title = f"Predicted speed-up, {name}, batch {batch_size}"
    return draw_lines(
        title, "gamma", "times plain decoding", series, floor=0, reference=1.0, reference_label="1.0: plain decoding"
    )
