"""What a round of speculative decoding costs, so that acceptance becomes a speed-up.

Costs are measured in two ways: as bare passes of the models, which is what an engine without overhead would pay, and
inside transformers' assisted generation, which is what that pays. A table measured in one's own server goes where these
go.
"""

import copy
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature

import numpy as np
import torch
from transformers import PreTrainedModel

from spec_kd.acceptance import check_num_assistant_tokens, expect_block_efficiency, predict_speedup
from spec_kd.checks import check_int, check_ints, check_number
from spec_kd.evaluation.assisted import AssistedMetrics, generate_assisted
from spec_kd.evaluation.device_timing import synchronize
from spec_kd.heads import count_rows, evaluation_mode, find_input_device
from spec_kd.open_types import Array, JsonObject
from spec_kd.sampling.input_checks import find_causal_lm, resolve_vocab_size

DEFAULT_GAMMAS = (1, 2, 4, 8, 16)
DEFAULT_CONTEXT = 256


class MeasurementError(RuntimeError):
    """What was measured makes no sense, or cannot be measured with these models: no argument is wrong."""


@dataclass(frozen=True, kw_only=True)
class ServingCosts:
    """What a round costs, in steps of the target (a pass over one new token).

    Args:
        cost_ratio (`float`): c, a draft step over a target step.
        verify_cost (`Mapping[int, float]`):
            v by gamma: a target pass over gamma + 1 tokens over one over one token. Between the gammas given it is
            interpolated; v(0) = 1.
        round_overhead (`float`, *optional*, defaults to `0.0`): What else a round costs in this engine.
        batch_size (`int`, *optional*, defaults to `1`): Sequences at a time.
        target_step_seconds (`float`, *optional*): A target step, where it was measured in seconds.
        source (`str`): Where the numbers come from, for the report.

    Raises:
        ValueError: For a cost that cannot be, or no `verify_cost`.
    """

    cost_ratio: float
    verify_cost: Mapping[int, float]
    round_overhead: float = 0.0
    batch_size: int = 1
    target_step_seconds: float | None = None
    source: str = "given"

    def __post_init__(self) -> None:
        if not isinstance(self.verify_cost, Mapping) or not self.verify_cost:
            raise ValueError(
                f"`verify_cost` is {self.verify_cost!r}, but must give a positive cost for some gammas >= 1, such as "
                "{5: 1.1}: a target pass over 6 tokens in steps of the target."
            )
        for gamma, cost in self.verify_cost.items():
            check_int("verify_cost (gamma)", gamma)
            check_number(f"verify_cost[{gamma}]", cost, above=0)
        check_number("cost_ratio", self.cost_ratio, 0)
        check_number("round_overhead", self.round_overhead, 0)
        check_int("batch_size", self.batch_size)
        check_number("target_step_seconds", self.target_step_seconds, above=0, is_optional=True)

    @property
    def max_gamma(self) -> int:
        """The highest gamma whose verification cost is known."""
        return max(self.verify_cost)

    def verify(self, gamma: int) -> float:
        """v(gamma); raises `ValueError` beyond what is known."""
        check_num_assistant_tokens(gamma)
        if gamma > self.max_gamma:
            raise ValueError(
                f"The cost of verifying {gamma} drafted tokens is not known, only up to {self.max_gamma}. Measure or "
                "give `verify_cost` for it."
            )
        known = {0: 1.0, **self.verify_cost}
        gammas = sorted(known)
        return float(np.interp(gamma, gammas, [known[g] for g in gammas]))

    def predict_speedup(self, block_efficiency: float, gamma: int) -> float:
        """[`~spec_kd.acceptance.predict_speedup`] at these costs."""
        return predict_speedup(block_efficiency, gamma, self.cost_ratio, self.verify(gamma), self.round_overhead)

    def find_break_even_alpha(self, max_gamma: int | None = None) -> float:
        """The acceptance of a drafted token from which on some gamma is faster than plain decoding.

        For tokens accepted independently with equal probability; NaN if even a perfect draft is no faster.
        """
        gammas = range(1, min(max_gamma or self.max_gamma, self.max_gamma) + 1)

        def is_faster(alpha: float) -> bool:
            return any(self.predict_speedup(expect_block_efficiency(alpha, g), g) > 1.0 for g in gammas)

        if not is_faster(1.0):
            return float("nan")
        low, high = 0.0, 1.0
        while high - low > 1e-4:
            middle = (low + high) / 2
            low, high = (low, middle) if is_faster(middle) else (middle, high)
        return high


