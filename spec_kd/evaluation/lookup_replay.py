"""What drafting by lookup would have done on responses of the target, alone and in front of a draft."""

from collections.abc import Sequence

import torch

from spec_kd.acceptance import LookedUp, expect_rounds
from spec_kd.evaluation.metrics import AcceptanceMetrics
from spec_kd.evaluation.response_replay import ResponseScores
from spec_kd.evaluation.response_rows import ResponseRows
from spec_kd.evaluation.text_kinds import find_kinds
from spec_kd.options import check_int
from spec_kd.serving import ServingEngine, find_serving_engine
from spec_kd.serving.lookup import Propose


def replay_lookup(
    responses: ResponseRows,
    serving_engine: str = "vllm",
    *,
    max_new_tokens: int,
    temperature: float,
    propose: Propose | None = None,
    num_lookup_tokens: int | None = None,
    scores: ResponseScores | None = None,
    num_assistant_tokens: int = 5,
    continuations: Sequence[Sequence[int]] | None = None,
) -> AcceptanceMetrics:
    """Computes the metrics of n-gram drafting, or of any other lookup, on responses of the target; no model is run.

    A token that was looked up is accepted where the response has it, at any temperature, so these metrics are exact for
    the responses that are given. Tokens accepted after the end of a response are counted with `continuations` only.

    Args:
        responses (`Dataset` or iterable of dicts):
            Rows with `prompt_ids` and `completion_ids` (EOS included), written by the target.
        serving_engine (`str`, *optional*, defaults to `"vllm"`): Engine whose lookup and counting are replayed.
        max_new_tokens (`int`): Limit that the responses were written under.
        temperature (`float`): Temperature that they were sampled at; 0.0 is greedy.
        propose (`Callable`, *optional*):
            Another lookup, such as [`~spec_kd.serving.lookup.CompletionStore.propose`]. By default the engine's own.
        num_lookup_tokens (`int`, *optional*): Most tokens looked up in a round. The engine's default by default.
        scores (`ResponseScores`, *optional*):
            Scores of a draft on the same responses, which then drafts wherever nothing is found. By default no draft.
        num_assistant_tokens (`int`, *optional*, defaults to `5`): Number of tokens that this draft drafts in a round.
        continuations (`Sequence[Sequence[int]]`, *optional*):
            What the target would go on with after each response, for engines that count what is accepted there. A
            greedy target's are as certain as its responses.

    Raises:
        ValueError: If the engine has no lookup and `propose` is missing, an option is below 1, or a response is empty
            or longer than `max_new_tokens`.
    """
    engine = find_serving_engine(serving_engine)
    propose, num_tokens = _choose_lookup(engine, propose, num_lookup_tokens)
    counting, min_tokens_left = engine.counting, 1
    if engine.lookup is not None and scores is None:
        counting, min_tokens_left = engine.lookup.counting or counting, engine.lookup.min_tokens_left
    check_int("num_assistant_tokens", num_assistant_tokens)
    texts = [(list(row["prompt_ids"]), list(row["completion_ids"])) for row in responses]
    lengths = torch.tensor([len(completion) for _, completion in texts])
    found = torch.zeros(2, len(texts), int(lengths.max()), dtype=torch.int64)  # drafted and accepted
    for row, (prompt, completion) in enumerate(texts):
        written = list(completion)
        if continuations is not None and counting.end == "passed":
            written += continuations[row]
        for at in range(counting.first_round, min(len(completion), max_new_tokens - min_tokens_left + 1)):
            drafted = propose(prompt + completion[:at], num_tokens)
            found[:, row, at] = torch.tensor([len(drafted), count_equal(drafted, written[at:])])
    no_draft = torch.zeros(found.shape[1:], dtype=torch.float64)
    rounds = expect_rounds(
        no_draft if scores is None else scores.read_drafted("acceptance"),
        num_assistant_tokens,
        max_new_tokens,
        lengths,
        counting,
        None if scores is None else scores.past_end,
        LookedUp(*found),
        has_draft=scores is not None,
    )
    return AcceptanceMetrics.of(
        rounds,
        lengths,
        counting,
        temperature=temperature,
        num_assistant_tokens=rounds.accepted_by_position.shape[-1],
        draft_sampling="greedy" if scores is None else scores.draft_sampling,
        method="replay",
        kinds=find_kinds([prompt for prompt, _ in texts], [completion for _, completion in texts]),
    )


def _choose_lookup(engine: ServingEngine, propose: Propose | None, num_tokens: int | None) -> tuple[Propose, int]:
    if propose is None and engine.lookup is None:
        raise ValueError(
            f"What {engine.title} looks up is not known. Pass `propose`, or an engine with a lookup of its own."
        )
    check_int("num_lookup_tokens", num_tokens, is_optional=True)
    default = 10 if engine.lookup is None else engine.lookup.num_draft_tokens
    return propose or engine.lookup.propose, num_tokens or default  # type: ignore[union-attr]  # refused above


def count_equal(drafted: Sequence[int], text: Sequence[int]) -> int:
    """Number of drafted tokens before the first that differs from the text."""
    for k, (token, expected) in enumerate(zip(drafted, text, strict=False)):
        if token != expected:
            return k
    return min(len(drafted), len(text))
