"""The fused loss over the tokens that a selection keeps: one pass scores all tokens, and the loss is over some."""

from dataclasses import dataclass, replace
from typing import Protocol

import torch

from spec_kd.losses.divergences import Divergence
from spec_kd.losses.fused_linear import DivergenceOutput, fused_linear_divergence
from spec_kd.losses.selection import TokenScores, TokenSelection
from spec_kd.losses.sparse import SparseMethod, SparseTensors
from spec_kd.open_types import Argument, Chunk


class TokenTargets(Protocol):
    """What a teacher knows of N tokens: a function as `fused_linear_divergence` needs it, which a mask can divide."""

    def __call__(self, chunk: Chunk) -> torch.Tensor | SparseTensors:
        """Teacher logits `(n, V)`, or a sparse teacher, of the n tokens of a chunk."""

    def __getitem__(self, mask: torch.Tensor) -> "TokenTargets":
        """The same of the tokens that a mask, bool `(N,)`, keeps."""


@dataclass(frozen=True)
class TokenLoss:
    """The loss that a white-box run minimizes.

    Args:
        divergence (`Divergence`): D.
        temperature (`float`, *optional*, defaults to `1.0`): Loss temperature.
        ce_weight (`float`, *optional*, defaults to `0.0`): Weight of the cross-entropy on the written token.
        selection (`TokenSelection`, *optional*): Selection of tokens; all by default.
    """

    divergence: Divergence
    temperature: float = 1.0
    ce_weight: float = 0.0
    selection: TokenSelection | None = None

    def check_served_by(self, method: SparseMethod) -> None:
        """Raises `ValueError` unless `method` serves the divergence, and the score of the selection if there is one."""
        method.check_serves(self.divergence)
        if self.selection is not None:
            method.check_serves(self.selection.score)


def selected_linear_divergence(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: TokenTargets,
    labels: torch.Tensor,
    loss: TokenLoss,
    *,
    sequence: torch.Tensor,
    reference: torch.Tensor | None = None,
    **head: Argument,
) -> tuple[DivergenceOutput, torch.Tensor]:
    """[`fused_linear_divergence`] over the tokens that `loss.selection` keeps.

    Without a selection that is one call. With a selection all tokens are scored without gradients first (two products
    each, against four for the loss). The metrics are then of all tokens, `loss` is the sum over those kept, and
    `divergence` is 0 at the others.

    Args:
        hidden, weight, targets, labels: As for `fused_linear_divergence`.
        loss (`TokenLoss`): The loss.
        sequence (`torch.Tensor`): Which sequence a token belongs to, int64 `(N,)`.
        reference (`torch.Tensor`, *optional*): KL(p‖q_ref) per token `(N,)`, for selections that need it.
        head: Arguments `bias`, `logit_scale`, `softcap` and `vocab_size` of the draft's head.

    Returns:
        The output, and whether each token was kept, bool `(N,)`.
    """
    options = {**head, "temperature": loss.temperature}
    final = {**options, "divergence": loss.divergence, "ce_weight": loss.ce_weight}
    if loss.selection is None:
        return fused_linear_divergence(hidden, weight, targets, labels, **final), torch.ones_like(labels).bool()
    with torch.no_grad():
        scores = fused_linear_divergence(hidden, weight, targets, labels, divergence=loss.selection.score, **options)
        kept = loss.selection.select(TokenScores(scores.divergence, scores.is_top1, sequence, reference))
    output = fused_linear_divergence(hidden[kept], weight, targets[kept], labels[kept], **final)
    divergence = torch.zeros_like(scores.divergence).masked_scatter_(kept, output.divergence)
    return replace(scores, loss=output.loss, divergence=divergence), kept