def measure_costs(
    draft: PreTrainedModel,
    target: PreTrainedModel,
    *,
    batch_sizes: Sequence[int] = (1,),
    gammas: Sequence[int] = DEFAULT_GAMMAS,
    context_length: int = DEFAULT_CONTEXT,
    repeats: int = 7,
) -> list[ServingCosts]:
    """Times passes of both models over a KV cache on this machine: medians of repeats that take turns.

    Args:
        draft (`PreTrainedModel` or `PeftModel`): The draft.
        target (`PreTrainedModel` or `PeftModel`): The target.
        batch_sizes (`Sequence[int]`): One result for each.
        gammas (`Sequence[int]`): Numbers of drafted tokens whose verification is timed.
        context_length (`int`): Tokens in the cache before the pass.
        repeats (`int`): Timed passes of each kind, after one that does not count.

    Raises:
        ValueError: For an option below 1, or a context that is too long for a model.
    """
    check_ints("batch_sizes", batch_sizes)
    check_ints("gammas", gammas)
    check_int("context_length", context_length)
    check_int("repeats", repeats)
    draft, target = find_causal_lm(draft, "draft"), find_causal_lm(target, "target")
    for role, model in (("draft", draft), ("target", target)):
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and context_length + max(gammas) + 1 > limit:
            raise ValueError(
                f"`context_length={context_length}` and {max(gammas) + 1} tokens do not fit the {role}'s {limit} "
                "positions. Lower it."
            )
    costs = []
    with evaluation_mode(draft, target):
        for batch_size in batch_sizes:
            passes = {("draft", 1): _Pass(draft, batch_size, context_length, 1)}
            for count in (1, *(gamma + 1 for gamma in gammas)):
                passes["target", count] = _Pass(target, batch_size, context_length, count)
            seconds: dict[tuple[str, int], list[float]] = {key: [] for key in passes}
            for repeat in range(repeats + 1):
                for key, timed in passes.items():
                    elapsed = timed.time()
                    if repeat:
                        seconds[key].append(elapsed)
            median = {key: statistics.median(values) for key, values in seconds.items()}
            step = median["target", 1]
            costs.append(
                ServingCosts(
                    cost_ratio=median["draft", 1] / step,
                    verify_cost={gamma: median["target", gamma + 1] / step for gamma in gammas},
                    batch_size=batch_size,
                    target_step_seconds=step,
                    source=f"bare passes of both models behind {context_length} tokens, on this machine",
                )
            )
    return costs


class _Pass:
    """A pass over `count` new tokens behind a cached context; each reads a copy of the cache, made before it is timed.

    A copy and not a cut: windows have dropped what they would need, and a recurrent state cannot be taken back.
    """

    def __init__(self, model: PreTrainedModel, batch_size: int, context_length: int, count: int):
        device = find_input_device(model)
        rows = count_rows(model.get_input_embeddings())
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, rows, (batch_size, context_length + count), generator=generator).to(device)
        inputs = {"input_ids": ids}
        parameters = signature(model.forward).parameters
        if "position_ids" in parameters:  # M-RoPE would ask the cache, which is not its own
            inputs["position_ids"] = torch.arange(context_length + count, device=device).expand_as(ids)
        context: JsonObject = {name: values[:, :context_length] for name, values in inputs.items()}
        if "logits_to_keep" in parameters:
            context["logits_to_keep"] = 1
        self.model = model
        self.inputs = {name: values[:, context_length:] for name, values in inputs.items()}  # (B, count)
        self.cache = getattr(model(**context, use_cache=True), "past_key_values", None)
        if self.cache is None:
            raise MeasurementError(f"{type(model).__name__} does not hand out a cache to time a single pass behind.")

    def time(self) -> float:
        cache = copy.deepcopy(self.cache)
        device = self.inputs["input_ids"].device
        synchronize(device)
        started = time.perf_counter()
        self.model(**self.inputs, past_key_values=cache, use_cache=True)
        synchronize(device)
        return time.perf_counter() - started


