"""What a plan found: costs of every shape, the acceptance that it needs, what it reaches, and which one to train."""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from spec_kd.copies import open_folder
from spec_kd.drafts.options import DraftShapeOptions
from spec_kd.evaluation.cost import ServingCosts
from spec_kd.evaluation.cost_files import write_costs
from spec_kd.evaluation.report.content import to_plain
from spec_kd.files import COSTS_FILE, remove
from spec_kd.options import read_path
from spec_kd.reports.numbers import DASH, TIMES_DIGITS, Interval, format_interval, format_number
from spec_kd.reports.plots import finish_axis, new_figure, save_files, set_fonts
from spec_kd.reports.rendering import Section, Table, render_document

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EQUAL_ALPHA = 0.05
"""Half an interval of an acceptance over a few dozen prompts: what lies closer together cannot be told apart."""
NOTE = (
    "c is a step of the draft, and verification all of a round but the draft's steps. Needed acceptances, and the "
    "speed-ups at a given acceptance, hold for tokens that are accepted independently with equal probability (arXiv "
    "2211.17192, eq. 1)."
)
RUN_NOTE = (
    "Acceptance after training is that of a run of equal time for every shape, on responses held out, with a 95 % "
    "interval over prompts. Longer training raises it. Its speed-up is replayed on these responses."
)


@dataclass(frozen=True, kw_only=True)
class ShortRun:
    """What a shape reached in a short training.

    Args:
        alpha (`Interval`): Mean acceptance of a drafted token on responses held out.
        alpha_before (`float`): The same before training.
        block_efficiency (`dict[str, Interval]`): Tokens per target pass, by number of drafted tokens (as text).
        steps (`int`): Optimizer steps.
        seconds (`float`): Seconds of training.
    """

    alpha: Interval
    alpha_before: float
    block_efficiency: dict[str, Interval]
    steps: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class PlannedShape:
    """One candidate.

    Args:
        name (`str`): Its name, such as `192x4`.
        options (`DraftShapeOptions`): Its shape, which [`~spec_kd.init_draft`] takes.
        num_parameters (`int`): Number of parameters.
        num_head_parameters (`int`): Parameters of the head, which every drafted token reads.
        num_bytes (`int`): Bytes of the weights in 16 bits.
        costs (`ServingCosts`): Costs of a round; `cost_ratio` is c.
        break_even_alpha (`float`): Lowest acceptance at which it is faster than plain decoding; NaN if it never is.
        wished_alpha (`float`): Lowest acceptance at which it reaches the wished speed-up; NaN if it never does.
        speedups (`dict[str, float]`): Predicted speed-up at the best number of drafted tokens, by acceptance (as text).
        num_assistant_tokens (`int`):
            Best number of drafted tokens: at the acceptance measured in a short run, else at the lowest one that
            reaches the wish, or at the highest one that counts as reachable.
        run (`ShortRun`, *optional*): What it reached in a short training; `None` if it was not trained.
        predicted_speedup (`Interval`, *optional*): Speed-up at what it reached there; `None` if it was not trained.
    """

    name: str
    options: DraftShapeOptions
    num_parameters: int
    num_head_parameters: int
    num_bytes: int
    costs: ServingCosts
    break_even_alpha: float
    wished_alpha: float
    speedups: dict[str, float]
    num_assistant_tokens: int
    run: ShortRun | None = None
    predicted_speedup: Interval | None = None

    @property
    def verify_cost(self) -> dict[int, float]:
        """Verification and all else but the draft's steps, by the timed numbers of drafted tokens; empty if unknown."""
        return {gamma: cost for gamma in self._gammas if (cost := self.costs.verify(gamma)) is not None}

    @property
    def round_cost(self) -> dict[int, float]:
        """Whole rounds, by the timed numbers of drafted tokens."""
        return {gamma: self.costs.find_round_cost(gamma) for gamma in self._gammas}

    @property
    def _gammas(self) -> list[int]:
        return sorted(self.costs.round_cost or self.costs.verify_cost or ())


