"""Replay and the predicted speed-up beside what really happens in assisted generation."""

from collections.abc import Sequence
from typing import cast

import numpy as np
from transformers import PreTrainedModel

from spec_kd.evaluation.assisted import generate_assisted
from spec_kd.evaluation.assisted_costs import measure_assisted_costs
from spec_kd.evaluation.cost_measurement import measure_or_say
from spec_kd.evaluation.metrics import AcceptanceMetrics
from spec_kd.evaluation.options import EvaluationOptions
from spec_kd.evaluation.report.content import AssistedReport
from spec_kd.evaluation.statistics import Interval, bootstrap_ratio
from spec_kd.open_types import Arguments

MAX_TIMED_PROMPTS = 6


def cross_check(
    draft: PreTrainedModel,
    target: PreTrainedModel,
    prompt_ids: Sequence[Sequence[int]],
    replayed: AcceptanceMetrics,
    options: EvaluationOptions,
    unmeasured: list[str],
    *,
    vocab_size: int,
    eos_token_id: int | list[int],
) -> AssistedReport:
    """Runs real assisted generation on the first prompts and sets it beside their replay.

    Up to six prompts after them serve to time the rounds, so that a predicted speed-up is not fitted to the run it is
    compared with. Where there are none, nothing is predicted.

    Args:
        draft (`PreTrainedModel`), target (`PreTrainedModel`): The models.
        prompt_ids (`Sequence[Sequence[int]]`): Prompts of the replay, in its order.
        replayed (`AcceptanceMetrics`): Replay of the target's responses to them, at the gamma and temperature to check.
        options (`EvaluationOptions`): How many prompts to run, and how the target samples.
        unmeasured (`list[str]`): Sentences, one is added if the rounds cannot be timed; nothing is predicted then.
        vocab_size (`int`): Number of real ids.
        eos_token_id (`int` or `list[int]`): Ids that end a completion.
    """
    chosen = list(prompt_ids[: options.num_assisted_prompts])
    common: Arguments = {
        "max_new_tokens": options.max_new_tokens,
        "temperature": replayed.temperature,
        "top_k": options.top_k,
        "top_p": options.top_p,
        "vocab_size": vocab_size,
        "eos_token_id": eos_token_id,
        "seed": options.seed,
    }
    gamma = replayed.num_assistant_tokens
    measured = generate_assisted(target, draft, chosen, num_assistant_tokens=gamma, measure_speed=True, **common)
    rows = slice(0, len(chosen))
    predicted = None
    timed = list(prompt_ids[len(chosen) : len(chosen) + MAX_TIMED_PROMPTS])
    if timed:
        gammas = sorted({max(1, gamma // 2), gamma, 2 * gamma})

        def predict() -> float:
            costs = measure_assisted_costs(draft, target, timed, gammas=gammas, **common)
            lengths = np.array([len(ids) for ids in chosen])
            return float(costs.predict_speedup(lengths, replayed.tokens[rows], replayed.target_calls[rows], gamma))

        predicted = measure_or_say(
            "The costs of assisted generation, and the speed-up predicted of it,", predict, unmeasured
        )
    assisted, plain = cast(tuple[float, float], measured.tokens_per_second)
    return AssistedReport(
        prompts=len(chosen),
        num_assistant_tokens=gamma,
        block_efficiency=measured.block_efficiency,
        acceptance_rate=measured.acceptance_rate,
        speedup=cast(Interval, measured.speedup),
        tokens_per_second=assisted,
        plain_tokens_per_second=plain,
        replayed_block_efficiency=bootstrap_ratio(replayed.tokens[rows], replayed.target_calls[rows]),
        predicted_speedup=predicted,
    )
