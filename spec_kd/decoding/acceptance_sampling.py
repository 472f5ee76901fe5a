"""Which drafted tokens the target accepts, and its own token after them (Leviathan et al., arXiv 2211.17192, alg. 1).

B rows are offered G drafted tokens each, may use the first `limits` of them, and accept unequal numbers.
"""

import torch

from spec_kd.sampling.generation import draw_ids


def verify_greedily(
    logits: torch.Tensor, drafted: torch.Tensor, limits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Accepts drafted tokens as long as they are the target's most likely ones.

    Args:
        logits (`torch.Tensor`): Logits of the target at the G drafted positions and the next one, `(B, G + 1, V)`.
        drafted (`torch.Tensor`): Drafted ids, int64 `(B, G)`.
        limits (`torch.Tensor`): Number of drafted tokens that each row may use, int64 `(B,)`.

    Returns:
        The number of drafted tokens that are accepted, and the target's own token after those, each int64 `(B,)`.
    """
    choice = logits.argmax(dim=-1)  # (B, G + 1)
    accepted = _count_leading(drafted == choice[:, :-1], limits)
    return accepted, choice.gather(1, accepted[:, None]).squeeze(1)


def verify_sampled(
    p: torch.Tensor,
    q: torch.Tensor | None,
    drafted: torch.Tensor,
    limits: torch.Tensor,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Accepts each drafted token with probability min(1, p / q), and replaces the first one that fails.

    The completions are then distributed as if p had been sampled from.

    Args:
        p (`torch.Tensor`): Probabilities of the target at the G drafted positions and the next one, `(B, G + 1, V)`.
        q (`torch.Tensor`, *optional*):
            Probabilities that the drafted tokens were sampled from, `(B, G, V)`. `None` if they are the draft's most
            likely ones; q is then 1 at the drafted token.
        drafted (`torch.Tensor`): Drafted ids, int64 `(B, G)`.
        limits (`torch.Tensor`): Number of drafted tokens that each row may use, int64 `(B,)`.
        generator (`torch.Generator`): Generator on the device of the tensors.

    Returns:
        As [`verify_greedily`].
    """
    uniforms = torch.rand(drafted.shape, generator=generator, device=p.device)
    accepted = count_accepted(p, q, drafted, limits, uniforms)
    return accepted, draw_ids(weigh_next_tokens(p, q, drafted, limits, accepted), generator)


def count_accepted(
    p: torch.Tensor, q: torch.Tensor | None, drafted: torch.Tensor, limits: torch.Tensor, uniforms: torch.Tensor
) -> torch.Tensor:
    """Counts the drafted tokens that are accepted before the first failure, int64 `(B,)`.

    Args:
        uniforms (`torch.Tensor`): Uniform draws from [0, 1), one for each drafted token, `(B, G)`.

    The other arguments are those of [`verify_sampled`].
    """
    ids = drafted[..., None]  # (B, G, 1)
    token_p = p[:, :-1].gather(-1, ids).squeeze(-1)
    token_q = 1.0 if q is None else q.gather(-1, ids).squeeze(-1)
    return _count_leading(uniforms * token_q < token_p, limits)


def weigh_next_tokens(
    p: torch.Tensor, q: torch.Tensor | None, drafted: torch.Tensor, limits: torch.Tensor, accepted: torch.Tensor
) -> torch.Tensor:
    """The weights from which the token after the accepted ones is drawn: max(p - q, 0) after a rejection, else p.

    Args:
        accepted (`torch.Tensor`): Number of accepted drafted tokens, int64 `(B,)`.

    The other arguments are those of [`verify_sampled`].

    Returns:
        `torch.Tensor`: Weights `(B, V)`, which need not sum to one.
    """
    p = p[torch.arange(len(p), device=p.device), accepted]  # (B, V)
    rejected = (accepted < limits).nonzero().squeeze(1)  # (R,)
    where = (rejected, accepted[rejected])
    weights = p.clone()
    if q is None:
        weights[rejected, drafted[where]] = 0
    else:
        weights[rejected] = (p[rejected] - q[where]).clamp(min=0)
    # If p and q are equal up to rounding, a rejection is almost impossible, but would leave nothing to draw from.
    return torch.where(weights.sum(dim=-1, keepdim=True) > 0, weights, p)


def _count_leading(is_accepted: torch.Tensor, limits: torch.Tensor) -> torch.Tensor:
    may_be_used = torch.arange(is_accepted.shape[1], device=limits.device) < limits[:, None]
    return (is_accepted & may_be_used).long().cumprod(dim=1).sum(dim=1)
