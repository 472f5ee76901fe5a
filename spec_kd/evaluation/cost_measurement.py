"""The parts of an evaluation that are timed: what cannot be measured is left out of the report and said there."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from accelerate.logging import get_logger
from transformers import PreTrainedModel

from spec_kd.evaluation.cost import DEFAULT_CONTEXT, ServingCosts, measure_costs
from spec_kd.evaluation.report.content import CostReport

logger = get_logger(__name__)

MEASURE = "measure"

Costs = Sequence[ServingCosts] | str | None
Result = TypeVar("Result")


def measure_or_say(what: str, measure: Callable[[], Result], unmeasured: list[str]) -> Result | None:
    """The result of `measure`, or `None` and a sentence in `unmeasured` on why there is none.

    Whatever goes wrong: the target has answered by then, and its figures must not be lost to their timing.

    Args:
        what (`str`): The subject of the sentence.
        measure (`Callable`): Takes no argument.
        unmeasured (`list[str]`): Sentences, one is added where needed.
    """
    try:
        return measure()
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        sentence = f"{what} could not be measured: {reason}"
        logger.warning(sentence)
        unmeasured.append(sentence)
        return None


def find_costs(
    costs: Costs,
    draft: PreTrainedModel,
    target: PreTrainedModel | None,
    batch_sizes: Sequence[int],
    gammas: Sequence[int],
    unmeasured: list[str],
) -> list[ServingCosts]:
    """The costs given, or measured if there is a target here; none, and a sentence, where that fails."""
    if costs is None or (costs == MEASURE and target is None):
        return []
    if costs != MEASURE:
        return list(costs)
    chosen = sorted({1, *(g for g in (2, 4, 8) if g < max(gammas)), max(gammas)})
    limits = [getattr(m.config.get_text_config(), "max_position_embeddings", None) for m in (draft, target)]
    room = min((limit - max(gammas) - 1 for limit in limits if limit is not None), default=DEFAULT_CONTEXT)

    def measure() -> list[ServingCosts]:
        context = max(1, min(DEFAULT_CONTEXT, room))
        return measure_costs(draft, target, batch_sizes=batch_sizes, gammas=chosen, context_length=context)

    return measure_or_say("The costs of a round, and the speed-up that follows,", measure, unmeasured) or []


def describe_costs(costs: ServingCosts, gammas: Sequence[int]) -> CostReport:
    """What the report says of costs, for those of the gammas that they reach."""
    return CostReport(
        batch_size=costs.batch_size,
        cost_ratio=costs.cost_ratio,
        verify_cost={str(gamma): costs.verify(gamma) for gamma in gammas if gamma <= costs.max_gamma},
        round_overhead=costs.round_overhead,
        target_step_seconds=costs.target_step_seconds,
        source=costs.source,
    )
