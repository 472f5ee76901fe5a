"""What a round costs in a server itself, and how fast llama-server is at acceptance rates that are given."""

import itertools
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from spec_kd.evaluation.cost import ServingCosts
from spec_kd.evaluation.observation.records import Observation, ObservedRequest
from spec_kd.evaluation.server_options import DEFAULT_ROUND_GAMMAS, ServerTimingOptions
from spec_kd.evaluation.server_timing import time_settings
from spec_kd.open_types import Argument
from spec_kd.options import check_ints, refuse, resolve_options
from spec_kd.serving import find_serving_engine
from spec_kd.serving.engine import check_acceptance_rates


@dataclass(frozen=True, kw_only=True)
class SyntheticSpeed:
    """How fast llama-server is at given acceptance rates, beside the same server without a draft.

    Args:
        acceptance_rates (`list[float]`): Shares of the rounds in which drafted token k = 1, 2, ... was accepted.
        batch_size (`int`): Requests at a time.
        tokens_per_second (`float`): Tokens a second of one request, median of the repetitions.
        plain_tokens_per_second (`float`): The same without the draft.
        speedup (`float`): Median of the ratios of both, each within one repetition.
        speedup_range (`list[float]`): Lowest and highest of these ratios.
    """

    acceptance_rates: list[float]
    batch_size: int
    tokens_per_second: float
    plain_tokens_per_second: float
    speedup: float
    speedup_range: list[float]


def measure_server_costs(
    draft: str | os.PathLike[str],
    target: str | os.PathLike[str],
    options: ServerTimingOptions | None = None,
    *,
    gammas: Sequence[int] = DEFAULT_ROUND_GAMMAS,
    measure_draft_step: bool = False,
    output_dir: str | os.PathLike[str] | None = None,
    show_progress: bool = True,
    **given: Argument,
) -> list[ServingCosts]:
    """Times whole rounds of llama-server with a draft, against its plain steps.

    For each number of drafted tokens a server is started that accepts all of them, and one that accepts none. A round
    costs the mean of the two. All settings take turns, and the medians of the repetitions count, since the pace of a
    shared machine changes; `round_cost_range` has the lowest and the highest single measurement.

    Args:
        draft (`str` or `os.PathLike`): The draft's GGUF file.
        target (`str` or `os.PathLike`): The target's GGUF file.
        options (`ServerTimingOptions`, *optional*): How rounds are timed; its defaults by default.
        gammas (`Sequence[int]`, *optional*, defaults to `(1, 2, 4, 8)`): Numbers of drafted tokens.
        measure_draft_step (`bool`, *optional*, defaults to `False`):
            Whether the draft alone is timed too, in a server of its own, for `cost_ratio`: its plain steps over those
            of the target.
        output_dir (`str` or `os.PathLike`, *optional*):
            Folder for the timings, with which a killed run continues, and the server's logs. By default nothing is
            kept.
        show_progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.
        given: Fields of [`ServerTimingOptions`] as keywords, which replace those of `options`.

    Returns:
        `list[ServingCosts]`, one for each batch size, with `round_cost`.

    Raises:
        ValueError: If an option is out of its range, or this build of the server accepts nothing by chance.
        FileNotFoundError: If there is no such program or file.
        LlamaServerError: If the server does not start, or ends. The message has the end of its log.
        MeasurementError: If the times contradict each other, or rounds draft fewer tokens than they should.
    """
    options = resolve_options(ServerTimingOptions, options, given)
    check_ints("gammas", gammas)
    ends = {gamma: ((0.0,) * gamma, (1.0,) * gamma) for gamma in gammas}
    settings = [(), *([None] if measure_draft_step else []), *itertools.chain.from_iterable(ends.values())]
    seconds = time_settings(draft, target, settings, options, output_dir, show_progress)
    costs = []
    for size in options.batch_sizes:
        steps = seconds[(), size]
        ratios = {
            gamma: [[a / b for a, b in zip(seconds[rates, size], steps, strict=True)] for rates in both]
            for gamma, both in ends.items()
        }
        shares = [a / b for a, b in zip(seconds[None, size], steps, strict=True)] if measure_draft_step else []
        costs.append(
            ServingCosts(
                cost_ratio=statistics.median(shares) if shares else None,
                round_cost={gamma: statistics.mean(map(statistics.median, both)) for gamma, both in ratios.items()},
                round_cost_range={gamma: [min(map(min, both)), max(map(max, both))] for gamma, both in ratios.items()},
                batch_size=size,
                target_step_seconds=statistics.median(steps),
                source=f"rounds of llama-server after {options.context_length} tokens, with all and no tokens accepted",
            )
        )
    return costs


