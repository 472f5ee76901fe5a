"""What a round of speculative decoding costs, so that acceptance becomes a speed-up.

Costs are measured in three ways: as bare passes of the models, which are the costs of an engine without overhead;
inside transformers' assisted generation (`assisted_costs.py`); and in llama-server (`server_costs.py`).
"""

import copy
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from typing import cast

import numpy as np
import torch
from transformers import PreTrainedModel

from spec_kd.acceptance import (
    check_num_assistant_tokens,
    compute_round_cost,
    expect_block_efficiency,
    predict_speedup,
)
from spec_kd.heads import count_rows, evaluation_mode, find_input_device
from spec_kd.open_types import Arguments, Array
from spec_kd.options import check_int, check_ints, check_number, refuse
from spec_kd.parallel import read_parallel_drafting
from spec_kd.sampling.prompts import find_causal_lm, get_max_length

DEFAULT_GAMMAS = (1, 2, 4, 8, 16)
DEFAULT_CONTEXT = 256


class MeasurementError(RuntimeError):
    """A measurement makes no sense, or these models cannot be measured. No argument is wrong."""


@dataclass(frozen=True, kw_only=True)
class ServingCosts:
    """Costs of a round of speculative decoding, in steps of the target (a pass over one new token).

    They are given as parts, `cost_ratio` and `verify_cost`, or as whole rounds, `round_cost`.

    Args:
        cost_ratio (`float`, *optional*):
            c, the time of a draft step over that of a target step. With `round_cost` it says which part of a round is
            drafting, where that is known.
        verify_cost (`Mapping[int, float]`, *optional*):
            v by gamma: the time of a target pass over gamma + 1 tokens over that of a pass over one token. It is
            interpolated between the gammas given; v(0) = 1.
        round_overhead (`float`, *optional*, defaults to `0.0`): Other costs of a round in this engine.
        batch_size (`int`, *optional*, defaults to `1`): Number of sequences at a time.
        target_step_seconds (`float`, *optional*): Seconds of a target step, where it was measured.
        source (`str`, *optional*, defaults to `"given"`): Origin of the numbers, for the report.
        round_cost (`Mapping[int, float]`, *optional*):
            The time of a whole round by gamma, over that of a step of plain decoding. It is interpolated between the
            gammas given, and from 1 at gamma 0.
        round_cost_range (`Mapping[int, Sequence[float]]`, *optional*):
            Lowest and highest single measurement of `round_cost`, where it was measured.
        draft_cost (`Mapping[int, float]`, *optional*):
            For a parallel draft, in place of `cost_ratio`: the time of the one pass that drafts gamma tokens, by gamma,
            over that of a target step. It is interpolated as `verify_cost`, from the lowest gamma given on.

    Raises:
        ValueError: If a cost is negative or not finite, or not given in exactly one of the two ways.
    """

    cost_ratio: float | None = None
    verify_cost: Mapping[int, float] | None = None
    round_overhead: float = 0.0
    batch_size: int = 1
    target_step_seconds: float | None = None
    source: str = "given"
    round_cost: Mapping[int, float] | None = None
    round_cost_range: Mapping[int, Sequence[float]] | None = None
    draft_cost: Mapping[int, float] | None = None

    def __post_init__(self) -> None:
        name = "verify_cost" if self.round_cost is None else "round_cost"
        refuse(
            (
                self.round_cost is not None and (self.verify_cost is not None or self.round_overhead),
                "`round_cost` is the whole round. Leave `verify_cost` and `round_overhead` out.",
            ),
            (
                not isinstance(self._by_gamma, Mapping) or not self._by_gamma,
                f"`{name}` is {self._by_gamma!r}, but must give a positive cost for some gammas >= 1, such as "
                + ("{5: 1.1}: a target pass over 6 tokens" if self.round_cost is None else "{5: 1.6}: a round")
                + " in steps of the target.",
            ),
            (
                self.draft_cost is not None and (self.cost_ratio is not None or self.round_cost is not None),
                "`draft_cost` is the one pass of a parallel draft. Leave `cost_ratio` and `round_cost` out.",
            ),
        )
        for gamma, cost in self._by_gamma.items():
            check_int(f"{name} (gamma)", gamma)
            check_number(f"{name}[{gamma}]", cost, above=0)
        for gamma, cost in (self.draft_cost or {}).items():
            check_int("draft_cost (gamma)", gamma)
            check_number(f"draft_cost[{gamma}]", cost, 0)
        is_priced = self.round_cost is not None or bool(self.draft_cost)
        check_number("cost_ratio", self.cost_ratio, 0, is_optional=is_priced)
        check_number("round_overhead", self.round_overhead, 0)
        check_int("batch_size", self.batch_size)
        check_number("target_step_seconds", self.target_step_seconds, above=0, is_optional=True)
        for gamma, bounds in (self.round_cost_range or {}).items():
            check_int("round_cost_range (gamma)", gamma)
            for bound in bounds:
                check_number(f"round_cost_range[{gamma}]", bound, above=0)

    @property
    def _by_gamma(self) -> Mapping[int, float]:
        return cast(Mapping[int, float], self.verify_cost if self.round_cost is None else self.round_cost)

    @property
    def max_gamma(self) -> int:
        """The highest gamma whose cost is known."""
        return max(self._by_gamma)

    def _interpolate(self, gamma: int) -> float:
        check_num_assistant_tokens(gamma)
        if gamma > self.max_gamma:
            raise ValueError(
                f"The cost of verifying {gamma} drafted tokens is not known, only up to {self.max_gamma}. Measure or "
                "give it."
            )
        return _read_between({0: 1.0, **self._by_gamma}, gamma)

    def draft(self, gamma: int) -> float:
        """Cost of drafting gamma tokens, in steps of the target; 0 of whole rounds, which have it."""
        if self.draft_cost is not None:
            return _read_between(self.draft_cost, gamma)
        return gamma * (self.cost_ratio or 0.0) if self.round_cost is None else 0.0

    def for_parallel_draft(self) -> "ServingCosts":
        """The costs of a parallel draft: where its pass was not measured, it is taken for one step of the draft.

        Whole rounds of which the draft's part is not known stay as they are.
        """
        if self.cost_ratio is None:
            return self
        return replace(
            self,
            cost_ratio=None,
            round_cost=None,
            round_cost_range=None,
            verify_cost={gamma: cast(float, self.verify(gamma)) for gamma in self._by_gamma},
            draft_cost={1: self.cost_ratio},
            source=f"{self.source}; the pass of a parallel draft is taken for one step",
        )

    def verify(self, gamma: int) -> float | None:
        """v(gamma), interpolated; of whole rounds what the draft's steps leave, or `None` if these are not known.

        Raises:
            ValueError: `gamma` is above the highest known one.
        """
        if self.round_cost is None:
            return self._interpolate(gamma)
        return None if self.cost_ratio is None else self._interpolate(gamma) - gamma * self.cost_ratio

    def price_round(self, num_drafted: int, num_draft_steps: int) -> float:
        """[`~spec_kd.acceptance.compute_round_cost`] at these costs; the target verifies 0 tokens by a plain step.

        Where whole rounds were measured and `cost_ratio` is not known, a draft step without a drafted token costs no
        more than one with it.

        Args:
            num_drafted (`int`): Tokens that are verified.
            num_draft_steps (`int`): Passes of the draft; a parallel draft makes one for all tokens.
        """
        if self.round_cost is not None and self.cost_ratio is None:
            return self._interpolate(num_draft_steps) if num_draft_steps else 1.0
        verify_cost = cast(float, self.verify(num_drafted)) if num_drafted else 1.0
        if self.draft_cost is not None:
            drafting = self.draft(num_drafted) if num_drafted else 0.0
            return compute_round_cost(1, drafting, verify_cost, self.round_overhead)
        return compute_round_cost(num_draft_steps, self.cost_ratio or 0.0, verify_cost, self.round_overhead)

    def predict_speedup(self, block_efficiency: float, gamma: int) -> float:
        """[`~spec_kd.acceptance.predict_speedup`] at these costs."""
        # A whole round is a verification to which nothing is added, and a parallel draft makes one step of its own cost
        cost_ratio, verify_cost = self.draft(gamma) / gamma, self._interpolate(gamma)
        return predict_speedup(block_efficiency, gamma, cost_ratio, verify_cost, self.round_overhead)

    def find_round_cost(self, gamma: int) -> float:
        """Time of a whole round over that of a step of plain decoding, interpolated.

        Raises:
            ValueError: `gamma` is above the highest known one.
        """
        return 1 / self.predict_speedup(1.0, gamma)

    def price_rounds(self, drafted: Array, target_calls: Array, gamma: int) -> Array:
        """Cost of the average round of each completion, between that of a plain step and that of a whole round.

        The last rounds of a completion draft what its limit leaves, and cost less; replay knows how many that are.

        Args:
            drafted (`np.ndarray`): Drafted tokens `(P,)`.
            target_calls (`np.ndarray`): Target passes `(P,)`, at least one each.
            gamma (`int`): Tokens drafted in a whole round.
        """
        return np.interp(drafted / target_calls, [0, gamma], [1, self.find_round_cost(gamma)])

    def predict_best_speedup(self, alpha: float, max_gamma: int | None = None) -> tuple[float, int]:
        """The highest speed-up over gamma where every token is accepted with probability alpha, and its gamma.

        It holds for tokens that are accepted independently with equal probability (arXiv 2211.17192, eq. 1).

        Args:
            alpha (`float`): Acceptance of a drafted token.
            max_gamma (`int`, *optional*): Highest gamma to consider; the highest with a known cost by default.
        """
        gammas = range(1, min(max_gamma or self.max_gamma, self.max_gamma) + 1)
        speedups = {g: self.predict_speedup(expect_block_efficiency(alpha, g), g) for g in gammas}
        best = max(speedups, key=speedups.__getitem__)
        return speedups[best], best

    def find_needed_alpha(self, speedup: float, max_gamma: int | None = None) -> float:
        """The lowest acceptance of a drafted token at which some gamma is faster than `speedup` times plain decoding.

        Args:
            speedup (`float`): Speed-up to reach; 1.0 is break-even.
            max_gamma (`int`, *optional*): As for [`predict_best_speedup`], whose assumption it shares.

        Returns:
            `float`, or NaN if even a perfect draft is no faster.
        """
        low, high = 0.0, 1.0
        if not self.predict_best_speedup(high, max_gamma)[0] > speedup:
            return float("nan")
        while high - low > 1e-4:
            middle = (low + high) / 2
            is_faster = self.predict_best_speedup(middle, max_gamma)[0] > speedup
            low, high = (low, middle) if is_faster else (middle, high)
        return high

    def find_break_even_alpha(self, max_gamma: int | None = None) -> float:
        """[`find_needed_alpha`] for a speed-up of 1: from there on a draft pays."""
        return self.find_needed_alpha(1.0, max_gamma)


