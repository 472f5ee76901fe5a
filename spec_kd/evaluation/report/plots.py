"""The report as one picture, drawn by matplotlib on a figure of its own: no backend or global state is touched."""

import math
from collections.abc import Callable
from itertools import cycle
from typing import TYPE_CHECKING

from spec_kd.escaping import escape_label
from spec_kd.evaluation.report.content import Breakdown, EvaluationReport, SettingReport
from spec_kd.evaluation.report.tables import find_setting, list_batch_sizes, list_settings
from spec_kd.reports.plots import draw_intervals, finish_axis, new_figure, set_fonts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_BARS = 12
SMALLEST_SHARE = 0.01  # of the tokens: smaller parts of a breakdown do not decide which one is shown
LINE_STYLES = ("-", "--", ":", "-.")
Panel = Callable[["Axes", EvaluationReport, str], None]


def plot_report(report: EvaluationReport) -> "Figure":
    """Block efficiency and predicted speed-up over gamma, acceptance by position, and the worst breakdown.

    A row of panels for each setting, one color for each draft; panels without values are left out.

    Args:
        report (`EvaluationReport`): Report to show.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    names = list_settings(report)
    shown: dict[Panel, bool] = {
        _plot_block_efficiency: True,
        _plot_speedup: any(list_batch_sizes(report, name) for name in names),
        _plot_positions: True,
        _plot_worst_breakdown: any(setting.breakdowns for setting in report.draft.settings),
    }
    panels = [panel for panel, has_values in shown.items() if has_values]
    figure = new_figure(4.4 * len(panels), 3.6 * len(names))
    grid = figure.subplots(len(names), len(panels), squeeze=False)
    for name, row in zip(names, grid, strict=True):
        for panel, axis in zip(panels, row, strict=True):
            panel(axis, report, name)
    _name_drafts(figure, report)
    set_fonts(figure)
    return figure


def _name_drafts(figure: "Figure", report: EvaluationReport) -> None:
    """Adds a legend below all panels, where long names have room."""
    from matplotlib.lines import Line2D

    labels = [escape_label(draft.name) for draft in report.drafts]
    handles = [Line2D([], [], color=_get_color(i), marker="o", label=label) for i, label in enumerate(labels)]
    figure.legend(handles=handles, loc="outside lower center", frameon=False)


def _get_color(index: int) -> str:
    return f"C{index % 10}"


def _plot_block_efficiency(axis: "Axes", report: EvaluationReport, name: str) -> None:
    for index, _, setting in find_setting(report, name):
        by_gamma = {one.num_assistant_tokens: one.block_efficiency for one in setting.by_gamma}
        draw_intervals(axis, list(by_gamma), list(by_gamma.values()), _get_color(index))
    finish_axis(axis, f"block efficiency, {name}", "gamma", "tokens per target pass", bottom=1)


def _plot_speedup(axis: "Axes", report: EvaluationReport, name: str) -> None:
    batch_sizes = list_batch_sizes(report, name)
    for batch_size, linestyle in zip(batch_sizes, cycle(LINE_STYLES), strict=False):
        axis.plot([], [], linestyle, color="0.4", label=f"batch {batch_size}")
        for index, _, setting in find_setting(report, name):
            by_gamma, color = setting.get_speedups(batch_size), _get_color(index)
            draw_intervals(axis, list(by_gamma), list(by_gamma.values()), color, linestyle)
            if batch_size in setting.best_gamma:
                best = setting.best_gamma[batch_size]
                axis.plot(best, by_gamma[best].value, "o", color=color, mfc="none", markersize=10)
    axis.axhline(1, color="0.4", linewidth=1, linestyle=(0, (2, 2)))
    finish_axis(axis, f"predicted speed-up, {name}", "gamma", "times plain decoding", bottom=0)
    if batch_sizes:
        axis.legend(frameon=False, fontsize="small")


def _plot_positions(axis: "Axes", report: EvaluationReport, name: str) -> None:
    for index, _, setting in find_setting(report, name):
        rates = setting.acceptance_rate_per_position
        draw_intervals(axis, range(1, len(rates) + 1), rates, _get_color(index))
    finish_axis(axis, f"acceptance by position, {name}", "drafted token", "share of rounds", bottom=0, top=1)


def _plot_worst_breakdown(axis: "Axes", report: EvaluationReport, name: str) -> None:
    found = [setting for setting in report.draft.settings if setting.name == name and setting.breakdowns]
    if not found:
        axis.set_axis_off()
        return
    breakdown = find_worst_breakdown(found[0])
    rows = sorted(breakdown.rows, key=lambda row: row.alpha.value)[:MOST_BARS]
    rows = [row for row in breakdown.rows if row in rows]
    note = f", the worst {MOST_BARS} of {len(breakdown.rows)}" if len(rows) < len(breakdown.rows) else ""
    places = range(len(rows))
    axis.barh(places, [row.alpha.value for row in rows], color=_get_color(len(report.drafts) - 1), alpha=0.5)
    axis.hlines(places, [row.alpha.low for row in rows], [row.alpha.high for row in rows], color="0.2")
    axis.set_yticks(places, [escape_label(f"{row.label} ({row.tokens:,})") for row in rows])
    axis.invert_yaxis()
    axis.set(xlim=(0, 1), xlabel=f"alpha (tokens in brackets){note}")
    axis.set_title(escape_label(f"alpha by {breakdown.title}, {name}"))
    axis.grid(axis="x", alpha=0.3)


def find_worst_breakdown(setting: SettingReport) -> Breakdown:
    """The breakdown that holds the part with the lowest alpha, of the parts with 1 % of the tokens or more."""

    def find_lowest(breakdown: Breakdown) -> float:
        large = [row for row in breakdown.rows if row.tokens >= SMALLEST_SHARE * setting.tokens]
        return min((row.alpha.value for row in large if math.isfinite(row.alpha.value)), default=math.inf)

    return min(setting.breakdowns, key=find_lowest)
