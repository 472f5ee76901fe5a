"""Loss, metrics and gradient of a few tokens from their raw logits: everything elementwise, in one place.

The same function runs on two kinds of tiles. On a CPU a tile is a few tokens, so small that its dozen passes stay in
the cache; a naive loss spends its time on memory bandwidth. On a GPU a tile is a whole chunk, and `torch.compile` fuses
the passes into a few Triton kernels. No divergence is written twice, and registered ones are fused as well.
"""

import functools
from dataclasses import dataclass

import torch
from transformers.utils import is_triton_available

from spec_kd.acceptance import LOG_ZERO, compute_alpha
from spec_kd.losses.divergences import Divergence, TokenDistributions, TokenDivergence
from spec_kd.losses.sparse import SparseTensors
from spec_kd.open_types import Call

# Elements of one float32 buffer of a tile: 2 MiB, so that the ten or so alive stay in a shared cache.
TILE_ELEMENTS = 2**19


@dataclass(frozen=True)
class TileSettings:
    """Settings that all tiles of a call share.

    Args:
        divergence (`Divergence`): D.
        temperature (`float`): Loss temperature T.
        logit_scale (`float`): Multiplier of the draft's raw logits.
        softcap (`float`, *optional*): Soft cap of the draft's logits, after the scale.
        ce_weight (`float`): Weight c of the cross-entropy on the written token: (1 - c) D + c CE.
        needs_gradient (`bool`): Whether the gradient is formed.
    """

    divergence: Divergence
    temperature: float
    logit_scale: float
    softcap: float | None
    ce_weight: float
    needs_gradient: bool


@dataclass(frozen=True)
class TileResult(TokenDivergence):
    """The divergence, with dloss/draw as its gradient.

    Args:
        loss (`torch.Tensor`): Loss per token, float32 `(n,)`.
        is_top1 (`torch.Tensor`): Whether no token is more likely than the label, bool `(n,)`; a tie counts.
    """

    loss: torch.Tensor
    is_top1: torch.Tensor


def compute_tile(
    raw: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor | SparseTensors,
    labels: torch.Tensor,
    settings: TileSettings,
) -> TileResult:
    """Loss, metrics and dloss/draw of a tile.

    Args:
        raw (`torch.Tensor`): hidden @ weight.T, `(n, V)`, any dtype; left as it is.
        bias (`torch.Tensor`, *optional*): Bias of the draft's head, float32 `(V,)`.
        target (`torch.Tensor` or `SparseTensors`): Teacher logits `(n, V)` before the temperature, or a sparse teacher.
        labels (`torch.Tensor`): Written tokens, int64 `(n,)`.
        settings (`TileSettings`): Settings of the call.

    Returns:
        `TileResult`: The gradient has the dtype of `raw`, but float32 for float16: that cannot hold most of the
        entries, and the factor with which a GradScaler would lift them is not known yet.
    """
    logits, cap_slope = _transform(raw, bias, settings)
    z = logits if settings.temperature == 1.0 else logits / settings.temperature
    if isinstance(target, SparseTensors):
        found = target.method.compute(z, target, settings.divergence, settings.needs_gradient)
    else:
        found = _compute_from_logits(z, target, settings)
    loss, gradient = found.value, found.gradient
    if gradient is not None and settings.temperature != 1.0:
        gradient = gradient.div_(settings.temperature)
    if settings.ce_weight:
        loss, gradient = _mix_cross_entropy(loss, gradient, logits, labels, settings.ce_weight)
    if gradient is not None:
        if cap_slope is not None:
            gradient = gradient.mul_(cap_slope)
        if settings.logit_scale != 1.0:
            gradient = gradient.mul_(settings.logit_scale)
        if raw.dtype != torch.float16:  # here, so that a compiler writes that dtype at once
            gradient = gradient.to(raw.dtype)
    return TileResult(
        found.value, found.entropy, found.alpha, gradient, loss, z.amax(-1) == z.gather(-1, labels[:, None])[:, 0]
    )


def _transform(
    raw: torch.Tensor, bias: torch.Tensor | None, settings: TileSettings
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The model's logits in float32, and the slope of the soft cap (`None` without one)."""
    logits = raw.float()
    if bias is not None:
        logits = logits + bias
    if settings.logit_scale != 1.0:
        logits = logits * settings.logit_scale
    if settings.softcap is None:
        return logits, None
    tanh = torch.tanh(logits / settings.softcap)
    return settings.softcap * tanh, 1.0 - tanh.square()


def _compute_from_logits(z: torch.Tensor, target: torch.Tensor, settings: TileSettings) -> TokenDivergence:
    log_q = torch.log_softmax(z, dim=-1)
    log_p = torch.log_softmax(target.float() / settings.temperature, dim=-1)
    d = TokenDistributions(p=log_p.exp(), log_p=log_p, q=log_q.exp(), log_q=log_q)
    value = settings.divergence.compute_value(d)
    entropy = -d.log_q.clamp(min=LOG_ZERO).mul_(d.q).sum(-1)
    gradient = settings.divergence.compute_gradient(d, value) if settings.needs_gradient else None
    return TokenDivergence(value, entropy, compute_alpha(d.p, d.q), gradient)


def _mix_cross_entropy(
    divergence: torch.Tensor,
    gradient: torch.Tensor | None,
    logits: torch.Tensor,
    labels: torch.Tensor,
    weight: float,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(1 - c) D + c CE; the cross-entropy is that of the draft as it samples, whatever the loss temperature."""
    log_q = torch.log_softmax(logits, dim=-1)
    index = labels[:, None]
    cross_entropy = -log_q.gather(-1, index).squeeze(-1)
    if gradient is not None:
        gradient = gradient.mul_(1.0 - weight).add_(log_q.exp_(), alpha=weight)
        gradient = gradient.scatter_add_(-1, index, gradient.new_full(index.shape, -weight))
    return (1.0 - weight) * divergence + weight * cross_entropy, gradient


def choose_tile_tokens(num_tokens: int, vocab_size: int, device: torch.device) -> int:
    """Tokens of a tile: a multiple of the threads that fits the cache on a CPU, all of them elsewhere."""
    if device.type != "cpu":
        return num_tokens
    threads = torch.get_num_threads()
    return max(1, TILE_ELEMENTS // vocab_size // threads) * threads


@functools.cache
def get_compiled_tile(backend: str = "inductor") -> Call[TileResult]:
    """`compute_tile` under `torch.compile`, one for the process: its caches live as long as it does."""
    return torch.compile(compute_tile, backend=backend)


def choose_compute_tile(device: torch.device) -> Call[TileResult]:
    """The compiled function where there is a Triton device, the plain one elsewhere."""
    is_compiled = device.type in ("cuda", "xpu") and is_triton_available()
    return get_compiled_tile() if is_compiled else compute_tile
