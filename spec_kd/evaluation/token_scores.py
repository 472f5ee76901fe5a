"""Scores of a draft at each completion token: from logits to acceptance, alpha, its bounds and the target's entropy."""

from typing import cast

import torch

from spec_kd.acceptance import (
    compute_alpha,
    compute_greedy_draft_alpha,
    compute_token_acceptance,
    match_tokens,
)
from spec_kd.losses import SparseTensors
from spec_kd.sampling.generation import NO_IDS, build_warpers, draw_ids
from spec_kd.serving.engine import EarlyEnd

SCORES = ("acceptance", "alpha", "alpha_low", "alpha_high", "target_entropy", "log_ratio")
"""Rows that the scoring functions return, float64; NaN where a score is unknown."""
CONFIDENCE = "confidence"
"""Name of what [`measure_confidence`] returns."""


def score_from_target(
    draft_logits: torch.Tensor,
    target_logits: torch.Tensor | None,
    tokens: torch.Tensor,
    temperature: float,
    draft_sampling: str,
    top_k: int = 0,
    top_p: float = 1.0,
    draft_top_k: int | None = None,
) -> torch.Tensor:
    """Scores of tokens that the target wrote, from the logits of both models.

    Args:
        draft_logits (`torch.Tensor`): `(n, V)`.
        target_logits (`torch.Tensor`, *optional*): `(n, V)`; for greedy completions only the entropy needs them.
        tokens (`torch.Tensor`): int64 `(n,)`.
        temperature (`float`):
            Temperature of the completions, 0.0 for greedy; their entropy is then that of the plain softmax.
        draft_sampling (`str`): `"stochastic"`, `"greedy"` or `"matching"`.
        top_k (`int`, *optional*, defaults to `0`), top_p (`float`, *optional*, defaults to `1.0`):
            Truncation of the sampling of both models.
        draft_top_k (`int`, *optional*): Truncation of a sampled draft instead; `None` for that of the target.

    Returns:
        `torch.Tensor`: `(6, n)`, see `SCORES`.
    """
    warp = build_warpers(temperature, top_k, top_p)
    choice = draft_logits.argmax(dim=-1)
    log_p = entropy = None
    if target_logits is not None:
        log_p = warp(NO_IDS, target_logits.to(draft_logits.device)).log_softmax(dim=-1)
        entropy = -(log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(-1)
    if temperature == 0:
        matches = match_tokens(choice, tokens)
        return _stack(matches, matches, entropy=entropy)
    log_p = cast(torch.Tensor, log_p)  # only greedy completions do without the target's logits
    if draft_sampling == "greedy":
        return _stack(match_tokens(choice, tokens), compute_greedy_draft_alpha(log_p, choice), entropy=entropy)
    draft_warp = warp if draft_top_k is None else build_warpers(temperature, draft_top_k)
    log_q = draft_warp(NO_IDS, draft_logits).log_softmax(dim=-1)
    if draft_sampling == "matching":
        return _stack(_at(log_q, tokens).exp(), (log_p.exp() * log_q.exp()).sum(-1), entropy=entropy)
    token_log_p, token_log_q = _at(log_p, tokens), _at(log_q, tokens)
    acceptance = compute_token_acceptance(token_log_p, token_log_q)
    alpha = compute_alpha(log_p.exp(), log_q.exp())
    return _stack(acceptance, alpha, entropy=entropy, log_ratio=token_log_q - token_log_p)


def score_from_stored(
    draft_logits: torch.Tensor,
    token_log_p: torch.Tensor,
    tokens: torch.Tensor,
    temperature: float,
    draft_sampling: str,
    sparse: SparseTensors | None = None,
    draft_top_k: int | None = None,
) -> torch.Tensor:
    """Scores of tokens sampled at a temperature > 0, from what is stored of the target's distribution.

    alpha at a position is a_i itself, whose mean over completions drawn from p is alpha. If draws are stored, it is
    their mean, which varies less. A stored top-k bounds it.

    Args:
        draft_logits (`torch.Tensor`): `(n, V)`.
        token_log_p (`torch.Tensor`): log p of the tokens, `(n,)`.
        tokens (`torch.Tensor`): int64 `(n,)`.
        temperature (`float`): Temperature of the completions and of the log-probabilities.
        draft_sampling (`str`): `"stochastic"`, `"greedy"` or `"matching"`.
        sparse (`SparseTensors`, *optional*): Other ids that are stored, with log p.
        draft_top_k (`int`, *optional*): Truncation of a sampled draft; `None` or 0 for none.

    Returns:
        `torch.Tensor`: `(6, n)`, see `SCORES`.
    """
    if draft_sampling == "greedy":
        matches = match_tokens(draft_logits.argmax(dim=-1), tokens)
        return _stack(matches, matches)
    log_q = build_warpers(temperature, draft_top_k or 0)(NO_IDS, draft_logits).log_softmax(dim=-1)
    if draft_sampling == "matching":
        acceptance = _at(log_q, tokens).exp()
        return _stack(acceptance, acceptance)
    token_log_q = _at(log_q, tokens)
    acceptance, log_ratio = compute_token_acceptance(token_log_p, token_log_q), token_log_q - token_log_p
    if sparse is None:
        return _stack(acceptance, acceptance, log_ratio=log_ratio)
    alpha, low, high = sparse.method.estimate_alpha(sparse, log_q.gather(-1, sparse.ids))
    return _stack(acceptance, acceptance if alpha is None else alpha, low, high, log_ratio=log_ratio)


def measure_confidence(
    draft_logits: torch.Tensor,
    tokens: torch.Tensor,
    temperature: float,
    draft_sampling: str,
    early_end: EarlyEnd,
    top_k: int = 0,
    top_p: float = 1.0,
    draft_top_k: int | None = None,
) -> torch.Tensor:
    """The probability that an engine compares with the threshold at which it ends a draft.

    Args:
        draft_logits (`torch.Tensor`): `(n, V)`.
        tokens (`torch.Tensor`): The text's tokens, int64 `(n,)`.
        temperature (`float`), draft_sampling (`str`), top_k (`int`), top_p (`float`), draft_top_k (`int`, *optional*):
            As for [`score_from_target`].
        early_end (`EarlyEnd`): The engine's rule.

    Returns:
        `torch.Tensor`: float64 `(n,)`; of the most likely token for a greedy draft, so also where it is not the text's.
    """
    is_sampled = temperature > 0 and draft_sampling != "greedy"
    if early_end.top_k is not None or not is_sampled:
        cut: tuple[int, float] = (early_end.top_k or 0, 1.0)
    else:
        cut = (top_k, top_p) if draft_top_k is None else (draft_top_k, 1.0)
    log_q = build_warpers(temperature if is_sampled else 1.0, *cut)(NO_IDS, draft_logits).log_softmax(dim=-1)
    is_of_text = is_sampled and early_end.is_of_token
    return (_at(log_q, tokens) if is_of_text else log_q.amax(dim=-1)).double().exp()


def draw_misses(
    draft_logits: torch.Tensor,
    target_logits: torch.Tensor | None,
    temperature: float,
    draft_sampling: str,
    generator: torch.Generator,
    draft_top_k: int | None = None,
) -> torch.Tensor:
    """What the draft proposes where its token is not accepted: its choice, or for a stochastic one a sample.

    A stochastic draft's rejected tokens are distributed as max(q - p, 0), normalized.

    Args:
        draft_logits (`torch.Tensor`): `(n, V)`.
        target_logits (`torch.Tensor`, *optional*): `(n, V)`; only a sample needs them.
        temperature (`float`): Temperature of the completions, 0.0 for greedy.
        draft_sampling (`str`): `"stochastic"`, or another.
        generator (`torch.Generator`): Generator on the device of the logits.
        draft_top_k (`int`, *optional*): Truncation of a sampled draft; `None` or 0 for none.

    Returns:
        `torch.Tensor`: int64 `(n,)`.
    """
    if temperature == 0 or draft_sampling == "greedy" or target_logits is None:
        return draft_logits.argmax(dim=-1)
    q = build_warpers(temperature, draft_top_k or 0)(NO_IDS, draft_logits).softmax(dim=-1)
    p = build_warpers(temperature)(NO_IDS, target_logits.to(q.device)).softmax(dim=-1)
    return draw_ids((q - p).clamp(min=0), generator)


def _at(log: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return log.gather(-1, tokens[:, None]).squeeze(-1)


def _stack(
    acceptance: torch.Tensor,
    alpha: torch.Tensor,
    low: torch.Tensor | None = None,
    high: torch.Tensor | None = None,
    entropy: torch.Tensor | None = None,
    log_ratio: torch.Tensor | None = None,
) -> torch.Tensor:
    unknown = torch.full_like(acceptance, float("nan"), dtype=torch.float64)
    rows = (acceptance, alpha, low, high, entropy, log_ratio)
    return torch.stack([unknown if row is None else row.double() for row in rows])
