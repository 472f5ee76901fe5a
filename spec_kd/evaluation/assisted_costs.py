"""What rounds cost inside transformers' assisted generation, fitted to a few timed runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
from transformers import PreTrainedModel

from spec_kd.evaluation.assisted import AssistedMetrics, GenerationTiming, generate_assisted
from spec_kd.evaluation.cost import MeasurementError, ServingCosts, fit_context, measure_costs
from spec_kd.open_types import Argument, Arguments, Array
from spec_kd.options import resolve_options
from spec_kd.sampling.options import SamplingOptions


@dataclass(frozen=True, kw_only=True)
class PrefillCost:
    """Seconds until a prompt is read: a fixed part, and one for each of its tokens.

    Args:
        fixed (`float`): Seconds of any call. It is negative if the seconds grow faster than the length of the prompt.
        per_token (`float`): Seconds per prompt token.
    """

    fixed: float
    per_token: float

    @classmethod
    def fit(cls, prompt_tokens: Array, seconds: Array) -> "PrefillCost":
        """Least squares over prompts `(P,)`. If all have one length, the cost is nearly proportional to it."""
        tokens = np.stack([np.ones(len(prompt_tokens)), prompt_tokens], axis=1)  # (P, 2)
        fixed, per_token = np.linalg.lstsq(tokens, seconds, rcond=None)[0]
        return cls(fixed=float(fixed), per_token=float(per_token))

    def predict(self, prompt_tokens: Array) -> Array:
        """Seconds for prompts of these lengths `(P,)`."""
        return np.maximum(self.fixed + self.per_token * prompt_tokens, 0.0)


@dataclass(frozen=True, kw_only=True)
class AssistedCosts:
    """Costs inside transformers' assisted generation, those of reading a prompt included.

    Args:
        costs (`ServingCosts`): Costs of a round, at batch size 1.
        plain_prefill (`PrefillCost`): Cost of plain generation until its first token, without that token's step.
        assisted_prefill (`PrefillCost`): Cost of assisted generation until its first round is over, without that round.
        runs (`list[AssistedMetrics]`): The runs that were timed, one for each gamma.
    """

    costs: ServingCosts
    plain_prefill: PrefillCost
    assisted_prefill: PrefillCost
    runs: list[AssistedMetrics] = field(repr=False)

    def predict_speedup(self, prompt_tokens: Array, tokens: Array, target_calls: Array, gamma: int) -> float:
        """Speed-up of whole requests, prompts included: seconds without the draft over seconds with it.

        Args:
            prompt_tokens (`np.ndarray`): Tokens of each prompt `(P,)`.
            tokens (`np.ndarray`): Tokens of each completion `(P,)`.
            target_calls (`np.ndarray`): Rounds of each completion, replayed or measured `(P,)`.
            gamma (`int`): Tokens drafted in a round.
        """
        step = cast(float, self.costs.target_step_seconds)
        round_seconds = step / self.costs.predict_speedup(1.0, gamma)
        plain = self.plain_prefill.predict(prompt_tokens).sum() + step * tokens.sum()
        return plain / (self.assisted_prefill.predict(prompt_tokens).sum() + round_seconds * target_calls.sum())


def measure_assisted_costs(
    draft: PreTrainedModel,
    target: PreTrainedModel,
    prompt_ids: Sequence[Sequence[int]],
    options: SamplingOptions | None = None,
    *,
    gammas: Sequence[int] = (2, 5, 12),
    eos_token_id: int | list[int] | None = None,
    vocab_size: int | None = None,
    **given: Argument,
) -> AssistedCosts:
    """Times rounds of `target.generate(assistant_model=draft)` on a few prompts, at several gammas.

    A round takes the same time however many of its tokens are accepted, so a handful of prompts is enough. Their
    lengths should vary as much as those of the prompts to predict. The rounds of each completion are compared with the
    steps of the same completion without the draft, and the median counts, since the pace of a shared machine changes.
    [`fit_rounds`] turns them into costs, which are interpolated between the gammas given. A round with one drafted
    token is cheaper than a straight line over gamma predicts, so gamma 1 says little about the others.

    Args:
        draft (`PreTrainedModel`), target (`PreTrainedModel`): The models.
        prompt_ids (`Sequence[Sequence[int]]`): Prompts to time; other prompts than those of a comparison.
        options (`SamplingOptions`, *optional*):
            Sampling of both models. By default greedy decoding of at most 512 tokens.
        gammas (`Sequence[int]`, *optional*, defaults to `(2, 5, 12)`):
            Two or more numbers of drafted tokens; predictions hold in their range.
        eos_token_id (`int` or `list[int]`, *optional*):
            Ids that end a completion; those of the target's generation config by default.
        vocab_size (`int`, *optional*): Number of real ids; the rows that both heads have by default.
        given: Fields of [`SamplingOptions`] as keywords, which replace those of `options`.

    Raises:
        ValueError: If there are fewer than two gammas, or completions are too short to time; also as
            [`generate_assisted`].
        MeasurementError: If the times contradict each other.
    """
    if len(set(gammas)) < 2:
        raise ValueError(f"`gammas` is {tuple(gammas)}, but two or more are needed to tell draft steps from overhead.")
    options = resolve_options(SamplingOptions, options or SamplingOptions(temperature=0.0), given)
    common: Arguments = {"eos_token_id": eos_token_id, "vocab_size": vocab_size, "measure_speed": True}
    runs = [
        generate_assisted(target, draft, prompt_ids, options, num_assistant_tokens=gamma, **common) for gamma in gammas
    ]
    timings = [cast(GenerationTiming, run.timing) for run in runs]
    paces = [_measure_paces(run) for run in runs]
    step = float(np.nanmedian([steps for steps, _ in paces]))
    round_steps = {
        gamma: float(np.nanmedian(rounds / steps)) for gamma, (steps, rounds) in zip(gammas, paces, strict=True)
    }
    lengths = np.array([len(ids) for ids in prompt_ids])
    context = fit_context(draft, target, int(lengths.mean() + options.max_new_tokens / 2), max(gammas))
    bare = measure_costs(draft, target, gammas=gammas, context_length=context)[0]
    costs = fit_rounds(
        round_steps, bare, step, f"rounds of assisted generation on {len(lengths)} prompts, on this machine"
    )
    plain = [timing.plain_first_seconds - step for timing in timings]
    assisted = [
        timing.assisted_first_seconds - round_steps[gamma] * step
        for gamma, timing in zip(round_steps, timings, strict=True)
    ]
    return AssistedCosts(
        costs=costs,
        plain_prefill=PrefillCost.fit(np.tile(lengths, len(runs)), np.concatenate(plain)),
        assisted_prefill=PrefillCost.fit(np.tile(lengths, len(runs)), np.concatenate(assisted)),
        runs=runs,
    )


def fit_rounds(round_steps: Mapping[int, float], bare: ServingCosts, step: float, source: str) -> ServingCosts:
    """Splits measured rounds into draft steps, overhead and verification, such that they add up to what was measured.

    Bare passes give the cost of verification. Inside `generate` a pass costs more, by the same amount for any number of
    tokens. A line over gamma through the rest gives the draft step (its slope) and the overhead of a round (its
    intercept, or 0 if that is negative). The distance of a round from the line is added to its verification.

    Args:
        round_steps (`Mapping[int, float]`): Time of a round over that of a step of plain generation, by gamma.
        bare (`ServingCosts`): Costs of bare passes, with `target_step_seconds`.
        step (`float`): Seconds of a step of plain generation.
        source (`str`): Origin of the numbers.

    Raises:
        MeasurementError: If a pass over more tokens would take no time.
    """
    gammas, total = np.array(list(round_steps), dtype=float), np.array(list(round_steps.values()))
    bare_step = cast(float, bare.target_step_seconds)
    verify = np.array([1.0 + (cast(float, bare.verify(gamma)) - 1.0) * bare_step / step for gamma in round_steps])
    slope, intercept = np.polyfit(gammas, total - verify, 1)
    if intercept < 0:
        slope, intercept = ((total - verify) / gammas).mean(), 0.0
    slope = max(0.0, slope)
    left = total - slope * gammas - intercept
    if not (np.isfinite([step, slope, intercept, *left]).all() and left.min() > 0):
        raise MeasurementError(
            f"the measured rounds contradict each other (a pass over more tokens would cost {left.min():.3g} steps of "
            "the target), as on a busy machine. Repeat it when it is idle, with more prompts or longer completions."
        )
    return ServingCosts(
        cost_ratio=float(slope),
        verify_cost=dict(zip(round_steps, left.tolist(), strict=True)),
        round_overhead=float(intercept),
        target_step_seconds=step,
        source=source,
    )


def _measure_paces(run: AssistedMetrics) -> tuple[Array, Array]:
    """Seconds per plain step and per round after the first one of each completion `(P,)`; NaN if it ends there."""
    timing = cast(GenerationTiming, run.timing)
    is_timed = (timing.plain_tokens > 1) & (run.target_calls > 1)
    if not is_timed.any():
        raise ValueError(
            "The target's completions end within one round, so nothing can be timed. Raise `max_new_tokens`, or pass "
            "prompts with longer completions."
        )
    steps, rounds = (np.where(is_timed, count - 1, np.nan) for count in (timing.plain_tokens, run.target_calls))
    return (
        (timing.plain_seconds - timing.plain_first_seconds) / steps,
        (timing.assisted_seconds - timing.assisted_first_seconds) / rounds,
    )