def measure_synthetic_speed(
    draft: str | os.PathLike[str],
    target: str | os.PathLike[str],
    acceptance_rates: Sequence[float],
    options: ServerTimingOptions | None = None,
    *,
    output_dir: str | os.PathLike[str] | None = None,
    show_progress: bool = True,
    **given: Argument,
) -> list[SyntheticSpeed]:
    """Tokens a second of llama-server at acceptance rates that are given, such as those that replay predicts.

    It tells what a draft of this size would gain before it is trained, for the weights do not matter. Rounds are timed
    at these rates; each gives 1 + their sum tokens on average.

    Args:
        draft (`str` or `os.PathLike`): The draft's GGUF file.
        target (`str` or `os.PathLike`): The target's GGUF file.
        acceptance_rates (`Sequence[float]`):
            Shares of the rounds in which drafted token k = 1, 2, ... is accepted, as `acceptance_rate_per_position` of
            [`~spec_kd.replay`] and of reports has them; one for each drafted token, none higher than the one before it.
        options (`ServerTimingOptions`, *optional*): As for [`measure_server_costs`].
        output_dir (`str` or `os.PathLike`, *optional*): As for [`measure_server_costs`].
        show_progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.
        given: Fields of [`ServerTimingOptions`] as keywords.

    Returns:
        `list[SyntheticSpeed]`, one for each batch size.

    Raises:
        ValueError: If the rates are no such list; also, with the other errors, as [`measure_server_costs`].
    """
    options = resolve_options(ServerTimingOptions, options, given)
    rates = tuple(acceptance_rates)
    check_acceptance_rates(rates)
    seconds = time_settings(draft, target, [(), rates], options, output_dir, show_progress)
    speeds = []
    for size in options.batch_sizes:
        plain, drafted = seconds[(), size], [one / (1 + sum(rates)) for one in seconds[rates, size]]
        ratios = [theirs / ours for theirs, ours in zip(plain, drafted, strict=True)]
        speeds.append(
            SyntheticSpeed(
                acceptance_rates=list(rates),
                batch_size=size,
                tokens_per_second=1 / statistics.median(drafted),
                plain_tokens_per_second=1 / statistics.median(plain),
                speedup=statistics.median(ratios),
                speedup_range=[min(ratios), max(ratios)],
            )
        )
    return speeds


def read_observed_costs(observation: Observation) -> ServingCosts:
    """Costs of a round from requests that a server answered with and without a draft, such as vLLM's.

    They hold for the number of drafted tokens that the server was started with. The rounds of each prompt are compared
    with the plain steps of the same prompt, and the median counts.

    Args:
        observation (`Observation`):
            Requests of [`~spec_kd.observe_serving`] with `plain_url`, to servers that tell their own times (llama.cpp;
            vLLM with `--enable-per-request-metrics`) and counts of each request.

    Raises:
        ValueError: Times, counts, the number of drafted tokens or the requests without the draft are missing.
    """
    gamma, plain = observation.num_assistant_tokens, {one.row: one for one in observation.plain_requests}
    refuse(
        (not plain, "The server was asked with the draft alone. Observe it with `plain_url` too."),
        (
            not observation.has_decoding_seconds,
            "The server did not tell how long it decoded. Start vLLM with `--enable-per-request-metrics`.",
        ),
        (gamma is None, "It is not known how many tokens the server drafts. Observe it with `num_assistant_tokens`."),
    )
    timed = [
        (_count_rounds(one), one.decoding_seconds or 0.0, plain[one.row])
        for one in observation.requests
        if one.row in plain and len(one.completion_ids) > 1 and len(plain[one.row].completion_ids) > 1
    ]
    steps = [(other.decoding_seconds or 0.0) / (len(other.completion_ids) - 1) for _, _, other in timed]
    ratios = [seconds / rounds / step for (rounds, seconds, _), step in zip(timed, steps, strict=True)]
    if not ratios:
        raise ValueError("No completion of the server has two tokens, so nothing was timed. Ask it for longer ones.")
    title = find_serving_engine(observation.serving_engine).title
    return ServingCosts(
        round_cost={cast(int, gamma): statistics.median(ratios)},
        round_cost_range={cast(int, gamma): [min(ratios), max(ratios)]},
        batch_size=observation.concurrency,
        target_step_seconds=statistics.median(steps),
        source=f"{len(ratios)} requests to {title}, with and without the draft",
    )


def _count_rounds(request: ObservedRequest) -> int:
    """Target passes after the prompt's own: those that the server tells of, or those that the counts leave."""
    counts = request.known_counts
    if counts is None or counts.accepted is None:
        raise ValueError("The server tells nothing of the drafts of each request, so its rounds are not known.")
    return counts.rounds or len(request.completion_ids) - 1 - counts.accepted
