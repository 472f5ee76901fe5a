"""A prompt report as one picture, drawn by matplotlib on a figure of its own: no backend or global state is touched."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from spec_kd.escaping import escape_label
from spec_kd.prompts.facts import PromptFacts
from spec_kd.reports.plots import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_BARS = 12


def plot_prompt_report(report: PromptFacts) -> "Figure":
    """Lengths, languages, turns, and how much is there twice or in the other set.

    Args:
        report (`PromptFacts`): What to show.

    Raises:
        `ImportError`: If matplotlib is not installed.
    """
    figure = new_figure(10, 7)
    (lengths, languages), (turns, repeats) = figure.subplots(2, 2)
    _plot_lengths(lengths, report)
    _plot_bars(languages, report.languages, report.num_prompts, "language of the user")
    _plot_bars(turns, report.turns, report.num_prompts, "user turns")
    shares = {
        "same as an earlier one": report.num_exact_duplicates,
        "nearly the same": report.num_near_duplicates,
    }
    if report.overlap is not None:
        shares |= {"in the other set": report.overlap.exact, "nearly in it": report.overlap.near}
    _plot_bars(repeats, shares, report.num_prompts, "repeated prompts")
    figure.suptitle(f"{report.num_prompts:,} prompts")
    return figure


def _plot_lengths(axis: "Axes", report: PromptFacts) -> None:
    unit = "characters" if report.tokens is None else "tokens"
    lengths = getattr(report, unit)
    axis.stairs(lengths.counts, lengths.edges, fill=True, color="C0", alpha=0.5)
    for percent, linestyle in (("50", "-"), ("95", "--")):
        value = lengths.percentiles[percent]
        axis.axvline(value, color="0.3", linewidth=1, linestyle=linestyle, label=f"{percent} %: {value:,}")
    axis.set(
        title=f"length in {unit}", xlabel=unit, ylabel="prompts", xscale="symlog" if lengths.edges[0] < 1 else "log"
    )
    axis.legend(frameon=False)
    axis.grid(alpha=0.3)


def _plot_bars(axis: "Axes", counts: Mapping[str, int], total: int, title: str) -> None:
    shown = list(counts.items())[:MOST_BARS]
    if len(counts) > MOST_BARS:
        shown.append((f"{len(counts) - MOST_BARS} others", sum(counts.values()) - sum(n for _, n in shown)))
    places = range(len(shown))
    axis.barh(places, [n / total for _, n in shown], color="C0", alpha=0.5)
    axis.set_yticks(places, [escape_label(f"{label} ({n:,})") for label, n in shown])
    axis.invert_yaxis()
    axis.set(title=title, xlim=(0, 1), xlabel="share of prompts")
    axis.grid(axis="x", alpha=0.3)