@dataclass(frozen=True, kw_only=True)
class PrefillCost:
    """Seconds until a prompt is read: a fixed part, and one for each of its tokens.

    Args:
        fixed (`float`): Seconds of any call; below zero where long prompts cost more than in proportion.
        per_token (`float`): Seconds per prompt token.
    """

    fixed: float
    per_token: float

    @classmethod
    def fit(cls, prompt_tokens: Array, seconds: Array) -> "PrefillCost":
        """Least squares over prompts `(P,)`; of a single length, all but in proportion to it."""
        tokens = np.stack([np.ones(len(prompt_tokens)), prompt_tokens], axis=1)  # (P, 2)
        fixed, per_token = np.linalg.lstsq(tokens, seconds, rcond=None)[0]
        return cls(fixed=float(fixed), per_token=float(per_token))

    def predict(self, prompt_tokens: Array) -> Array:
        """Seconds for prompts of these lengths `(P,)`."""
        return np.maximum(self.fixed + self.per_token * prompt_tokens, 0.0)


@dataclass(frozen=True, kw_only=True)
class AssistedCosts:
    """Costs inside transformers' assisted generation, with what reading a prompt costs there.

    Args:
        costs (`ServingCosts`): Of a round, at batch size 1.
        plain_prefill (`PrefillCost`): Of plain generation, until its first token, the step of that taken off.
        assisted_prefill (`PrefillCost`): The same of assisted generation, its first round taken off.
        figures (`list[AssistedMetrics]`): The runs it was measured in, one for each gamma.
    """

    costs: ServingCosts
    plain_prefill: PrefillCost
    assisted_prefill: PrefillCost
    figures: list[AssistedMetrics] = field(repr=False)

    def predict_speedup(self, prompt_tokens: Array, tokens: Array, target_calls: Array, gamma: int):
        """Speed-up of whole requests, prompts included: seconds without the draft over seconds with it.

        Args:
            prompt_tokens (`np.ndarray`): Tokens of each prompt `(P,)`.
            tokens (`np.ndarray`): Tokens written to each `(P,)`.
            target_calls (`np.ndarray`): Rounds that take, replayed or measured `(P,)`.
            gamma (`int`): Tokens drafted in a round.
        """
        step = self.costs.target_step_seconds
        round_seconds = step / self.costs.predict_speedup(1.0, gamma)
        plain = self.plain_prefill.predict(prompt_tokens).sum() + step * tokens.sum()
        return plain / (self.assisted_prefill.predict(prompt_tokens).sum() + round_seconds * target_calls.sum())


