"""Finds out whether a server can score completions: some refuse, and some give wrong numbers without an error."""

import itertools
from collections.abc import Sequence
from statistics import median

from spec_kd.engines.base import Completion, UnsupportedByEngineError
from spec_kd.engines.server.client import ServerRequestError
from spec_kd.engines.server.completion_reader import CompletionReader
from spec_kd.engines.server.requests import RequestBuilder
from spec_kd.losses import SignalSpec
from spec_kd.open_types import Call, JsonObject, JsonValue

SCORERS = "vLLM, SGLang or the transformers engine"
REFUSALS = (400, 404, 422, 500, 501)  # llama.cpp answers 500 to what it does not support
NUM_REFUSALS = 3
NUM_PROBES = 4
PROBE_LENGTH = 16
PROBE_TOLERANCE = 0.1  # nats, for the median; 16-bit models have less noise, a shift by one token gives several


def verify_scoring(
    prompts: Sequence[Sequence[int]],
    requests: RequestBuilder,
    reader: CompletionReader,
    post: Call[list[JsonValue]],
    collect: Call[list[Completion]],
) -> None:
    """Lets the server write and score a few short completions, and compares the two log-probabilities.

    Args:
        prompts (`Sequence[Sequence[int]]`): Prompts of the job, of which the shortest are used.
        requests (`RequestBuilder`): Builds the requests.
        reader (`CompletionReader`): Reads the answers.
        post (`Callable`): Posts bodies and reads their answers, as `CompletionsClient.post_all`.
        collect (`Callable`): Posts bodies and reads completions from their answers.

    Raises:
        UnsupportedByEngineError: The server refuses to score, gives no log-probabilities, or gives others than when it
            wrote the completion.
        ServerRequestError: A request failed for good.
    """
    shortest = sorted(prompts, key=len)[:NUM_PROBES]
    bodies = [requests.build("A probe", ids, PROBE_LENGTH, 1.0, seed=i) for i, ids in enumerate(shortest)]
    probes: list[tuple[Sequence[int], list[int]]] = []
    written: list[float] = []
    for prompt, answer in zip(shortest, post(bodies, _keep), strict=True):
        ids, positions = reader.read_ids(answer["choices"][0])
        known = list(itertools.takewhile(lambda pair: None not in pair, zip(ids, positions or (), strict=False)))
        log_p = [position.log_p for _, position in known if position.log_p is not None]
        if known and len(log_p) == len(known):
            probes.append((prompt, [*prompt, *(id for id, _ in known if id is not None)]))
            written += log_p
    if not probes:
        raise UnsupportedByEngineError(
            f"The server returns no log-probabilities of exact ids. To score, use {SCORERS}."
        )
    _check_echo(probes[0][1], requests, post)
    scored = collect(
        [prompt for prompt, _ in probes],
        [requests.build_echo(row) for _, row in probes],
        lambda i, answer: reader.read_scored(answer, probes[i][1], len(probes[i][0]), SignalSpec()),
    )
    echoed = itertools.chain.from_iterable(completion.token_logprobs or () for completion in scored)
    gap = median(abs(a - b) for a, b in zip(echoed, written, strict=True))
    if gap > PROBE_TOLERANCE:
        raise UnsupportedByEngineError(
            f"The server echoes other log-probabilities than it returned with its completions (median difference "
            f"{gap:.2f} nats), as if they were shifted by one token. To score, use {SCORERS}."
        )


def _check_echo(row: Sequence[int], requests: RequestBuilder, post: Call[list[JsonValue]]) -> None:
    """Raises `UnsupportedByEngineError` if the server refuses to echo.

    Status 500 may also be a fault that passes. It counts as a refusal if the server answers the same request without
    `echo` each time in between.
    """
    for _ in range(NUM_REFUSALS):
        try:
            post([requests.build_echo(row)], _keep, fails_at_once=REFUSALS)
            return
        except ServerRequestError as error:
            if error.status_code not in REFUSALS:
                raise
            refusal, may_pass = str(error), error.status_code >= 500
        if not may_pass:
            break
        post([requests.build("A probe", row, 1, 1.0)], _keep)
    raise UnsupportedByEngineError(f"The server cannot score, because it refuses `echo`. Use {SCORERS}. {refusal}")


def _keep(index: int, answer: JsonObject) -> JsonObject:
    return answer
