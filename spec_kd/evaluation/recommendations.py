"""What to set in the serving engine, from the scores of one replay and the costs of a round.

Every way of drafting is priced at every number of drafted tokens. The fastest one is recommended where it is clearly
faster than what the engine does by default.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from spec_kd.acceptance import Rounds, expect_rounds
from spec_kd.evaluation.cost import ServingCosts
from spec_kd.evaluation.metrics import AcceptanceMetrics, Interval, bootstrap, bootstrap_ratio
from spec_kd.evaluation.report.recommended import (
    ALONE,
    BLOCK,
    FIXED,
    PARALLEL,
    THRESHOLD,
    DraftingPlan,
    Recommendations,
)
from spec_kd.evaluation.response_replay import ResponseScores
from spec_kd.evaluation.token_scores import CONFIDENCE
from spec_kd.open_types import Argument, Arguments, Array
from spec_kd.pearl import expect_parallel_steps
from spec_kd.serving import ServingEngine
from spec_kd.serving.configuration import EngineConfiguration
from spec_kd.serving.engine import EarlyEnd

THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
WITHOUT_DRAFT: Arguments = {
    "method": ALONE,
    "num_assistant_tokens": 0,
    "threshold": 0.0,
    "block_efficiency": Interval(1.0, 1.0, 1.0),
    "drafted": (0.0, 0.0),
    "predicted_speedup": Interval(1.0, 1.0, 1.0),
    "highest_speedup": 1.0,
}
"""What a plan has that does not draft."""


@dataclass(frozen=True)
class Way:
    """One way of drafting at one number of drafted tokens, on P prompts.

    Args:
        method (`str`): One of `report.recommended.WORDS`.
        gamma (`int`): Most tokens of a draft.
        calls (`np.ndarray`): Target passes `(P,)`.
        known (`np.ndarray`): Rounds whose draft has n = 0..gamma tokens `(P, gamma + 1)`.
        at_least (`np.ndarray`): Rounds of whose draft it is only known that it has n = 1..gamma or more `(P, gamma)`.
        threshold (`float`, *optional*, defaults to `0.0`): Probability below which a draft ends.
        keeps_token (`bool`, *optional*, defaults to `True`): As in [`~spec_kd.serving.engine.EarlyEnd`].
        first_steps (`np.ndarray`, *optional*): Passes that verify one token while the draft writes, of PEARL `(P,)`.
    """

    method: str
    gamma: int
    calls: Array
    known: Array
    at_least: Array
    threshold: float = 0.0
    keeps_token: bool = True
    first_steps: Array | None = None

    @classmethod
    def of_rounds(cls, method: str, gamma: int, rounds: Rounds, **facts: Argument) -> "Way":
        """The way whose rounds were replayed."""
        return cls(
            method, gamma, rounds.target_calls.numpy(), rounds.known_drafts.numpy(), rounds.open_drafts.numpy(), **facts
        )

    def count_drafted(self) -> tuple[float, float]:
        """Least and most drafted tokens of a round, on average."""
        numbers = np.arange(self.gamma + 1)
        known, rounds = (self.known @ numbers).sum(), self.calls.sum()
        return (known + (self.at_least @ numbers[1:]).sum()) / rounds, (
            known + self.gamma * self.at_least.sum()
        ) / rounds

    def price(self, cost: ServingCosts) -> tuple[Array, Array]:
        """Least and most cost of each prompt, in steps of the target, `(P,)` each.

        A draft that stops at a token that it does not keep has taken a step for it. While the target verifies, a round
        takes the longer one of the two.

        Raises:
            ValueError: If the draft writes while the target verifies, and whole rounds were measured.
        """
        if self.first_steps is not None:
            if cost.cost_ratio is None:
                raise ValueError("Of whole rounds it is not known what drafting costs. Measure `cost_ratio`.")
            writing = self.gamma * cost.cost_ratio
            first, later = (max(writing, cost.price_round(n, 0) - cost.round_overhead) for n in (0, self.gamma - 1))
            total = self.first_steps * first + (self.calls - self.first_steps) * later
            return (total + self.calls * cost.round_overhead,) * 2
        steps = [n if self.keeps_token else min(n + 1, self.gamma) for n in range(self.gamma + 1)]
        highest = np.array([cost.price_round(n, count) for n, count in enumerate(steps)])
        # Of whole rounds alone it is not known what the step for a token that is not kept costs
        is_known = cost.cost_ratio is not None
        lowest = highest if is_known else np.array([cost.price_round(n, n) for n in range(len(steps))])
        least = np.minimum.accumulate(lowest[::-1])[::-1][1:]  # (gamma,): the cheapest of n tokens or more
        most = np.maximum.accumulate(highest[::-1])[::-1][1:]
        return self.known @ lowest + self.at_least @ least, self.known @ highest + self.at_least @ most


@dataclass(frozen=True)
class Candidate:
    """A plan, with the tokens of each prompt and the most that they can cost, `(P,)` each."""

    plan: DraftingPlan
    tokens: Array
    cost: Array


def list_ways(
    scores: ResponseScores, by_gamma: Mapping[int, AcceptanceMetrics], engine: ServingEngine, max_new_tokens: int
) -> list[Way]:
    """Every way of drafting that the scores tell of, at every number of drafted tokens.

    Args:
        scores (`ResponseScores`): Scores of the draft on the responses.
        by_gamma (`Mapping[int, AcceptanceMetrics]`): Their replay, by number of drafted tokens.
        engine (`ServingEngine`): Engine that will serve the draft.
        max_new_tokens (`int`): Limit that the responses were written under.
    """
    ways = []
    for gamma, metrics in by_gamma.items():
        calls, nothing = metrics.target_calls, np.zeros((len(metrics.tokens), gamma))
        ways.append(Way(FIXED, gamma, calls, np.column_stack([nothing, calls]), nothing))
        if not scores.is_parallel:
            first, later = expect_parallel_steps(scores.acceptance, gamma, scores.lengths, scores.counting.first_round)
            calls, whole = (first + later).numpy(), np.column_stack([nothing, (first + later).numpy()])
            ways.append(Way(PARALLEL, gamma, calls, whole, nothing, first_steps=first.numpy()))
        if engine.block_flags and scores.draft_sampling == "stochastic" and "log_ratio" in scores.values:
            rounds = expect_rounds(
                scores.read_drafted("acceptance"),
                gamma,
                max_new_tokens,
                scores.lengths,
                scores.counting,
                block_log_ratio=scores.read_drafted("log_ratio"),
            )
            ways.append(Way.of_rounds(BLOCK, gamma, rounds))
        if engine.early_end is not None and CONFIDENCE in scores.values and not scores.is_parallel:
            ways += list_thresholds(scores, gamma, engine.early_end, max_new_tokens)
    return ways


def list_thresholds(
    scores: ResponseScores,
    gamma: int,
    early_end: EarlyEnd,
    max_new_tokens: int,
    thresholds: Sequence[float] = THRESHOLDS,
) -> list[Way]:
    """Drafts that end where the draft is not sure, at several thresholds."""
    count = len(thresholds)
    rounds = expect_rounds(  # all thresholds at once: their texts stand below each other
        scores.acceptance.repeat(count, 1),
        gamma,
        max_new_tokens,
        scores.lengths.repeat(count),
        scores.counting,
        early_ends=scores.end_drafts(thresholds, early_end),
    )
    whole = Way.of_rounds(THRESHOLD, gamma, rounds, keeps_token=early_end.keeps_token)
    parts = (np.split(values, count) for values in (whole.calls, whole.known, whole.at_least))
    return [
        replace(whole, calls=calls, known=known, at_least=at_least, threshold=threshold)
        for threshold, calls, known, at_least in zip(thresholds, *parts, strict=True)
    ]


def find_candidates(
    name: str, scores: ResponseScores, ways: Sequence[Way], tokens: Array, costs: Sequence[ServingCosts]
) -> list[Candidate]:
    """The fastest of each way of drafting, at each batch size.

    Thresholds are priced at batch size 1 only: in a batch all sequences wait for the longest draft.

    Args:
        name (`str`): Name of the setting.
        scores (`ResponseScores`): Scores of the draft on the responses.
        ways (`Sequence[Way]`): The ways to choose from.
        tokens (`np.ndarray`): Emitted tokens of each prompt `(P,)`.
        costs (`Sequence[ServingCosts]`): Known costs, each up to its highest gamma.
    """
    candidates = []
    for cost in costs:
        for method in dict.fromkeys(way.method for way in ways):
            known = [way for way in ways if way.method == method and way.gamma <= cost.max_gamma]
            is_unpriced = method == PARALLEL and cost.cost_ratio is None
            if not known or is_unpriced or (method == THRESHOLD and cost.batch_size > 1):
                continue
            # By the most that a way can cost, so that what is recommended does not rest on what is not known
            best, (least, most) = min(((way, way.price(cost)) for way in known), key=lambda pair: pair[1][1].sum())
            plan = DraftingPlan(
                setting=name,
                temperature=scores.temperature,
                batch_size=cost.batch_size,
                draft_sampling=scores.draft_sampling,
                method=method,
                num_assistant_tokens=best.gamma,
                threshold=best.threshold,
                block_efficiency=bootstrap_ratio(tokens, best.calls),
                drafted=best.count_drafted(),
                predicted_speedup=bootstrap_ratio(tokens, most),
                highest_speedup=float(tokens.sum() / least.sum()),
            )
            candidates.append(Candidate(plan, tokens, most))
    return candidates


def recommend(
    candidates: Sequence[Candidate],
    engine: ServingEngine,
    draft_name: str,
    target_name: str,
    is_parallel: bool = False,
) -> Recommendations | None:
    """Chooses a plan for each temperature and batch size, and writes what the engine needs for it.

    The engine's default rule with a fixed number of tokens is kept unless another plan that the engine can run is
    faster by a paired interval that excludes 0. Where even the chosen plan is slower than plain decoding, none is.

    Args:
        candidates (`Sequence[Candidate]`): Candidates of all settings of one draft.
        engine (`ServingEngine`): Engine that will serve it.
        draft_name (`str`), target_name (`str`): Folders or Hub ids, for the command.
        is_parallel (`bool`, *optional*, defaults to `False`): Whether the draft drafts a round in one pass.

    Returns:
        [`Recommendations`], or `None` without candidates, or for a parallel draft that the engine does not take.
    """
    write_command = engine.find_writer(is_parallel)
    if write_command is None:
        return None
    groups: dict[tuple[float, int], list[Candidate]] = {}
    for one in candidates:
        groups.setdefault((one.plan.temperature, one.plan.batch_size), []).append(one)
    plans: list[DraftingPlan] = []
    for group in groups.values():
        best = choose(group, engine)
        is_faster = best is not None and best.plan.predicted_speedup.value > 1
        plans += [replace(one.plan, is_recommended=is_faster and one is best) for one in group]
        if best is not None and not is_faster:
            plans.append(replace(best.plan, is_recommended=True, **WITHOUT_DRAFT))
    if not plans:
        return None
    configurations = [
        EngineConfiguration(
            title="; ".join(titles),
            serving_engine=engine.name,
            num_assistant_tokens=gamma,
            flags=list(flags),
            command=write_command(draft_name, target_name, gamma, flags),
            language=engine.command_language,
        )
        for (gamma, flags), titles in collect_settings([plan for plan in plans if plan.is_recommended], engine).items()
    ]
    return Recommendations(plans=plans, configurations=configurations, notes=list(list_notes(plans, engine)))


def choose(group: Sequence[Candidate], engine: ServingEngine) -> Candidate | None:
    """The plan to use among those of one temperature and batch size; `None` if the engine has none of their rules."""
    runnable = [
        one
        for one in group
        if one.plan.method != PARALLEL
        and (one.plan.temperature == 0 or engine.find_rule(one.plan.draft_sampling) is not None)
    ]
    if not runnable:
        return None
    best, *others = sorted(
        runnable, key=lambda one: (one.plan.method != FIXED, one.plan.draft_sampling != engine.draft_sampling)
    )
    for other in others:
        gain = bootstrap(lambda n, c, m, d: n / c - m / d, other.tokens, other.cost, best.tokens, best.cost)
        if gain.low > 0:
            best = other
    return best


def list_flags(plan: DraftingPlan, engine: ServingEngine) -> tuple[str, ...]:
    """The settings of the engine for a plan, beside the number of drafted tokens."""
    rule = engine.find_rule(plan.draft_sampling) if plan.temperature > 0 else None  # greedy decoding has one rule
    flags = [
        "" if rule is None else rule.flags,
        *engine.list_threshold_flags(plan.threshold),
        engine.block_flags if plan.method == BLOCK else "",
    ]
    return tuple(filter(None, flags))


def collect_settings(
    plans: Sequence[DraftingPlan], engine: ServingEngine
) -> dict[tuple[int, tuple[str, ...]], list[str]]:
    """What the plans are for, by their numbers of drafted tokens and their settings.

    Plans of one temperature are one configuration where the engine takes a number for each batch size: a number holds
    from its batch size to the next one.
    """
    collected: dict[tuple[int, tuple[str, ...]], list[str]] = {}
    for temperature in dict.fromkeys(plan.temperature for plan in plans):
        mine = sorted((plan for plan in plans if plan.temperature == temperature), key=lambda plan: plan.batch_size)
        drafting = [plan for plan in mine if plan.method != ALONE]
        where = "greedy decoding" if temperature == 0 else f"temperature {temperature:g}"
        sizes, gammas = ([getattr(plan, name) for plan in mine] for name in ("batch_size", "num_assistant_tokens"))
        flags = {list_flags(plan, engine) for plan in drafting}
        if engine.batch_size_flags and len(flags) == 1 and len(set(gammas)) > 1:
            starts, ends = [1, *sizes[1:]], [*(size - 1 for size in sizes[1:]), sizes[-1]]
            ranges = json.dumps(list(map(list, zip(starts, ends, gammas, strict=True))))
            key = (max(gammas), (*flags.pop(), engine.batch_size_flags.format(ranges=ranges)))
            collected.setdefault(key, []).append(f"{where}, batch sizes {', '.join(map(str, sizes))}")
            continue
        for plan in drafting:
            key = (plan.num_assistant_tokens, list_flags(plan, engine))
            collected.setdefault(key, []).append(f"{where}, batch size {plan.batch_size}")
    return collected


def list_notes(plans: Sequence[DraftingPlan], engine: ServingEngine) -> Iterator[str]:
    """What a reader must know beside the plans."""
    methods, measured = ({getattr(plan, name) for plan in plans} for name in ("method", "draft_sampling"))
    if any(plan.temperature > 0 for plan in plans):
        for rule in engine.rules:
            if rule.sampling not in measured:
                yield (
                    f"{engine.title} has another rule too, which was not measured: {rule.words}. Add "
                    f"`{rule.sampling}` to `draft_samplings` to compare it."
                )
    if any(plan.method == ALONE for plan in plans):
        yield "Where no draft is recommended, every number of drafted tokens is predicted to be slower than none."
    if THRESHOLD in methods:
        yield (
            "A draft that ends early goes on unseen once a token is refused: its speed-up lies between the predicted "
            "one, which is the lowest, and the one under “at most”."
        )
    if any(plan.method == THRESHOLD and plan.is_recommended for plan in plans) and engine.early_end is not None:
        yield from filter(None, [engine.early_end.note])
    if PARALLEL in methods:
        yield (
            f"No setting makes {engine.title} draft while the target verifies. That row is what PEARL (arXiv "
            "2408.11850) would give on devices that do not slow each other down."
        )
