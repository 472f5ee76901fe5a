"""The metrics of one evaluation: sums per prompt, what follows from them, and the difference between two drafts.

Intervals are bootstrap intervals over prompts (Efron and Tibshirani 1993, percentile interval).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from itertools import combinations
from typing import TYPE_CHECKING, cast

import numpy as np

from spec_kd.counting import Counting
from spec_kd.evaluation.report.content import Comparison
from spec_kd.evaluation.report.left_out import LeftOut, describe_kinds
from spec_kd.open_types import Argument, Array, Call
from spec_kd.reports.numbers import Interval

if TYPE_CHECKING:
    import torch

    from spec_kd.acceptance import Rounds

MAX_DRAWS_AT_ONCE = 2**22


def bootstrap(
    statistic: Call[Array],
    *columns: Array,
    num_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Interval of a function of sums over prompts, by resampling the prompts with replacement.

    Args:
        statistic (`Callable`): Takes one sum for each column (scalars, or arrays over resamples) and returns the value.
        columns (`np.ndarray`): Per-prompt values `(P,)`.
        num_resamples (`int`, *optional*, defaults to `2000`): Number of resampled sets of prompts.
        confidence (`float`, *optional*, defaults to `0.95`): Mass of the interval.
        seed (`int`, *optional*, defaults to `0`): Seed of the resampling.

    Raises:
        ValueError: If there are no prompts, columns differ in length, or `confidence` lies outside (0, 1).
    """
    values = np.stack([np.asarray(column, dtype=np.float64) for column in columns])  # (C, P)
    num_prompts = values.shape[-1]
    if num_prompts == 0:
        raise ValueError("There are no prompts to compute a value from. Pass at least one.")
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` is {confidence}, but must lie between 0 and 1, e.g. 0.95.")
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(statistic(*values.sum(axis=-1)))
        if num_prompts == 1:
            return Interval(value, float("nan"), float("nan"))
        rng = np.random.default_rng(seed)
        rows = max(1, MAX_DRAWS_AT_ONCE // num_prompts)
        resampled = []
        for start in range(0, num_resamples, rows):
            draws = rng.integers(0, num_prompts, size=(min(rows, num_resamples - start), num_prompts))
            resampled.append(statistic(*(column[draws].sum(axis=-1) for column in values)))
    tail = 50 * (1 - confidence)
    low, high = np.percentile(np.concatenate(resampled), [tail, 100 - tail])
    return Interval(value, float(low), float(high))


def bootstrap_ratio(
    numerator: Array,
    denominator: Array,
    *,
    num_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """sum(numerator) / sum(denominator) over prompts with its bootstrap interval; see [`bootstrap`].

    Long prompts weigh more than short ones, as they do in a server: this is a ratio of sums, not a mean of ratios.
    """
    return bootstrap(
        lambda n, d: n / d, numerator, denominator, num_resamples=num_resamples, confidence=confidence, seed=seed
    )


def bootstrap_median(values: Array, *, num_resamples: int = 2000, confidence: float = 0.95, seed: int = 0) -> Interval:
    """Median over prompts with its bootstrap interval; see [`bootstrap`].

    Args:
        values (`np.ndarray`): One value for each prompt `(P,)`, at least one.
        num_resamples (`int`, *optional*, defaults to `2000`): Number of resampled sets of prompts.
        confidence (`float`, *optional*, defaults to `0.95`): Mass of the interval.
        seed (`int`, *optional*, defaults to `0`): Seed of the resampling.
    """
    value = float(np.median(values))
    if len(values) == 1:
        return Interval(value, float("nan"), float("nan"))
    draws = np.random.default_rng(seed).integers(0, len(values), size=(num_resamples, len(values)))
    tail = 50 * (1 - confidence)
    low, high = np.percentile(np.median(values[draws], axis=-1), [tail, 100 - tail])
    return Interval(value, float(low), float(high))


def name_temperature(temperature: float) -> str:
    """`"greedy"` for 0.0, else `"t1"`, `"t0.7"`, ...: the name of the setting in reports and metrics."""
    return "greedy" if temperature == 0 else f"t{temperature:g}"


@dataclass(frozen=True, kw_only=True)
class AcceptanceMetrics:
    """What speculative decoding did, or would do, on P prompts.

    Args:
        tokens (`np.ndarray`):
            Emitted tokens `(P,)`, EOS included; without the first one where the prompt's pass writes it alone.
        target_calls (`np.ndarray`):
            Target forward passes `(P,)`, without such a pass; an expectation where it was replayed.
        accepted (`np.ndarray`): Accepted drafted tokens `(P,)`, as the serving engine counts them.
        drafted (`np.ndarray`): Drafted tokens `(P,)`, as the serving engine counts them.
        drafting_rounds (`np.ndarray`): Rounds that drafted at least one token `(P,)`.
        accepted_by_position (`np.ndarray`): Rounds in which drafted token k was accepted `(P, gamma)`.
        temperature (`float`): Sampling temperature, 0.0 for greedy.
        num_assistant_tokens (`int`): gamma.
        draft_sampling (`str`): `"stochastic"` or `"greedy"`.
        method (`str`): `"replay"` or `"assisted"`.
        known_drafts (`np.ndarray`, *optional*), open_drafts (`np.ndarray`, *optional*):
            As in [`~spec_kd.acceptance.Rounds`], where they were replayed. Of an open draft `drafted` has the least.
        alpha_sum (`np.ndarray`, *optional*): Sum of alpha over the positions of the target's completion `(P,)`.
        alpha_tokens (`np.ndarray`, *optional*): Tokens of these completions `(P,)`.
        alpha_sum_by_position (`np.ndarray`, *optional*):
            For a parallel draft the sum of alpha of drafted token k over all rounds that could begin `(P, gamma)`.
        alpha_tokens_by_position (`np.ndarray`, *optional*): Numbers of these rounds that have a token k `(P, gamma)`.
        kinds (`Mapping[str, np.ndarray]`, *optional*, defaults to `{}`):
            Which responses loop and which prompts lack the chat template, bool `(P,)` each by
            [`~spec_kd.evaluation.text_kinds.find_kinds`].
    """

    tokens: Array
    target_calls: Array
    accepted: Array
    drafted: Array
    drafting_rounds: Array
    accepted_by_position: Array
    temperature: float
    num_assistant_tokens: int
    draft_sampling: str
    method: str
    known_drafts: Array | None = None
    open_drafts: Array | None = None
    alpha_sum: Array | None = None
    alpha_tokens: Array | None = None
    alpha_sum_by_position: Array | None = None
    alpha_tokens_by_position: Array | None = None
    kinds: Mapping[str, Array] = field(default_factory=dict)

    @classmethod
    def of(
        cls, rounds: "Rounds", lengths: "torch.Tensor", counting: Counting, **facts: Argument
    ) -> "AcceptanceMetrics":
        """The metrics of replayed rounds on responses of these `lengths`, with the other fields as `facts`."""
        return cls(
            tokens=(lengths - counting.first_round).numpy(),  # the prompt's pass writes the others, without a draft
            target_calls=rounds.target_calls.numpy(),
            accepted=rounds.accepted.numpy(),
            drafted=rounds.drafted.numpy(),
            drafting_rounds=rounds.drafting_rounds.numpy(),
            accepted_by_position=rounds.accepted_by_position.numpy(),
            known_drafts=rounds.known_drafts.numpy(),
            open_drafts=rounds.open_drafts.numpy(),
            **facts,
        )

    def select(self, is_chosen: Array) -> "AcceptanceMetrics":
        """The metrics of some prompts alone, as if no others had been there.

        Args:
            is_chosen (`np.ndarray`): Which prompts, bool `(P,)`.
        """
        values = {one.name: getattr(self, one.name) for one in fields(AcceptanceMetrics)}
        chosen = {name: value[is_chosen] for name, value in values.items() if isinstance(value, np.ndarray)}
        kinds = {kind: mask[is_chosen] for kind, mask in self.kinds.items()}
        return AcceptanceMetrics(**values | chosen | {"kinds": kinds})

    @property
    def left_out(self) -> list[LeftOut]:
        """Alpha and block efficiency with and without each kind of response."""

        def measure(is_chosen: Array) -> dict[str, Interval | None]:
            chosen = self.select(is_chosen)
            return {"alpha": chosen.alpha, "block_efficiency": chosen.block_efficiency}

        return describe_kinds(self.kinds, measure)

    @property
    def alpha(self) -> Interval | None:
        """Expected acceptance of one drafted token, mean over positions; `None` if it was not measured.

        For a parallel draft it is that of the first token of a round.
        """
        return None if self.alpha_sum is None else bootstrap_ratio(self.alpha_sum, cast(Array, self.alpha_tokens))

    @property
    def alpha_per_position(self) -> list[Interval]:
        """Alpha of drafted token k = 1..gamma of a parallel draft, after the k - 1 tokens that the target wrote.

        The mean over all tokens at which a round could begin. Empty for an autoregressive draft, whose alpha does not
        depend on k.
        """
        if self.alpha_sum_by_position is None:
            return []
        counts = cast(Array, self.alpha_tokens_by_position)
        return [bootstrap_ratio(*columns) for columns in zip(self.alpha_sum_by_position.T, counts.T, strict=True)]

    @property
    def acceptance_rate(self) -> Interval:
        """Accepted over drafted tokens; NaN if nothing was drafted."""
        return bootstrap_ratio(self.accepted, self.drafted)

    @property
    def block_efficiency(self) -> Interval:
        """Tokens emitted per target forward pass, the bonus token included."""
        return bootstrap_ratio(self.tokens, self.target_calls)

    @property
    def block_efficiency_by_prompt(self) -> Array:
        """Tokens per target pass of each prompt `(P,)`; 1 where the prompt's own pass wrote everything."""
        return np.divide(self.tokens, self.target_calls, out=np.ones(len(self.tokens)), where=self.target_calls > 0)

    @property
    def mean_acceptance_length(self) -> Interval:
        """1 + accepted tokens / drafting rounds, as serving engines print it; NaN if nothing was drafted."""
        return Interval(*(1 + value for value in bootstrap_ratio(self.accepted, self.drafting_rounds)))

    @property
    def acceptance_rate_per_position(self) -> list[Interval]:
        """Share of the drafting rounds in which drafted token k = 1..gamma was accepted."""
        return [bootstrap_ratio(column, self.drafting_rounds) for column in self.accepted_by_position.T]

    def to_metrics(self, prefix: str = "eval", suffix: str = "") -> dict[str, float]:
        """The values without intervals, for a log. alpha always carries its setting (`eval_alpha_t1`).

        Shares of looping completions and of prompts without the chat template are among them, and alpha and block
        efficiency without these where there are some and others.

        Args:
            prefix (`str`, *optional*, defaults to `"eval"`): Prefix of every name.
            suffix (`str`, *optional*, defaults to `""`): Suffix of every name but alpha's, such as `"_t1"`.
        """
        metrics = {
            f"{prefix}_acceptance_rate{suffix}": self.acceptance_rate.value,
            f"{prefix}_block_efficiency{suffix}": self.block_efficiency.value,
        }
        for k, rate in enumerate(self.acceptance_rate_per_position, start=1):
            metrics[f"{prefix}_acceptance_rate_pos_{k}{suffix}"] = rate.value
        setting = name_temperature(self.temperature)
        if self.alpha is not None:
            metrics = {f"{prefix}_alpha_{setting}": self.alpha.value, **metrics}
        for k, alpha in enumerate(self.alpha_per_position, start=1):
            metrics[f"{prefix}_alpha_pos_{k}_{setting}"] = alpha.value
        for one in self.left_out:
            metrics[f"{prefix}_share_{one.kind}{suffix}"] = one.share
            for metric in one.metrics if one.responses else ():
                if metric.without is not None:
                    end = f"_{setting}" if metric.name == "alpha" else suffix
                    metrics[f"{prefix}_{metric.name}_without_{one.kind}{end}"] = metric.without.value
        return metrics


COMPARED = {"alpha": ("alpha_sum", "alpha_tokens"), "block_efficiency": ("tokens", "target_calls")}
"""Metrics that drafts are compared by: ratios of two sums over prompts."""


def compare_metric(name: str, metrics: AcceptanceMetrics, baseline: AcceptanceMetrics) -> Interval:
    """A metric minus that of the baseline on the same prompts, which are resampled for both together.

    Args:
        name (`str`): `"alpha"` or `"block_efficiency"`.
        metrics (`AcceptanceMetrics`), baseline (`AcceptanceMetrics`): Metrics at the same gamma.
    """
    columns = [getattr(one, column) for one in (metrics, baseline) for column in COMPARED[name]]
    return bootstrap(lambda a, n, b, m: a / n - b / m, *columns)


def compare_drafts(metrics_by_draft: Mapping[str, AcceptanceMetrics], setting: str) -> list[Comparison]:
    """Compares every pair of drafts, the later one minus the earlier one.

    Args:
        metrics_by_draft (`Mapping[str, AcceptanceMetrics]`): Metrics on the same prompts at the same gamma.
        setting (`str`): Name of the setting.
    """
    return [
        Comparison(
            setting=setting,
            metric=name,
            draft=draft,
            baseline=baseline,
            difference=compare_metric(name, metrics_by_draft[draft], metrics_by_draft[baseline]),
        )
        for baseline, draft in combinations(metrics_by_draft, 2)
        for name in COMPARED
    ]