@dataclass(frozen=True, kw_only=True)
class DraftPlan:
    """Candidate shapes of a draft, and the one to train.

    Args:
        target (`str`): Name of the target.
        wished_speedup (`float`): Speed-up that the draft should reach.
        reachable_alpha (`float`): Acceptance that training can reach at most.
        run_minutes (`float`, *optional*): Minutes of training of each shape; `None` if nothing was trained.
        shapes (`list[PlannedShape]`): The candidates, the smallest first.
    """

    target: str
    wished_speedup: float
    reachable_alpha: float
    run_minutes: float | None
    shapes: list[PlannedShape]

    @property
    def payable(self) -> list[PlannedShape]:
        """The shapes that break even at an acceptance that can be reached."""
        return [one for one in self.shapes if one.break_even_alpha <= self.reachable_alpha]

    @property
    def recommended(self) -> PlannedShape | None:
        """The shape to train; `None` if no shape can pay.

        After short runs of all that can pay it is the one with the highest predicted speed-up. From costs alone it is
        the largest of those whose needed acceptance lies within 0.05 of the lowest: cost first, then room to learn. The
        acceptance is that of the wished speed-up where any shape can reach it, else that of break-even.
        """
        payable = self.payable
        if payable and all(one.predicted_speedup is not None for one in payable):
            return max(payable, key=lambda one: one.predicted_speedup or (0.0,))
        reaching = [one for one in payable if one.wished_alpha <= self.reachable_alpha]
        needed = {one.name: one.wished_alpha if reaching else one.break_even_alpha for one in reaching or payable}
        near = [one for one in payable if needed.get(one.name, math.inf) <= min(needed.values()) + EQUAL_ALPHA]
        return max(near, key=lambda one: one.num_parameters, default=None)

    @property
    def headline(self) -> str:
        """What to do, in one or two sentences."""
        best = self.recommended
        if best is None:
            cheapest = min(self.shapes, key=lambda one: (math.isnan(one.break_even_alpha), one.break_even_alpha))
            if math.isnan(cheapest.break_even_alpha):
                return "No shape can pay: each is slower than plain decoding even if every drafted token is accepted."
            return (
                f"No shape can pay: the cheapest, {cheapest.name}, is faster than plain decoding from an acceptance of "
                f"{cheapest.break_even_alpha:.2f} on, and {self.reachable_alpha:.2f} counts as reachable."
            )
        gamma = best.num_assistant_tokens
        tokens = f"{gamma} drafted token{'s' if gamma > 1 else ''}"
        pays = f"{best.name} is recommended. It pays from an acceptance of {best.break_even_alpha:.2f} on"
        if best.run is not None:
            return (
                f"{pays}. After {self.run_minutes:g} minutes of training its acceptance is "
                f"{format_interval(best.run.alpha)}, which is predicted to give "
                f"{format_interval(best.predicted_speedup)} times plain decoding with {tokens}."
            )
        if best.wished_alpha <= self.reachable_alpha:
            wish = f"{self.wished_speedup:g} times plain decoding at {best.wished_alpha:.2f}"
            return f"{pays}, and reaches {wish} with {tokens}."
        return (
            f"{pays}, but no shape reaches {self.wished_speedup:g} times plain decoding at the "
            f"{self.reachable_alpha:.2f} that count as reachable."
        )

    def to_markdown(self) -> str:
        """Headline and tables in Markdown."""
        notes = [NOTE] if self.run_minutes is None else [NOTE, RUN_NOTE]
        return render_document(f"Shape of a draft for {self.target}", [self.headline, *notes], [_Shapes()], self)

    def plot(self) -> "Figure":
        """Predicted speed-up over shape: a line for each given acceptance, and points for what short runs reached.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        figure = new_figure(max(5.0, 0.9 * len(self.shapes) + 2.5), 4.2)
        axis, places = figure.subplots(), list(range(len(self.shapes)))
        for number, alpha in enumerate(self.shapes[0].speedups):
            values = [one.speedups[alpha] for one in self.shapes]
            axis.plot(places, values, marker="o", markersize=3, color=f"C{number}", label=f"acceptance {alpha}")
        trained = {place: one.predicted_speedup for place, one in enumerate(self.shapes) if one.predicted_speedup}
        if trained:
            value, low, high = np.array(list(trained.values())).T
            axis.errorbar(list(trained), value, [value - low, high - value], fmt="s", color="black", label="trained")
        axis.axhline(1, color="0.4", linewidth=1, linestyle=(0, (2, 2)), label="plain decoding")
        axis.axhline(self.wished_speedup, color="0.4", linewidth=1, label="wished")
        finish_axis(axis, "Predicted speed-up over shape", "shape", "times plain decoding", bottom=0)
        best = self.recommended
        names = [f"{one.name}\n(recommended)" if one is best else one.name for one in self.shapes]
        axis.set_xticks(places, names, rotation=30, ha="right")
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize="small")
        set_fonts(figure)
        return figure

    def save(self, output_dir: str | os.PathLike[str]) -> dict[str, Path]:
        """Writes `plan.json`, `plan.md` and, with matplotlib, `plan.png`, over those that are there.

        `costs.json` has the costs of the recommended shape, as `spec-kd evaluate --costs` reads them.

        Args:
            output_dir (`str` or `os.PathLike`): Folder or address for the files; created if needed.

        Returns:
            `dict[str, Path]`: The files by `"json"`, `"md"`, `"png"` and `"costs"`, the last two only where they were
            written.
        """
        folder = open_folder(read_path("output_dir", output_dir, takes_address=True))
        best, costs = self.recommended, folder / COSTS_FILE
        values = {"headline": self.headline, "recommended": None if best is None else best.name, **to_plain(self)}
        texts = {"json": json.dumps(values, indent=1, ensure_ascii=False) + "\n", "md": self.to_markdown()}
        paths = save_files(output_dir, "plan", texts, self.plot)
        if best is None:
            remove(costs)  # of another shape, with another wish
            return paths
        write_costs([best.costs], costs)
        return {**paths, "costs": costs}


class _Shapes(Section[DraftPlan]):
    title = "Shapes"

    def list_tables(self, report: DraftPlan) -> list[Table]:
        return [_tabulate_costs(report), _tabulate_speedups(report)]


def _tabulate_costs(plan: DraftPlan) -> Table:
    gammas = sorted({gamma for one in plan.shapes for gamma in one.round_cost})
    header = ["shape", "parameters, M", "in the head, M", "MB in 16 bits", "c"]
    header += [f"{kind}, {gamma} drafted" for kind in ("verification", "round") for gamma in gammas]
    rows = [
        [
            one.name,
            *(f"{number / 1e6:.1f}" for number in (one.num_parameters, one.num_head_parameters, one.num_bytes)),
            format_number(one.costs.cost_ratio, 3),
            *(format_number(costs.get(gamma)) for costs in (one.verify_cost, one.round_cost) for gamma in gammas),
        ]
        for one in plan.shapes
    ]
    origin = ", ".join(dict.fromkeys(one.costs.source for one in plan.shapes))
    return Table(title=f"What a round costs, in steps of the target ({origin})", header=header, rows=rows)


def _tabulate_speedups(plan: DraftPlan) -> Table:
    header = ["shape", "acceptance to break even", f"for {plan.wished_speedup:g} times"]
    header += [f"speed-up at acceptance {alpha}" for alpha in plan.shapes[0].speedups]
    header += ["acceptance after training", "its predicted speed-up", "drafted tokens", "recommended"]
    best = plan.recommended
    rows = [
        [
            one.name,
            format_number(one.break_even_alpha),
            format_number(one.wished_alpha),
            *(format_number(speedup) for speedup in one.speedups.values()),
            DASH if one.run is None else format_interval(one.run.alpha),
            format_interval(one.predicted_speedup, TIMES_DIGITS),
            str(one.num_assistant_tokens),
            "yes" if one is best else "",
        ]
        for one in plan.shapes
    ]
    return Table(title="Acceptance that is needed and reached", header=header, rows=rows)