def measure_assisted_costs(
    draft: PreTrainedModel,
    target: PreTrainedModel,
    prompt_ids: Sequence[Sequence[int]],
    *,
    gammas: Sequence[int] = (2, 5, 12),
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    vocab_size: int | None = None,
    eos_token_id: int | list[int] | None = None,
    seed: int = 0,
) -> AssistedCosts:
    """Times rounds of `target.generate(assistant_model=draft)` on a few prompts, at several gammas.

    A round's time does not depend on how much of it is accepted, so a handful of prompts tells it, of various lengths
    as those that are predicted. Each answer's rounds are compared with the steps of the same answer written without the
    draft, and the median counts: a machine that others use as well is now fast and now slow. At these gammas the costs
    add up to what was measured; between them they are interpolated. Of a round, bare passes tell what
    verification costs, and a line through the rest tells a draft step (with what `generate` adds to one) from an
    overhead per round; what is off that line counts as verification. A single drafted token is cheaper than the line
    says, so it tells little of others.

    Args:
        draft, target: The models.
        prompt_ids (`Sequence[Sequence[int]]`): Prompts to time on: others than those a prediction is compared on.
        gammas (`Sequence[int]`): Two or more numbers of drafted tokens; the range in which predictions hold.
        max_new_tokens, temperature, top_k, top_p, vocab_size, eos_token_id, seed: As for [`generate_assisted`].

    Raises:
        ValueError: For fewer than two gammas, texts too short to time, and as [`generate_assisted`].
        MeasurementError: If the times contradict each other.
    """
    if len(set(gammas)) < 2:
        raise ValueError(f"`gammas` is {tuple(gammas)}: two or more are needed to tell a draft step from the overhead.")
    draft, target = find_causal_lm(draft, "draft"), find_causal_lm(target, "target")
    vocab_size = resolve_vocab_size(vocab_size, draft, target)
    figures = [
        generate_assisted(
            target, draft, prompt_ids, num_assistant_tokens=gamma, max_new_tokens=max_new_tokens,
            temperature=temperature, top_k=top_k, top_p=top_p, vocab_size=vocab_size, eos_token_id=eos_token_id,
            seed=seed, measure_speed=True,
        )
        for gamma in gammas
    ]  # fmt: skip
    paces = [_measure_paces(run) for run in figures]
    step = float(np.nanmedian([steps for steps, _ in paces]))
    round_steps = np.array([np.nanmedian(rounds / steps) for steps, rounds in paces])
    context = int(np.mean([len(ids) for ids in prompt_ids]) + max_new_tokens / 2)
    limit = min(getattr(m.config.get_text_config(), "max_position_embeddings", None) or 2**30 for m in (draft, target))
    bare = measure_costs(draft, target, gammas=gammas, context_length=min(context, limit - max(gammas) - 1))[0]
    # A pass inside `generate` costs more than a bare one, by the same amount for any number of tokens
    verify = {g: 1.0 + (v - 1.0) * bare.target_step_seconds / step for g, v in bare.verify_cost.items()}
    rest = round_steps - np.array([verify[g] for g in gammas])
    slope, intercept = np.polyfit(np.array(gammas, dtype=float), rest, 1)
    if intercept < 0:  # no overhead: all of the rest is draft steps
        slope, intercept = float((rest / np.array(gammas)).mean()), 0.0
    slope = max(0.0, float(slope))
    verify = {g: float(total - slope * g - intercept) for g, total in zip(gammas, round_steps, strict=True)}
    lengths = np.array([len(ids) for ids in prompt_ids] * len(figures))
    if slope < 0 or min(verify.values()) <= 0 or not np.isfinite([step, slope, intercept, *verify.values()]).all():
        raise MeasurementError(
            "the measured rounds contradict each other (a pass over more tokens would cost "
            f"{min(verify.values()):.3g} steps of the target), as on a busy machine. Repeat it "
            "when it is idle, with more prompts or longer answers."
        )
    return AssistedCosts(
        costs=ServingCosts(
            cost_ratio=slope,
            verify_cost=verify,
            round_overhead=float(intercept),
            target_step_seconds=step,
            source=f"rounds of assisted generation on {len(prompt_ids)} prompts, on this machine",
        ),
        plain_prefill=PrefillCost.fit(lengths, np.concatenate([f.plain_first_seconds for f in figures]) - step),
        assisted_prefill=PrefillCost.fit(
            lengths,
            np.concatenate([f.assisted_first_seconds - n * step for f, n in zip(figures, round_steps, strict=True)]),
        ),
        figures=figures,
    )


def _measure_paces(run: AssistedMetrics) -> tuple[Array, Array]:
    """Seconds per plain step and per round behind the first one of each answer `(P,)`, NaN where it ends there."""
    is_timed = (run.plain_tokens > 1) & (run.target_calls > 1)
    if not is_timed.any():
        raise ValueError(
            "The target's answers are over within one round, so nothing can be timed. Raise `max_new_tokens`, or pass "
            "prompts with longer answers."
        )
    steps, rounds = (np.where(is_timed, count - 1, np.nan) for count in (run.plain_tokens, run.target_calls))
    return (
        (run.plain_seconds - run.plain_first_seconds) / steps,
        (run.assisted_seconds - run.assisted_first_seconds) / rounds,
    )
