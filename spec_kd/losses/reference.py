"""The divergences written as they stand in the papers, for autograd and for reading. Slow on purpose."""

import torch


def dense_divergence(
    draft_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    divergence: str,
    *,
    temperature: float = 1.0,
    beta: float = 0.5,
) -> torch.Tensor:
    """Divergence per token from full logits, differentiable by autograd.

    The reference of `fused_linear_divergence`, in whatever dtype the logits have (float64 in the tests).

    Args:
        draft_logits (`torch.Tensor`): `(..., V)`.
        teacher_logits (`torch.Tensor`): `(..., V)`.
        divergence (`str`): `"forward_kl"`, `"reverse_kl"` or `"jsd"`.
        temperature (`float`, *optional*, defaults to `1.0`):
            Both logits are divided by it. No T^2 factor is applied to the value.
        beta (`float`, *optional*, defaults to `0.5`): Weight of the JSD.

    Returns:
        `torch.Tensor`: `(...)`, in nats.
    """
    log_q = torch.log_softmax(draft_logits / temperature, dim=-1)
    log_p = torch.log_softmax(teacher_logits / temperature, dim=-1)

    def kl(log_a: torch.Tensor, log_b: torch.Tensor) -> torch.Tensor:
        return (log_a.exp() * (log_a - log_b)).sum(-1)

    if divergence == "forward_kl":
        return kl(log_p, log_q)
    if divergence == "reverse_kl":
        return kl(log_q, log_p)
    if divergence == "jsd":
        weights = torch.tensor([beta, 1.0 - beta], dtype=log_p.dtype, device=log_p.device).log()
        log_m = torch.logaddexp(log_p + weights[0], log_q + weights[1])
        return beta * kl(log_p, log_m) + (1.0 - beta) * kl(log_q, log_m)
    raise ValueError(f"Unknown divergence {divergence!r}. Choose one of: forward_kl, jsd, reverse_kl.")
