"""Products with a language-model head, in the order and precision that each device does best."""

import torch

# Rows of the head per product on a CPU. With few tokens its matrix library spends its time repacking the long,
# transposed head; taken in blocks that stay in the cache, as the left factor, it does not. Measured on 2 cores, 128
# tokens x 3,584 -> 151,936: 1.2 s as hidden @ weight.T, 0.8 s in blocks of 2,048 to 4,096 rows.
BLOCK_ROWS = 4096


def project(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes hidden @ weight.T + bias; without an `out` and with gradients it is `torch.nn.functional.linear`.

    Args:
        hidden (`torch.Tensor`): `(..., H)`.
        weight (`torch.Tensor`): `(V, H)` of the same dtype.
        bias (`torch.Tensor`, *optional*): `(V,)`.
        out (`torch.Tensor`, *optional*): Buffer for the result, `(..., V)`, contiguous, of the same dtype.

    Returns:
        `torch.Tensor`: `(..., V)`.
    """
    if out is None:
        if hidden.device.type != "cpu" or (torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)):
            return torch.nn.functional.linear(hidden, weight, bias)
        out = hidden.new_empty(*hidden.shape[:-1], weight.shape[0])
    flat, flat_out = hidden.reshape(-1, hidden.shape[-1]), out.view(-1, weight.shape[0])
    if hidden.device.type == "cpu":
        columns = flat.T.contiguous()  # (H, N)
        for start in range(0, weight.shape[0], BLOCK_ROWS):
            rows = slice(start, start + BLOCK_ROWS)
            flat_out[:, rows] = (weight[rows] @ columns).T
    else:
        torch.mm(flat, weight.T, out=flat_out)
    if bias is not None:
        flat_out += bias
    return out


def project_back(gradient: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Computes gradient @ weight, `(N, V)` by `(V, H)`: from the logits' gradient to the hidden states'."""
    if gradient.device.type == "cpu":
        return (weight.T @ gradient.T).T  # the same product a fifth faster, see above
    return gradient @ weight


def accumulate_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Adds a @ b to a float32 `total` `(M, N)`, without rounding the product to the dtype of a and b first."""
    if total.device.type == "cuda" and a.dtype in (torch.float16, torch.bfloat16):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())