def _read_between(known: Mapping[int, float], gamma: int) -> float:
    """A cost between those of known gammas."""
    gammas = sorted(known)
    return float(np.interp(gamma, gammas, [known[g] for g in gammas]))


def measure_costs(
    draft: PreTrainedModel,
    target: PreTrainedModel,
    *,
    batch_sizes: Sequence[int] = (1,),
    gammas: Sequence[int] = DEFAULT_GAMMAS,
    context_length: int = DEFAULT_CONTEXT,
    repeats: int = 7,
) -> list[ServingCosts]:
    """Times passes of both models over a KV cache on this machine.

    The passes take turns, and the median of the repeats counts, since the pace of a shared machine changes. The pass of
    a parallel draft reads 2 gamma ids: gamma + 1 tokens, as many as a round may have added, and gamma - 1 masks.

    Args:
        draft (`PreTrainedModel` or `PeftModel`): The draft, autoregressive or parallel.
        target (`PreTrainedModel` or `PeftModel`): The target.
        batch_sizes (`Sequence[int]`, *optional*, defaults to `(1,)`): Batch sizes; there is one result for each.
        gammas (`Sequence[int]`, *optional*, defaults to `(1, 2, 4, 8, 16)`):
            Numbers of drafted tokens whose verification is timed.
        context_length (`int`, *optional*, defaults to `256`): Number of tokens in the cache before the pass.
        repeats (`int`, *optional*, defaults to `7`): Timed passes of each kind, after one that does not count.

    Returns:
        `list[ServingCosts]`, one for each batch size.

    Raises:
        ValueError: If an option is below 1, or the context is too long for a model.
        MeasurementError: If a model returns no cache.
    """
    check_ints("batch_sizes", batch_sizes)
    check_ints("gammas", gammas)
    check_int("context_length", context_length)
    check_int("repeats", repeats)
    draft, target = find_causal_lm(draft, "draft"), find_causal_lm(target, "target")
    # Ids that a pass reads, by the number of tokens that it drafts
    is_parallel = read_parallel_drafting(draft.config) is not None
    draft_reads = {gamma: 2 * gamma for gamma in gammas} if is_parallel else {1: 1}
    for role, model in (("draft", draft), ("target", target)):
        limit = get_max_length(model)
        count = max(gammas) + 1 if role == "target" else max(max(gammas) + 1, *draft_reads.values())
        if limit is not None and context_length + count > limit:
            raise ValueError(
                f"`context_length={context_length}` and {count} tokens do not fit the {role}'s {limit} "
                "positions. Lower it."
            )
    costs = []
    with evaluation_mode(draft, target):
        for batch_size in batch_sizes:
            counts = (1, *(gamma + 1 for gamma in gammas))
            passes = {("target", count): _Pass(target, batch_size, context_length, count, count) for count in counts}
            for gamma, count in draft_reads.items():
                passes["draft", gamma] = _Pass(draft, batch_size, context_length, count, gamma)
            rounds = [{key: timed.time() for key, timed in passes.items()} for _ in range(repeats + 1)]
            median = {key: statistics.median(seconds[key] for seconds in rounds[1:]) for key in passes}
            step = median["target", 1]
            drafting = {gamma: median["draft", gamma] / step for gamma in draft_reads}
            costs.append(
                ServingCosts(
                    cost_ratio=None if is_parallel else drafting[1],
                    draft_cost=drafting if is_parallel else None,
                    verify_cost={gamma: median["target", gamma + 1] / step for gamma in gammas},
                    batch_size=batch_size,
                    target_step_seconds=step,
                    source=f"bare passes of both models after {context_length} tokens, on this machine",
                )
            )
    return costs


