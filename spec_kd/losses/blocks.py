"""The fused loss over blocks of tokens, each position with the weight that it has in its block."""

from dataclasses import replace

import torch

from spec_kd.losses.block_weighting import Blocks
from spec_kd.losses.fused_linear import DivergenceOutput, fused_linear_divergence
from spec_kd.losses.selection import TokenLoss, TokenTargets
from spec_kd.losses.sparse import SparseTensors
from spec_kd.open_types import Argument, Chunk


class RepeatedTargets:
    """What a teacher knows of tokens that are scored several times, each computed once for a chunk.

    Args:
        targets (`TokenTargets`): What the teacher knows of M tokens.
        index (`torch.Tensor`): Which of them each of N scored tokens is, int64 `(N,)`, ascending.
    """

    def __init__(self, targets: TokenTargets, index: torch.Tensor):
        self.targets, self.index = targets, index

    def __getitem__(self, mask: torch.Tensor) -> "RepeatedTargets":
        return RepeatedTargets(self.targets, self.index[mask])

    def __call__(self, chunk: Chunk) -> torch.Tensor | SparseTensors:
        """As [`TokenTargets`]."""
        rows, inverse = self.index[chunk].unique_consecutive(return_inverse=True)
        return self.targets[rows](slice(0, len(rows)))[inverse]


def block_linear_divergence(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: TokenTargets,
    labels: torch.Tensor,
    loss: TokenLoss,
    blocks: Blocks,
    *,
    confidence: torch.Tensor | None = None,
    **head: Argument,
) -> DivergenceOutput:
    """[`fused_linear_divergence`] over the tokens of blocks, weighted within each block.

    A weighting by acceptance scores all tokens without gradients first (two products each, against four for the loss).

    Args:
        hidden (`torch.Tensor`), weight (`torch.Tensor`), labels (`torch.Tensor`): As for `fused_linear_divergence`.
        targets (`Callable`): The `teacher` of `fused_linear_divergence`.
        loss (`TokenLoss`): The loss of a token, and how much each position counts; its selection is not read.
        blocks (`Blocks`): The block and the position of each token.
        confidence (`torch.Tensor`, *optional*):
            The target's probability of each written token, `(N,)`, for weightings that read it.
        head: Arguments `bias`, `logit_scale`, `softcap` and `vocab_size` of the draft's head.

    Returns:
        `DivergenceOutput`: `loss` is the weighted sum.
    """
    options = {**head, "temperature": loss.temperature, "divergence": loss.divergence}
    weighting, scores = loss.weighting, confidence
    assert weighting is not None
    if weighting.score == "acceptance":
        with torch.no_grad():
            scores = fused_linear_divergence(hidden, weight, targets, labels, **options).alpha
    output = fused_linear_divergence(
        hidden,
        weight,
        targets,
        labels,
        **options,
        ce_weight=loss.ce_weight,
        token_weights=weighting.weigh(blocks, scores),
    )
    value = weighting.compute_value(blocks, scores)
    return output if value is None else replace(output, loss=output.loss + (value - output.loss).detach())
