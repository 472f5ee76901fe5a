"""Figures and differences of cells, from the lines of a record and nothing else; all sums are over seeds."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from spec_kd.evaluation import Interval, ServingCosts, bootstrap

from .cells import RESULT, Cell, compute_key
from .profile import Profile
from .questions import Comparison
from .record import Record

SETTING_NAMES = {"greedy": "greedy", "t1": "T = 1"}
BLOCK_EFFICIENCY = ("tokens", "target_calls")
ALPHA = ("alpha_sum", "tokens")


@dataclass(frozen=True)
class Lines:
    """The lines of a cell, one for each seed that has been run."""

    by_seed: dict[int, dict[str, Any]]

    def sum_columns(self, setting: str, ratio: tuple[str, str], seeds: Sequence[int]) -> list[np.ndarray]:
        """Both sums of a ratio for each prompt `(P,)`, added up over seeds."""
        figures = [self.by_seed[seed]["figures"][setting] for seed in seeds]
        return [np.sum([figure[name] for figure in figures], axis=0) for name in ratio]

    def measure(self, setting: str, ratio: tuple[str, str]) -> Interval:
        """A ratio over all seeds, with the interval over prompts."""
        return bootstrap(lambda a, n: a / n, *self.sum_columns(setting, ratio, list(self.by_seed)))

    def mean(self, name: str) -> float:
        """Mean over seeds of a number of the line."""
        return float(np.mean([line[name] for line in self.by_seed.values()]))


@dataclass(frozen=True)
class Difference:
    """A cell against its baseline.

    Args:
        interval (`Interval`): With 95 % over prompts, which are the same for both.
        by_seed (`list[float]`): The same difference for each seed alone.
    """

    interval: Interval
    by_seed: list[float]


def find_lines(profile: Profile, record: Record, cell: Cell, seeds: Sequence[int]) -> Lines:
    """What has been run of a cell, where it was run with several builds, with the first one."""
    return find_common_lines(profile, record, [cell], seeds)[0]


def find_common_lines(profile: Profile, record: Record, cells: Sequence[Cell], seeds: Sequence[int]) -> list[Lines]:
    """Lines of each cell for every seed that all of them were run with, on the same models: on the first build that has
    all."""
    found: list[dict[int, dict[str, Any]]] = [{} for _ in cells]
    for seed in seeds:
        by_build = [record.find_builds(RESULT, compute_key(profile, replace(cell, seed=seed))) for cell in cells]
        build = next((b for b in by_build[0] if all(b in own for own in by_build[1:])), None)
        if build is not None:
            for lines, own in zip(found, by_build, strict=True):
                lines[seed] = own[build]
    return [Lines(lines) for lines in found]


def number_builds(record: Record, domain: str) -> dict[str, int]:
    """The builds of a domain's models in the order in which they were measured, from zero."""
    lines = [line for line in record.list("drift") if line["domain"] == domain]
    lines += [line for line in record.list(RESULT) if line["cell"]["domain"] == domain]
    return {build: number for number, build in enumerate(dict.fromkeys(line.get("build", "") for line in lines))}


def compare(
    profile: Profile, record: Record, comparison: Comparison, seeds: Sequence[int], setting: str, ratio: tuple[str, str]
) -> Difference | None:
    """Relative difference of tokens a target pass, or difference of alpha; `None` if no seed has both cells.

    Raises:
        `ValueError`: The cells were measured on different texts.
    """
    cell, baseline = find_common_lines(profile, record, [comparison.cell, comparison.baseline], seeds)
    common = list(cell.by_seed)
    if not common:
        return None
    for seed in common:
        texts = {lines.by_seed[seed]["figures"][setting]["texts"] for lines in (cell, baseline)}
        if len(texts) > 1:
            raise ValueError(f"`{comparison.label}` compares cells measured on different texts ({sorted(texts)}).")

    def difference(chosen: Sequence[int]) -> Interval:
        columns = [*cell.sum_columns(setting, ratio, chosen), *baseline.sum_columns(setting, ratio, chosen)]
        return subtract(ratio, *columns)

    return Difference(difference(common), [difference([seed]).value for seed in common])


def subtract(ratio: tuple[str, str], *columns: np.ndarray) -> Interval:
    """Relative difference of two ratios of sums over the same prompts, or for alpha the difference."""
    if ratio == ALPHA:
        return bootstrap(lambda a, n, b, m: a / n - b / m, *columns)
    return bootstrap(lambda a, n, b, m: (a / n) / (b / m) - 1, *columns)


def measure_drift_of(record: Record, domain: str, setting: str) -> Interval | None:
    """alpha of the default draft with the domain target minus alpha with the generic target, over the same prompts, on
    the first build that has both."""
    by_build: dict[str, dict[str, dict[str, Any]]] = {}
    for line in record.list("drift"):
        if line["domain"] == domain and line["draft"] == "default":
            by_build.setdefault(line.get("build", ""), {})[line["target"]] = line["figures"][setting]
    lines = next((own for own in by_build.values() if len(own) == 2), None)
    if lines is None:
        return None
    columns = [np.array(lines[target][name]) for target in ("domain", "generic") for name in ALPHA]
    return subtract(ALPHA, *columns)


def read_costs(record: Record, domain: str, build: str) -> dict[str, ServingCosts]:
    """Costs of a round by draft."""
    for line in record.list("costs"):
        if (line["domain"], line.get("build", "")) == (domain, build):
            return {
                name: ServingCosts(**{**costs, "verify_cost": {int(g): v for g, v in costs["verify_cost"].items()}})
                for name, costs in line["costs"].items()
            }
    return {}


def predict_best(figures: Sequence[dict[str, Any]], costs: ServingCosts) -> tuple[int, float]:
    """The best gamma and the speed-up predicted at it, from lines' figures in one setting."""
    by_gamma = {
        int(gamma): float(np.mean([figure["block_efficiency"][gamma] for figure in figures]))
        for gamma in figures[0]["block_efficiency"]
    }
    speedups = {gamma: costs.predict_speedup(value, gamma) for gamma, value in by_gamma.items()}
    best = max(speedups, key=speedups.__getitem__)
    return best, speedups[best]