def fit_context(draft: PreTrainedModel, target: PreTrainedModel, wanted: int, max_gamma: int) -> int:
    """The context length wanted, or what the positions of both models leave before the verification at `max_gamma`."""
    limits = [limit for model in (draft, target) if (limit := get_max_length(model)) is not None]
    return max(1, min([wanted, *(limit - max_gamma - 1 for limit in limits)]))


class _Pass:
    """A pass over `count` new tokens after a cached context, with logits of the last `num_logits` of them.

    Each pass reads a copy of the cache, made before it is timed. Cutting the cache back would not do: sliding windows
    have dropped what they would need, and a recurrent state cannot be taken back.
    """

    def __init__(self, model: PreTrainedModel, batch_size: int, context_length: int, count: int, num_logits: int):
        device = find_input_device(model)
        rows = count_rows(model.get_input_embeddings())
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, rows, (batch_size, context_length + count), generator=generator).to(device)
        inputs = {"input_ids": ids}
        parameters = signature(model.forward).parameters
        if "position_ids" in parameters:  # M-RoPE would ask the cache, which is not its own
            inputs["position_ids"] = torch.arange(context_length + count, device=device).expand_as(ids)
        context = {name: values[:, :context_length] for name, values in inputs.items()}
        limit, own = ({"logits_to_keep": n} if "logits_to_keep" in parameters else {} for n in (1, num_logits))
        self.model = model
        self.inputs: Arguments = {
            name: values[:, context_length:] for name, values in inputs.items()
        } | own  # (B, count)
        self.cache = getattr(model(**context, **limit, use_cache=True), "past_key_values", None)
        if self.cache is None:
            raise MeasurementError(f"{type(model).__name__} returns no cache, so that a single pass cannot be timed.")

    def time(self) -> float:
        cache = copy.deepcopy(self.cache)
        device = self.inputs["input_ids"].device
        synchronize(device)
        started = time.perf_counter()
        self.model(**self.inputs, past_key_values=cache, use_cache=True)
        synchronize(device)
        return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    """Waits until an accelerator has done its work, which it does later than it is told: a clock needs this."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
