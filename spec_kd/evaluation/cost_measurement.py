"""The parts of an evaluation that are timed: what cannot be measured is left out of the report and said there."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from accelerate.logging import get_logger
from transformers import PreTrainedModel

from spec_kd.evaluation.cost import DEFAULT_CONTEXT, ServingCosts, fit_context, measure_costs
from spec_kd.evaluation.options import EvaluationOptions
from spec_kd.evaluation.report.content import CostReport

logger = get_logger(__name__)

Result = TypeVar("Result")


def measure_or_say(what: str, measure: Callable[[], Result], unmeasured: list[str]) -> Result | None:
    """The result of `measure`, or `None` and a sentence in `unmeasured` on why there is none.

    Whatever goes wrong: the target's responses are there by then, and their metrics must not be lost to the timing.

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
    options: EvaluationOptions, draft: PreTrainedModel, target: PreTrainedModel | None, unmeasured: list[str]
) -> list[ServingCosts]:
    """The costs given, or measured if there is a target here; none, and a sentence, where that fails.

    Args:
        options (`EvaluationOptions`): `costs`, and the batch sizes and gammas to measure.
        draft (`PreTrainedModel`): The draft.
        target (`PreTrainedModel`, *optional*): The target.
        unmeasured (`list[str]`): Sentences, one is added if the measurement fails.
    """
    given = options.read_costs()
    if given is not None or target is None:
        return given or []
    most = max(options.all_gammas)
    chosen = sorted({1, *(g for g in (2, 4, 8) if g < most), most})
    context = fit_context(draft, target, DEFAULT_CONTEXT, most)

    def measure() -> list[ServingCosts]:
        return measure_costs(draft, target, batch_sizes=options.batch_sizes, gammas=chosen, context_length=context)

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
