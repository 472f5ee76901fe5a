"""The report on a prompt set, as data, as Markdown tables and as one picture."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from spec_kd.escaping import escape_label, make_table
from spec_kd.reports.plots import new_figure, save_files
from spec_kd.reports.rendering import render_counts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_ROWS, MOST_BARS = 10, 12  # of a table, of a plot; the JSON has all
PERCENT_NAMES = {"0": "shortest", "50": "median", "100": "longest"}
BREAKDOWNS = {"user turns": "turns", "language": "languages", "scenario": "scenarios", "source": "sources"}


@dataclass(frozen=True)
class Lengths:
    """Lengths of prompts.

    Args:
        mean (`float`): Mean over prompts.
        percentiles (`dict[str, int]`): Lengths by percent; `"0"` is the shortest prompt, `"100"` the longest.
        edges (`tuple[int, ...]`): Edges of the bins of a histogram, which grow geometrically. A bin includes its lower
            edge, the last one also its upper edge.
        counts (`tuple[int, ...]`): Number of prompts in each bin.
    """

    mean: float
    percentiles: dict[str, int]
    edges: tuple[int, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Overlap:
    """Overlap of a prompt set with another one.

    Args:
        num_other (`int`): Number of prompts of the other set.
        exact (`int`): Number of prompts whose normalized text is in the other set.
        near (`int`): Number of prompts with nearly the same text in the other set, the exact ones included.
    """

    num_other: int
    exact: int
    near: int


@dataclass(frozen=True)
class PromptReport:
    """The description that [`describe_prompts`] returns; all values except the lengths are numbers of prompts.

    Args:
        num_prompts (`int`): All prompts.
        num_with_tools (`int`): Prompts with tool schemas in the column `tools`.
        num_with_system_prompt (`int`): Prompts with a system message.
        num_with_completion (`int`): Prompts with a completion in the column `completion`.
        num_exact_duplicates (`int`): Prompts with the same normalized text as an earlier prompt.
        num_near_duplicates (`int`): Prompts with nearly the same text as an earlier prompt, the exact ones included.
        near_duplicate_threshold (`float`): Estimated Jaccard similarity from which texts are nearly the same.
        characters (`Lengths`): Characters of all messages of a prompt.
        tokens (`Lengths`, *optional*): Tokens of the rendered prompt; `None` without a processing class.
        turns (`dict[str, int]`): Prompts by number of user messages.
        languages (`dict[str, int]`): Prompts by language of the user messages, the most frequent first.
        scenarios (`dict[str, int]`), sources (`dict[str, int]`): Prompts by the columns `scenario` and `source`; empty
            if the set has no such column.
        overlap (`Overlap`, *optional*): Overlap with the other set; `None` if there is none.
    """

    num_prompts: int
    num_with_tools: int
    num_with_system_prompt: int
    num_with_completion: int
    num_exact_duplicates: int
    num_near_duplicates: int
    near_duplicate_threshold: float
    characters: Lengths
    tokens: Lengths | None
    turns: dict[str, int]
    languages: dict[str, int]
    scenarios: dict[str, int]
    sources: dict[str, int]
    overlap: Overlap | None

    def to_dict(self) -> dict[str, object]:
        """The report as JSON values."""
        return asdict(self)

    def to_markdown(self) -> str:
        """The report as Markdown tables: counts, lengths, and prompts by turns, language, scenario and source."""
        counts = {
            "all": self.num_prompts,
            "with tools": self.num_with_tools,
            "with a system prompt": self.num_with_system_prompt,
            "with a completion": self.num_with_completion,
            "same text as an earlier one": self.num_exact_duplicates,
            f"nearly the same (similarity {self.near_duplicate_threshold:g})": self.num_near_duplicates,
        }
        if self.overlap is not None:
            counts[f"also in the other set (of {self.overlap.num_other:,})"] = self.overlap.exact
            counts["nearly in the other set"] = self.overlap.near
        percents = [PERCENT_NAMES.get(percent, f"{percent} %") for percent in self.characters.percentiles]
        rows = [
            [unit, f"{lengths.mean:,.1f}", *(f"{value:,}" for value in lengths.percentiles.values())]
            for unit, lengths in (("tokens", self.tokens), ("characters", self.characters))
            if lengths is not None
        ]
        tables = [render_counts("prompts", counts, self.num_prompts), make_table(["length", "mean", *percents], rows)]
        tables += [
            render_counts(title, _sum_up(getattr(self, name), MOST_ROWS), self.num_prompts)
            for title, name in BREAKDOWNS.items()
            if getattr(self, name)
        ]
        return "\n\n".join("\n".join(lines) for lines in tables) + "\n"

    def save(self, output_dir: str | os.PathLike[str]) -> dict[str, Path]:
        """Writes `prompts.json`, `prompts.md` and, with matplotlib, `prompts.png`; replaces older files.

        Args:
            output_dir (`str` or `os.PathLike`): Folder for the files; created if it does not exist.

        Returns:
            `dict[str, Path]`: The files by `"json"`, `"md"` and `"png"`, the last one only if it was written.
        """
        texts = {"json": json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n", "md": self.to_markdown()}
        return save_files(output_dir, "prompts", texts, lambda: plot_prompt_report(self))


def plot_prompt_report(report: PromptReport) -> "Figure":
    """Lengths, languages, turns, and how many prompts are repeated or in the other set.

    Args:
        report (`PromptReport`): What to show.

    Raises:
        ImportError: matplotlib is not installed.
    """
    repeats = {"same as an earlier one": report.num_exact_duplicates, "nearly the same": report.num_near_duplicates}
    if report.overlap is not None:
        repeats |= {"in the other set": report.overlap.exact, "nearly in it": report.overlap.near}
    bars = {"language of the user": report.languages, "user turns": report.turns, "repeated prompts": repeats}
    figure = new_figure(10, 7)
    figure.suptitle(f"{report.num_prompts:,} prompts")
    axes = figure.subplots(2, 2).ravel()
    _plot_lengths(axes[0], report)
    for axis, (title, counts) in zip(axes[1:], bars.items(), strict=True):
        shown = _sum_up(counts, MOST_BARS)
        shares = [number / report.num_prompts for number in shown.values()]
        axis.barh(range(len(shown)), shares, color="C0", alpha=0.5)
        axis.set_yticks(range(len(shown)), [escape_label(f"{label} ({number:,})") for label, number in shown.items()])
        axis.invert_yaxis()
        axis.set(title=title, xlim=(0, 1), xlabel="share of prompts")
        axis.grid(axis="x", alpha=0.3)
    return figure


def _plot_lengths(axis: "Axes", report: PromptReport) -> None:
    unit = "characters" if report.tokens is None else "tokens"
    lengths = getattr(report, unit)
    axis.stairs(lengths.counts, lengths.edges, fill=True, color="C0", alpha=0.5)
    for percent, linestyle in (("50", "-"), ("95", "--")):
        value = lengths.percentiles[percent]
        axis.axvline(value, color="0.3", linewidth=1, linestyle=linestyle, label=f"{percent} %: {value:,}")
    scale = "symlog" if lengths.edges[0] < 1 else "log"
    axis.set(title=f"length in {unit}", xlabel=unit, ylabel="prompts", xscale=scale)
    axis.legend(frameon=False)
    axis.grid(alpha=0.3)


def _sum_up(counts: Mapping[str, int], most: int) -> dict[str, int]:
    """The first labels with their numbers, and the sum of the others as one more."""
    shown = dict(islice(counts.items(), most))
    if len(counts) > most:
        shown[f"{len(counts) - most} others"] = sum(counts.values()) - sum(shown.values())
    return shown
