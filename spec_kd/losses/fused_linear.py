"""Draft head and divergence in one autograd function that never keeps anything of size tokens x vocabulary.

Per chunk of tokens: teacher logits, draft logits, value and dD/dz, and at once the products that carry dD/dz back to
the hidden states and the head. The backward pass only multiplies what the forward stored by the incoming scalar.
That is four matrix products per token (draft forward, two gradients, teacher forward); recomputing the logits in the
backward, as chunked losses usually do, takes six.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable

from spec_kd.acceptance import compute_alpha
from spec_kd.losses.divergences import Divergence, TokenDistributions

# Elements of one `(chunk, V)` float32 buffer: 64 MiB. About six such buffers live at a time.
CHUNK_ELEMENTS = 2**24
MAX_CHUNK_TOKENS = 1024


@dataclass(frozen=True)
class DivergenceOutput:
    """What one call of `fused_linear_divergence` measured.

    Args:
        loss (`torch.Tensor`): Sum of the divergence over all tokens, float32 scalar, with gradient.
        divergence (`torch.Tensor`): Divergence per token in nats, `(N,)`, no gradient.
        entropy (`torch.Tensor`): Entropy of q per token in nats, `(N,)`, no gradient.
        alpha (`torch.Tensor`): sum_v min(p, q) per token at the loss temperature, `(N,)`, no gradient.
        is_top1 (`torch.Tensor`): Whether the label is the draft's most likely token, bool `(N,)`.
    """

    loss: torch.Tensor
    divergence: torch.Tensor
    entropy: torch.Tensor
    alpha: torch.Tensor
    is_top1: torch.Tensor


@dataclass(frozen=True)
class _Settings:
    divergence: Divergence
    temperature: float
    logit_scale: float
    softcap: float | None
    vocab_size: int
    chunk_tokens: int
    compute_dtype: torch.dtype
    has_gradient: bool


def fused_linear_divergence(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    teacher_logits: Callable[[slice], torch.Tensor],
    labels: torch.Tensor,
    *,
    divergence: Divergence,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
) -> DivergenceOutput:
    """Sum over tokens of D(p, q), with q = softmax(transform(hidden @ weight.T + bias) / temperature).

    The gradients are those of the stated value: dD/dlogits = (1/T) dD/dz, and no T^2 factor is applied. Matrix products
    run in the autocast dtype, or else in the dtype of `hidden`; everything elementwise, the sums and the stored
    gradients are float32. Only one backward order is supported (`once_differentiable`).

    Args:
        hidden (`torch.Tensor`): Draft hidden states of the tokens of the loss, `(N, H)`. N = 0 gives a zero loss.
        weight (`torch.Tensor`): Draft head, `(rows, H)` with `rows >= vocab_size`.
        teacher_logits (`Callable[[slice], torch.Tensor]`):
            Returns the teacher's logits `(n, vocab_size)` of a slice of the N tokens, before the temperature. It is
            called once per chunk under no_grad.
        labels (`torch.Tensor`): Written token per position, int64 `(N,)`; only for `is_top1`.
        divergence (`Divergence`): What to compute.
        bias (`torch.Tensor`, *optional*): Draft head bias, `(rows,)`.
        temperature (`float`, *optional*, defaults to `1.0`): Loss temperature T, applied to both sides.
        logit_scale (`float`, *optional*, defaults to `1.0`): Multiplier of the draft's raw logits.
        softcap (`float`, *optional*): Soft cap of the draft's logits, after the scale.
        vocab_size (`int`, *optional*): Number of real ids; rows of `weight` beyond it are padding and take no part.
        chunk_tokens (`int`, *optional*): Tokens per chunk; the default keeps one buffer at 64 MiB.

    Returns:
        `DivergenceOutput`
    """
    vocab_size = weight.shape[0] if vocab_size is None else vocab_size
    if temperature <= 0:
        raise ValueError(f"`temperature` must be positive, got {temperature}: it divides the logits of both models.")
    if not 0 < vocab_size <= weight.shape[0]:
        raise ValueError(f"`vocab_size` {vocab_size} does not fit a head of {weight.shape[0]} rows.")
    if not weight.is_floating_point():
        raise TypeError(f"The draft's head has dtype {weight.dtype}: a quantised head cannot be trained through.")
    if chunk_tokens is None:
        chunk_tokens = max(1, min(MAX_CHUNK_TOKENS, CHUNK_ELEMENTS // vocab_size))
    device = hidden.device.type
    is_autocast = torch.is_autocast_enabled(device)
    settings = _Settings(
        divergence=divergence,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        vocab_size=vocab_size,
        chunk_tokens=chunk_tokens,
        compute_dtype=torch.get_autocast_dtype(device) if is_autocast else hidden.dtype,
        # Inside `forward` gradient mode is always off and `needs_input_grad` ignores it: ask here.
        has_gradient=torch.is_grad_enabled(),
    )
    return DivergenceOutput(*_FusedLinearDivergence.apply(hidden, weight, bias, teacher_logits, labels, settings))


class _FusedLinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, teacher_logits, labels, settings: _Settings):
        needs_hidden, needs_weight, needs_bias = (settings.has_gradient and need for need in ctx.needs_input_grad[:3])
        num_tokens, vocab_size = hidden.shape[0], settings.vocab_size
        # float32 buffers: 1/num_items and a GradScaler's factor arrive in the backward, after the sums are complete
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias else None
        per_token = [hidden.new_zeros(num_tokens, dtype=torch.float32) for _ in range(3)]
        value, entropy, alpha = per_token
        is_top1 = torch.zeros(num_tokens, dtype=torch.bool, device=hidden.device)

        head = weight[:vocab_size].to(settings.compute_dtype)
        head_bias = None if bias is None else bias[:vocab_size].float()
        for start in range(0, num_tokens, settings.chunk_tokens):
            chunk = slice(start, min(start + settings.chunk_tokens, num_tokens))
            chunk_hidden = hidden[chunk].to(settings.compute_dtype)
            z, cap_slope = _scaled_logits(chunk_hidden @ head.T, head_bias, settings)  # (n, V)
            log_q = torch.log_softmax(z, dim=-1)
            del z
            target = teacher_logits(chunk).float()
            if target.shape != log_q.shape:
                raise ValueError(f"Teacher logits have shape {tuple(target.shape)}, expected {tuple(log_q.shape)}.")
            log_p = torch.log_softmax(target / settings.temperature, dim=-1)
            del target
            d = TokenDistributions(p=log_p.exp(), log_p=log_p, q=log_q.exp(), log_q=log_q)
            value[chunk] = settings.divergence.compute_value(d)
            entropy[chunk] = -(d.q * d.log_q).sum(-1)
            alpha[chunk] = compute_alpha(d.p, d.q)
            is_top1[chunk] = d.q.argmax(-1) == labels[chunk]
            if not (needs_hidden or needs_weight or needs_bias):
                continue

            grad_logits = settings.divergence.compute_gradient(d, value[chunk])  # dD/dz, (n, V)
            del d, log_p, log_q
            grad_logits.mul_(settings.logit_scale / settings.temperature)
            if cap_slope is not None:
                grad_logits.mul_(cap_slope)
            if needs_bias:
                grad_bias[:vocab_size] += grad_logits.sum(0)
            _accumulate_products(grad_logits, chunk, hidden, head, weight, settings, grad_hidden, grad_weight)

        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.input_dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(*per_token, is_top1)
        return value.sum(), value, entropy, alpha, is_top1

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        gradients = (
            # A new tensor, never in place: with `retain_graph` this runs again on the same saved gradients.
            None if saved is None else (saved * grad_loss).to(dtype)
            for saved, dtype in zip(ctx.saved_tensors, ctx.input_dtypes, strict=True)
        )
        return (*gradients, None, None, None)


def _scaled_logits(
    raw: torch.Tensor, bias: torch.Tensor | None, settings: _Settings
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """z = transform(raw + bias) / T in float32, and the slope of the soft cap (`None` without one)."""
    z = raw.float()
    if bias is not None:
        z = z + bias
    if settings.logit_scale != 1.0:
        z = z * settings.logit_scale
    slope = None
    if settings.softcap is not None:
        tanh = torch.tanh(z / settings.softcap)
        slope = 1.0 - tanh.square()
        z = settings.softcap * tanh
    return (z if settings.temperature == 1.0 else z / settings.temperature), slope


def _accumulate_products(grad_logits, chunk, hidden, head, weight, settings, grad_hidden, grad_weight) -> None:
    """grad_hidden[chunk] = dL @ W and grad_weight += dL.T @ hidden, in the compute dtype with float32 sums.

    float16 is the exception: most entries of dL lie below its smallest number, and the factor with which a GradScaler
    would lift them is not known yet, so these two products run in float32.
    """
    dtype = torch.float32 if settings.compute_dtype == torch.float16 else settings.compute_dtype
    with torch.autocast(hidden.device.type, enabled=False):
        grad_logits = grad_logits.to(dtype)
        if grad_hidden is not None:
            grad_hidden[chunk] = grad_logits @ (
                head if dtype == settings.compute_dtype else weight[: settings.vocab_size].to(dtype)
            )
        if grad_weight is not None:
            rows = grad_weight[: settings.vocab_size]
            if dtype == torch.float32:
                rows.addmm_(grad_logits.T, hidden[chunk].to(dtype))
            else:
                rows += grad_logits.T @ hidden[chunk].to(dtype)
