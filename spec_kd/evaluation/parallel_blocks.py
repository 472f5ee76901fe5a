"""What a parallel draft proposes in a round, for every token of a response at which a round may begin.

Its tokens do not depend on each other, but on the place where the round begins: the text before it is all that is read.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from spec_kd.evaluation.options import ReplayOptions
from spec_kd.evaluation.response_rows import Response
from spec_kd.evaluation.token_scores import score_from_target
from spec_kd.heads import LogitHead, compute_last_hidden_states, evaluation_mode, find_input_device
from spec_kd.parallel import ParallelDrafting
from spec_kd.parallel.attention import build_attention, check_masks
from spec_kd.parallel.layout import build_layout
from spec_kd.sampling.generation import build_warpers, draw_each, seed_generator
from spec_kd.sampling.prompts import get_max_length
from spec_kd.sampling.response_format import ResponseFormat
from spec_kd.sampling.token_masks import TokenMasks, unpack

MAX_MASKS = 2048
"""Masks of one pass: its attention mask has as many rows and columns as there are tokens and masks."""


def check_blocks(draft: PreTrainedModel, parallel: ParallelDrafting, responses: Sequence[Response]) -> None:
    """Raises `ValueError` for a draft that cannot read the masks of all rounds in one pass."""
    check_masks(draft, parallel.mask_token_id, max(len(one.text) for one in responses) + parallel.num_tokens - 1)


def compute_block_states(
    draft: PreTrainedModel, response: Response, parallel: ParallelDrafting, first_start: int = 0
) -> torch.Tensor:
    """Last hidden states that predict each token of each round, from passes over the response and masks for all rounds.

    Args:
        draft (`PreTrainedModel`): The draft in eval mode.
        response (`Response`): A response whose completion has N tokens.
        parallel (`ParallelDrafting`): Its mask token, and the tokens of a round (K).
        first_start (`int`, *optional*, defaults to `0`): Token of the completion at which the first round begins (S).

    Returns:
        `torch.Tensor`: `(N - S, K, H)`. State `[i, k]` predicts token S + i + k of the completion, or what comes after
        its end, in a round that begins at token S + i.
    """
    size, num_tokens, num_prompt = parallel.num_tokens, len(response.completion), len(response.prompt)
    limit = get_max_length(draft)
    # No round sees what stands after the end of the response: it makes room for masks there
    text = torch.tensor([response.text + [0] * (size - 1)], device=find_input_device(draft))  # (1, T)
    starts_per_pass = max(size, MAX_MASKS // size)
    parts = []
    for start in range(first_start, num_tokens, starts_per_pass):
        stop = min(start + starts_per_pass, num_tokens)
        ids = text[:, : num_prompt + stop + size - 1]
        labels = torch.full_like(ids, -100)
        labels[:, num_prompt + start :] = 0
        # All rounds are kept, so nothing is left to the chance that a generator stands for
        layout = build_layout(labels, [1.0] * size, generator=torch.Generator(ids.device))
        states = compute_last_hidden_states(
            draft,
            draft.get_output_embeddings(),
            input_ids=layout.append_masks(ids, parallel.mask_token_id),
            attention_mask=build_attention(layout, draft),
            position_ids=layout.positions.clamp(0, None if limit is None else limit - 1),
        )[0]  # (T + M, H)
        by_start = states.new_zeros(layout.blocks.num_blocks, size, states.shape[-1])
        blocks = (layout.blocks.block.to(states.device), layout.blocks.position.to(states.device))
        by_start[blocks] = states[layout.slots.to(states.device)]
        parts.append(by_start[: stop - start])
    return torch.cat(parts)


def score_past_end(
    draft: PreTrainedModel,
    target: PreTrainedModel,
    responses: Sequence[Response],
    options: ReplayOptions,
    vocab_size: int,
    parallel: ParallelDrafting,
    masks: TokenMasks | None = None,
) -> torch.Tensor:
    """Acceptance of what rounds propose after the end of each of P responses, float64 `(P, N, K)` on the CPU.

    It depends on the place where a round begins. A sampled draft is sampled once. `masks` are of the target, for
    responses with a format.
    """
    longest, size = max(len(one.completion) for one in responses), parallel.num_tokens
    past_end = torch.zeros(len(responses), longest, size, dtype=torch.float64)
    with evaluation_mode(draft, target):
        for row, one in enumerate(responses):
            num_tokens = len(one.completion)
            first = max(0, num_tokens - size + 1)
            logits = LogitHead.of(draft, vocab_size)(compute_block_states(draft, one, parallel, first))  # (R, K, V)
            ids = _choose(logits, options, f"past {row}")  # (R, K)
            inside = [num_tokens - start for start in range(first, num_tokens)]  # tokens of each round before the end
            after, q = (
                pad_sequence([part[count:] for part, count in zip(values, inside, strict=True)], batch_first=True)
                for values in (ids, logits)
            )  # (R, K - 1), (R, K - 1, V)
            words = None
            if masks is not None and one.format is not None:
                words = torch.stack([masks.build(one.format, one.completion, tokens) for tokens in after.tolist()])
            chances = _score_after(target, one.text, after, q, options, vocab_size, words)
            if masks is not None and one.format is not None:
                numbers = _count_after(masks, one, after.tolist())
                chances *= torch.arange(after.shape[1]) < torch.tensor(numbers)[:, None]
            for start, (count, own) in enumerate(zip(inside, chances, strict=True), start=first):
                past_end[row, start, count:] = own[: size - count]
    return past_end


def count_allowed(
    draft: PreTrainedModel,
    responses: Sequence[Response],
    scores: dict[str, torch.Tensor],
    options: ReplayOptions,
    vocab_size: int,
    parallel: ParallelDrafting,
    masks: TokenMasks,
) -> torch.Tensor:
    """Number of tokens that a grammar allows in a draft that leaves its response, by where it begins and leaves.

    Args:
        draft (`PreTrainedModel`): The draft.
        responses (`Sequence[Response]`): P responses.
        scores (`dict[str, torch.Tensor]`): Their scores by [`ResponseScorer`], with misses.
        options (`ReplayOptions`): How the responses were sampled, and how a draft is. A sampled one is sampled once.
        vocab_size (`int`): Number of real ids.
        parallel (`ParallelDrafting`): The draft's mask token, and the tokens of a round (K).
        masks (`TokenMasks`): Masks for responses with a format.

    Returns:
        `torch.Tensor`: int64 `(P, N, K)`, see [`~spec_kd.acceptance.expect_rounds`]; K where nothing is refused.
    """
    size, first = parallel.num_tokens, options.counting.first_round
    allowed = torch.full(scores["acceptance"].shape, size)
    with evaluation_mode(draft):
        for row, one in enumerate(responses):
            num_tokens = len(one.completion)
            if one.format is None or first >= num_tokens:
                continue
            states = compute_block_states(draft, one, parallel, first)  # (N - S, K, H)
            head, drafts, places = LogitHead.of(draft, vocab_size), [], []
            for start, own in enumerate(states, start=first):
                ids = _choose(head(own[None]), options, f"round {row} {start}")[0].tolist()  # (K,)
                for k in range(min(size, num_tokens - start + 1)):
                    leaves = start + k < num_tokens and scores["acceptance"][row, start, k] < 1
                    if leaves:
                        drafts.append((start + k, [int(scores["miss"][row, start, k]), *ids[k + 1 :]]))
                    elif start + k == num_tokens:
                        drafts.append((num_tokens, ids[k:]))
                    if leaves or start + k == num_tokens:
                        places.append((start, k))
            numbers = masks.count_allowed(one.format, one.completion, drafts)
            for (start, k), number in zip(places, numbers, strict=True):
                allowed[row, start, k] = number
    return allowed


def _count_after(masks: TokenMasks, one: Response, after: Sequence[Sequence[int]]) -> list[int]:
    """Number of tokens that are allowed of each continuation of a response with a format."""
    end = len(one.completion)
    return masks.count_allowed(cast(ResponseFormat, one.format), one.completion, [(end, ids) for ids in after])


def _choose(logits: torch.Tensor, options: ReplayOptions, seed: str) -> torch.Tensor:
    """The ids that a draft proposes, int64 `(R, K)`, from its logits `(R, K, V)`."""
    if options.temperature == 0 or options.sampling == "greedy":
        return logits.argmax(dim=-1)
    warp = build_warpers(options.temperature, options.top_k, options.top_p)
    return draw_each(logits, warp, seed_generator(seed, logits.device))[0]


def _score_after(
    target: PreTrainedModel,
    text: Sequence[int],
    after: torch.Tensor,
    draft_logits: torch.Tensor,
    options: ReplayOptions,
    vocab_size: int,
    words: torch.Tensor | None,
) -> torch.Tensor:
    """Acceptance of R continuations of a text, float64 `(R, K - 1)`, by one pass over the text and one over these.

    `words` are the masks of the target, `(R, K - 1, words)`, see [`~spec_kd.sampling.token_masks.unpack`].
    """
    device = find_input_device(target)
    after = after.to(device)
    output = target(input_ids=torch.tensor([text], device=device), use_cache=True, logits_to_keep=1)
    logits = output.logits.expand(len(after), -1, -1)  # (R, 1, V)
    if after.shape[1] > 1:
        cache = output.past_key_values
        cache.batch_repeat_interleave(len(after))
        rest = target(input_ids=after[:, :-1], past_key_values=cache, use_cache=True).logits
        logits = torch.cat([logits, rest], dim=1)  # (R, K - 1, V)
    # The target accepts these ids, and the draft wrote them: their roles are exchanged. A most likely token is accepted
    # with the probability that the target's own sample is the same
    own = logits[..., :vocab_size].flatten(0, 1).float()  # (R * (K - 1), V)
    if words is not None:
        own = own.masked_fill(~unpack(words.flatten(0, 1).to(device), vocab_size), -torch.inf)
    scores = score_from_target(
        own,
        draft_logits.flatten(0, 1).to(device),
        after.flatten(),
        options.temperature,
        "matching" if options.sampling == "greedy" else options.sampling,
        options.top_k,
        options.top_p,
    )
    return scores[0].view(after.shape).cpu()
