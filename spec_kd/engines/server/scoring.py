"""Whether a server can score given text: some refuse it, and some do it wrong without a sign."""

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
REFUSALS = (400, 404, 422, 500, 501)  # llama.cpp says 500 to what it does not support
NUM_REFUSALS = 3
NUM_PROBES = 4
PROBE_LENGTH = 16
PROBE_TOLERANCE = 0.1  # nats, of the median; the noise of 16-bit models is less, a shift by one token several nats


def verify_scoring(
    prompts: Sequence[Sequence[int]],
    requests: RequestBuilder,
    reader: CompletionReader,
    post: Call[list[JsonValue]],
    collect: Call[list[Completion]],
) -> None:
    """Has a few short texts written, then scored, and compares what the server said of them.

    Args:
        prompts (`Sequence[Sequence[int]]`): Of the job; the shortest are used.
        requests (`RequestBuilder`): The engine's.
        reader (`CompletionReader`): The engine's.
        post (`Callable`): Posts bodies and reads their answers, as `CompletionsClient.post_all`.
        collect (`Callable`): The same for answers that become completions.

    Raises:
        `UnsupportedByEngineError`: The server refuses to score, gives no log-probabilities, or gives others for a text
            than when it wrote it.
        `ServerRequestError`: As of `generate`.
    """
    shortest = sorted(prompts, key=len)[:NUM_PROBES]
    bodies = [requests.build("A probe", ids, PROBE_LENGTH, 1.0, seed=i) for i, ids in enumerate(shortest)]
    texts: list[list[int]] = []
    starts: list[int] = []
    written: list[float] = []
    for prompt, answer in zip(shortest, post(bodies, _keep), strict=True):
        ids, positions = reader.read_ids(answer["choices"][0])
        known = list(itertools.takewhile(lambda pair: None not in pair, zip(ids, positions or (), strict=False)))
        if known and all(position.log_p is not None for _, position in known):
            texts.append([*prompt, *(id for id, _ in known if id is not None)])
            starts.append(len(prompt))
            written += [position.log_p for _, position in known if position.log_p is not None]
    if not texts:
        raise UnsupportedByEngineError(f"The server gives no log-probabilities of exact ids. To score, use {SCORERS}.")
    _check_echo(texts[0], requests, post)
    scored = collect(
        [text[:start] for text, start in zip(texts, starts, strict=True)],
        [requests.build_echo(text) for text in texts],
        lambda i, answer: reader.read_scored(answer, texts[i], starts[i], SignalSpec()),
    )
    echoed = itertools.chain.from_iterable(completion.token_logprobs or () for completion in scored)
    gap = median(abs(a - b) for a, b in zip(echoed, written, strict=True))
    if gap > PROBE_TOLERANCE:
        raise UnsupportedByEngineError(
            f"The server's echo of a text gives its tokens other log-probabilities than writing it did (median "
            f"difference {gap:.2f} nats), as if shifted by one token. To score, use {SCORERS}."
        )


def _check_echo(text: Sequence[int], requests: RequestBuilder, post: Call[list[JsonValue]]) -> None:
    """Raises `UnsupportedByEngineError` for a server that refuses to echo a text.

    A refusal with status 500 looks like trouble that may pass and is worth waiting for. It is a refusal if the same
    request without `echo` is answered each time in between.
    """
    for _ in range(NUM_REFUSALS):
        try:
            post([requests.build_echo(text)], _keep, fails_at_once=REFUSALS)
            return
        except ServerRequestError as error:
            if error.status_code not in REFUSALS:
                raise
            refusal, may_pass = str(error), error.status_code >= 500
        if not may_pass:
            break
        post([requests.build("A probe", text, 1, 1.0)], _keep)
    raise UnsupportedByEngineError(f"The server cannot score given text (it refuses `echo`): use {SCORERS}. {refusal}")


def _keep(index: int, answer: JsonObject) -> JsonObject:
    return answer
