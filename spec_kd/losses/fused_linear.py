"""Draft head and divergence as one autograd function, which keeps nothing of the size tokens x vocabulary.

For each chunk of tokens the forward pass computes teacher logits, draft logits, value and dD/dz, and at once the
products that carry dD/dz back to the hidden states and the head. The backward pass only multiplies the stored gradients
by the incoming scalar. That is four matrix products per token (draft forward, two gradients, teacher forward), three
with a sparse teacher; recomputing the logits in the backward, as chunked losses usually do, takes six.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable

from spec_kd._private import is_graph_retained
from spec_kd.heads import accumulate_product, project
from spec_kd.losses.divergences import Divergence
from spec_kd.losses.sparse import SparseTensors
from spec_kd.losses.tile import TileSettings, choose_compute_tile, choose_tile_tokens
from spec_kd.open_types import Argument, Chunk
from spec_kd.options import check_number

# Elements of one `(chunk, V)` buffer; two live at a time, draft logits (overwritten by their gradient) and teacher's.
# 80 MiB of float32 on a CPU for few tokens, and more for many, up to 192 MiB: larger products are faster, and the
# memory stays small beside what is saved. On a GPU more at once, where many small products would leave it idle.
CHUNK_ELEMENTS = 20 * 2**20
MAX_CHUNK_ELEMENTS = 48 * 2**20
CHUNKS_WANTED = 8
GPU_CHUNK_ELEMENTS = 2**27
MAX_CHUNK_TOKENS = 1024
# Elements that rows of logits start at multiples of. Of 16-bit numbers eight are 16 bytes, without which cuBLAS takes
# kernels that are several times slower (H100, 151,665 ids, 896 hidden units: 2.4 ms a product of 878 tokens).
GPU_ALIGNMENT = 8
# glibc hands freed memory back to the kernel beyond twice the largest block it has seen freed. Tiles free megabytes all
# the time, and each page costs a fault when it is wanted again: 0.6 s instead of 0.25 s per 512 tokens x 151,936. A
# block of this size, allocated, not touched and freed, ends that; elsewhere it does nothing.
HEAP_BYTES = 24 * 2**20

Teacher = Callable[[Chunk], torch.Tensor | SparseTensors]


@dataclass(frozen=True)
class DivergenceOutput:
    """Results of `fused_linear_divergence`.

    Args:
        loss (`torch.Tensor`): Weighted sum of the loss over all tokens, float32 scalar, with gradient.
        divergence (`torch.Tensor`): Divergence per token, `(N,)`, no gradient, without the cross-entropy mixed in.
        entropy (`torch.Tensor`): Entropy of q per token in nats, `(N,)`, no gradient.
        alpha (`torch.Tensor`):
            sum_v min(p, q) per token at the loss temperature, `(N,)`, no gradient; from a sparse teacher what its
            method says of it, NaN if nothing.
        is_top1 (`torch.Tensor`): Whether the label is the draft's most likely token, bool `(N,)`.
    """

    loss: torch.Tensor
    divergence: torch.Tensor
    entropy: torch.Tensor
    alpha: torch.Tensor
    is_top1: torch.Tensor


def fused_linear_divergence(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    teacher: Teacher,
    labels: torch.Tensor,
    *,
    divergence: Divergence,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    ce_weight: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    token_weights: torch.Tensor | None = None,
    chunk_tokens: int | None = None,
) -> DivergenceOutput:
    """Sum over tokens of w ((1 - c) D(p, q) + c CE).

    Here q = softmax(transform(hidden @ weight.T + bias) / temperature). The gradients are those of the stated value:
    dD/dlogits = (1/T) dD/dz, and no T^2 factor is applied. Matrix products run in the autocast dtype, or else in the
    dtype of `hidden`; everything elementwise, the sums and the stored gradients are float32. Only one backward order is
    supported (`once_differentiable`).

    Args:
        hidden (`torch.Tensor`): Draft hidden states of the tokens of the loss, `(N, H)`. N = 0 gives a zero loss.
        weight (`torch.Tensor`): Draft head, `(rows, H)` with `rows >= vocab_size`.
        teacher (`Callable[[slice], torch.Tensor | SparseTensors]`):
            Returns, for a slice of the N tokens, the teacher's logits `(n, vocab_size)` before the temperature, or
            the data of a sparse teacher ([`SparseTensors`] is such a function). Called once per chunk under no_grad.
        labels (`torch.Tensor`): Written token per position, int64 `(N,)`, for `is_top1` and the cross-entropy.
        divergence (`Divergence`): D.
        bias (`torch.Tensor`, *optional*): Draft head bias, `(rows,)`.
        temperature (`float`, *optional*, defaults to `1.0`):
            Loss temperature T, applied to both sides. The probabilities of a sparse teacher must be at T already.
        ce_weight (`float`, *optional*, defaults to `0.0`):
            c in [0, 1): weight of the cross-entropy on the written token, always at temperature 1.
        logit_scale (`float`, *optional*, defaults to `1.0`): Multiplier of the draft's raw logits.
        softcap (`float`, *optional*): Soft cap of the draft's logits, after the scale.
        vocab_size (`int`, *optional*): Number of real ids; rows of `weight` beyond it are padding and take no part.
        token_weights (`torch.Tensor`, *optional*): Weight w of each token, a constant, float32 `(N,)`; 1 by default.
        chunk_tokens (`int`, *optional*): Maximum number of tokens per chunk; by default a buffer has 80 to 192 MiB on a
            CPU.

    Returns:
        `DivergenceOutput`

    Raises:
        ValueError: For an impossible temperature, weight or shape, before anything is computed.
        TypeError: If the head's weight is quantized.
    """
    vocab_size = weight.shape[0] if vocab_size is None else vocab_size
    check_number("temperature", temperature, above=0, reason="It divides the logits of both models.")
    check_number("ce_weight", ce_weight, 0, below=1, reason="For pure cross-entropy use BlackBoxSFTTrainer.")
    if not 0 < vocab_size <= weight.shape[0]:
        raise ValueError(f"`vocab_size` {vocab_size} does not fit a head of {weight.shape[0]} rows.")
    if not weight.is_floating_point():
        raise TypeError(f"The draft's head has dtype {weight.dtype}: a quantized head cannot be trained through.")
    device = hidden.device.type
    chunk_tokens = choose_chunk_tokens(hidden.shape[0], vocab_size, device, chunk_tokens)
    compute_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    # Inside `forward` gradient mode is always off and `needs_input_grad` ignores it: ask here.
    needs_gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias))
    settings = TileSettings(divergence, temperature, logit_scale, softcap, ce_weight, needs_gradient)
    return DivergenceOutput(
        *_FusedLinearDivergence.apply(
            hidden, weight, bias, teacher, labels, token_weights, settings, vocab_size, chunk_tokens, compute_dtype
        )
    )


def choose_chunk_tokens(num_tokens: int, vocab_size: int, device_type: str, limit: int | None = None) -> int:
    """Tokens of a chunk: at most `limit` or what fits, and even, since a small last chunk would be a slow product."""
    if limit is None:
        on_cpu = max(CHUNK_ELEMENTS, min(num_tokens * vocab_size // CHUNKS_WANTED, MAX_CHUNK_ELEMENTS))
        elements = on_cpu if device_type == "cpu" else GPU_CHUNK_ELEMENTS
        limit = max(1, min(MAX_CHUNK_TOKENS, elements // vocab_size))
    num_chunks = max(1, -(-num_tokens // limit))
    return max(1, -(-num_tokens // num_chunks))


def choose_row_width(vocab_size: int, device_type: str) -> int:
    """Elements from one row of logits to the next: what the device's matrix products want, at least the vocabulary."""
    alignment = 1 if device_type == "cpu" else GPU_ALIGNMENT
    return -(-vocab_size // alignment) * alignment


class _FusedLinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Argument,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        teacher: Teacher,
        labels: torch.Tensor,
        token_weights: torch.Tensor | None,
        settings: TileSettings,
        vocab_size: int,
        chunk_tokens: int,
        compute_dtype: torch.dtype,
    ) -> tuple[torch.Tensor, ...]:
        needs = [settings.needs_gradient and need for need in ctx.needs_input_grad[:3]]
        # float32 buffers: 1/num_items and a GradScaler's factor arrive in the backward, after the sums are complete
        gradients = [
            torch.zeros_like(tensor, dtype=torch.float32) if tensor is not None and need else None
            for tensor, need in zip((hidden, weight, bias), needs, strict=True)
        ]
        num_tokens = hidden.shape[0]
        dtypes = [torch.float32] * 4 + [torch.bool]  # of loss, divergence, entropy, alpha and `is_top1`
        per_token = [hidden.new_zeros(num_tokens, dtype=dtype) for dtype in dtypes]

        width = choose_row_width(vocab_size, hidden.device.type)
        head = weight[:width].to(compute_dtype)  # (V, H), or a few more rows
        head_bias = None if bias is None else bias[:vocab_size].float()
        # One buffer for all chunks: fresh memory costs a CPU more than the passes over it
        buffer = head.new_empty(chunk_tokens, width)
        if hidden.device.type == "cpu":
            torch.empty(HEAP_BYTES, dtype=torch.uint8)
        for start in range(0, num_tokens, chunk_tokens):
            chunk = slice(start, min(start + chunk_tokens, num_tokens))
            products = buffer[: chunk.stop - start, : len(head)]
            project(hidden[chunk].to(compute_dtype), head, out=products)
            raw = products[:, :vocab_size]  # (n, V)
            target = _ask_teacher(teacher, chunk, raw.shape)
            measured = [values[chunk] for values in per_token]
            grad_raw = _run_tiles(raw, head_bias, target, labels[chunk], settings, measured)
            if grad_raw is not None:
                if token_weights is not None:
                    grad_raw.mul_(token_weights[chunk, None])
                _accumulate_gradients(_align(grad_raw, products), chunk, hidden, head, weight, gradients)

        ctx.save_for_backward(*gradients)
        ctx.input_dtypes = [None if t is None else t.dtype for t in (hidden, weight, bias)]
        loss, *metrics = per_token
        ctx.mark_non_differentiable(*metrics)
        return (loss if token_weights is None else loss * token_weights).sum(), *metrics

    @staticmethod
    @once_differentiable
    def backward(ctx: Argument, grad_loss: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # A copy would be a second float32 head; but a retained graph runs again on the same saved gradients
        scale = torch.Tensor.mul if is_graph_retained() else torch.Tensor.mul_
        saved = zip(ctx.saved_tensors, ctx.input_dtypes, strict=True)
        returned = [None if tensor is None else scale(tensor, grad_loss).to(dtype) for tensor, dtype in saved]
        return (*returned, *[None] * 7)


def _ask_teacher(teacher: Teacher, chunk: Chunk, shape: torch.Size) -> torch.Tensor | SparseTensors:
    target = teacher(chunk)
    if isinstance(target, SparseTensors):
        if len(target) != shape[0]:
            raise ValueError(f"The sparse teacher speaks of {len(target)} tokens, expected {shape[0]}.")
    elif target.shape != shape:
        raise ValueError(f"Teacher logits have shape {tuple(target.shape)}, expected {tuple(shape)}.")
    return target


def _run_tiles(
    raw: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor | SparseTensors,
    labels: torch.Tensor,
    settings: TileSettings,
    per_token: Sequence[torch.Tensor],
) -> torch.Tensor | None:
    """Fills the measurements of a chunk, and returns the gradient of its raw logits, which may take their place."""
    num_tokens, vocab_size = raw.shape
    compute_tile = choose_compute_tile(raw.device)
    tile_tokens = choose_tile_tokens(num_tokens, vocab_size, raw.device)
    grad_raw = None
    for start in range(0, num_tokens, tile_tokens):
        tile = slice(start, start + tile_tokens)
        result = compute_tile(raw[tile], bias, target[tile], labels[tile], settings)
        values = (result.loss, result.value, result.entropy, result.alpha, result.is_top1)
        for measured, value in zip(per_token, values, strict=True):
            measured[tile] = float("nan") if value is None else value
        if result.gradient is None:
            continue
        if tile_tokens >= num_tokens:
            return result.gradient
        if grad_raw is None:
            grad_raw = raw if result.gradient.dtype == raw.dtype else torch.empty_like(raw, dtype=torch.float32)
        grad_raw[tile] = result.gradient
    return grad_raw


def _align(grad_raw: torch.Tensor, products: torch.Tensor) -> torch.Tensor:
    """The gradient `(n, V)` with rows that start where those of the products `(n, >= V)` do, zero beyond V."""
    if grad_raw.dtype != products.dtype or (products.is_contiguous() and products.shape == grad_raw.shape):
        return grad_raw
    vocab_size = grad_raw.shape[1]
    products[:, :vocab_size] = grad_raw
    products[:, vocab_size:] = 0.0
    return products


def _accumulate_gradients(
    grad_products: torch.Tensor,
    chunk: Chunk,
    hidden: torch.Tensor,
    head: torch.Tensor,
    weight: torch.Tensor,
    gradients: Sequence[torch.Tensor | None],
) -> None:
    """grad_hidden[chunk] = dL @ W, grad_weight += dL.T @ hidden and grad_bias += sum dL, with float32 sums."""
    grad_hidden, grad_weight, grad_bias = gradients
    rows = slice(grad_products.shape[1])
    with torch.autocast(hidden.device.type, enabled=False):
        if grad_hidden is not None:
            used = head[rows] if head.dtype == grad_products.dtype else weight[rows].to(grad_products.dtype)
            grad_hidden[chunk] = grad_products @ used
        if grad_weight is not None:
            accumulate_product(grad_weight[rows], grad_products.T, hidden[chunk].to(grad_products.dtype))
    if grad_bias is not None:
        grad_bias[rows] += grad_products.sum(0, dtype=torch.float32)
