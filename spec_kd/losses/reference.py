"""The divergences as the papers write them, for autograd and for reading. They are slow on purpose."""

import math

import torch


def dense_divergence(
    draft_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    divergence: str,
    *,
    temperature: float = 1.0,
    beta: float = 0.5,
    eta: float = 3.0,
    sigma_min: float = 1e-3,
) -> torch.Tensor:
    """Divergence per token from full logits, differentiable by autograd.

    This is the reference of `fused_linear_divergence`, in the dtype of the logits (float64 in the tests).

    Args:
        draft_logits (`torch.Tensor`): `(..., V)`.
        teacher_logits (`torch.Tensor`): `(..., V)`.
        divergence (`str`): One of the seven names that come with the package.
        temperature (`float`, *optional*, defaults to `1.0`):
            Both logits are divided by it. No T^2 factor is applied to the value.
        beta (`float`, *optional*, defaults to `0.5`): Weight of the JSD.
        eta (`float`, *optional*, defaults to `3.0`): Rate of `lk_hybrid`.
        sigma_min (`float`, *optional*, defaults to `1e-3`): Least deviation in `tvd_plus_plus`.

    Returns:
        `torch.Tensor`: `(...)`, in nats (the two TVDs: a probability).

    Raises:
        ValueError: For an unknown name.
    """
    log_q = torch.log_softmax(draft_logits / temperature, dim=-1)
    log_p = torch.log_softmax(teacher_logits / temperature, dim=-1)
    p, q = log_p.exp(), log_q.exp()
    tvd = (p - q).clamp(min=0.0).sum(-1)

    def kl(log_a: torch.Tensor, log_b: torch.Tensor) -> torch.Tensor:
        ratio = (log_a - log_b).masked_fill(log_a == -math.inf, 0.0)  # 0 log 0 = 0
        return (log_a.exp() * ratio).sum(-1)

    match divergence:
        case "forward_kl":
            return kl(log_p, log_q)
        case "reverse_kl":
            return kl(log_q, log_p)
        case "jsd":
            weights = torch.tensor([beta, 1.0 - beta], dtype=log_p.dtype, device=log_p.device).log()
            is_impossible = (log_p == -math.inf) & (log_q == -math.inf)  # in neither sum
            parts = zip((log_p, log_q), weights, strict=True)
            log_m = torch.logaddexp(*(log.masked_fill(is_impossible, 0.0) + weight for log, weight in parts))
            return beta * kl(log_p, log_m) + (1.0 - beta) * kl(log_q, log_m)
        case "tvd":
            return tvd
        case "neg_log_acceptance":
            return -torch.logsumexp(torch.minimum(log_p, log_q), dim=-1)
        case "lk_hybrid":
            weight = torch.exp(-eta * (1.0 - tvd.detach()))
            return weight * kl(log_p, log_q) + (1.0 - weight) * tvd
        case "tvd_plus_plus":
            # The policy gradient E_q[-reward grad log q], rewards r = 1[p > q] made to mean 0 and deviation 1 under q.
            with torch.no_grad():
                r = (p > q).to(q.dtype)
                mean = (q * r).sum(-1, keepdim=True)
                sigma = (q * (r - mean).square()).sum(-1, keepdim=True).sqrt().clamp(min=sigma_min)
                reward = (r - mean) / sigma
            surrogate = -(q.detach() * reward * log_q.masked_fill(log_q == -math.inf, 0.0)).sum(-1)
            return tvd.detach() + surrogate - surrogate.detach()  # the gradient is the surrogate's
    raise ValueError(
        f"Unknown divergence {divergence!r}. Choose one of: forward_kl, jsd, lk_hybrid, neg_log_acceptance, "
        "reverse_kl, tvd, tvd_plus_plus."
    )


def dense_rejected_length(
    draft_logits: torch.Tensor, teacher_logits: torch.Tensor, is_scored: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """Expected number of tokens of blocks that are not accepted, differentiable by autograd.

    This is the reference of `ExpectedLength`: the sum over blocks and positions k of scale_k (1 - a_1 .. a_k), with
    a = sum_v min(p, q) at each position.

    Args:
        draft_logits (`torch.Tensor`): `(S, K, V)`.
        teacher_logits (`torch.Tensor`): `(S, K, V)`.
        is_scored (`torch.Tensor`): Positions that are not left out, bool `(S, K)`.
        scale (`torch.Tensor`): Weight of each position, `(K,)`.

    Returns:
        `torch.Tensor`: Scalar, in tokens.
    """
    acceptance = torch.minimum(draft_logits.softmax(-1), teacher_logits.softmax(-1)).sum(-1)  # (S, K)
    return ((1 - acceptance.cumprod(-1)) * scale * is_scored).sum()
