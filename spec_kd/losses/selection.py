"""Selections of the tokens that a loss is taken over, for any divergence, and the fused loss over those tokens.

A selection reads scores of *all* tokens, from a pass without gradients, and returns a mask. Selections that keep a
share do so within each sequence, so that splitting a batch in another way changes nothing. The loss stays a mean over
all tokens of the completions; a token that is not kept counts as zero.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Protocol, cast

import torch
from typing_extensions import override

from spec_kd.acceptance import weigh_
from spec_kd.losses.block_weighting import BlockWeighting
from spec_kd.losses.divergences import Divergence, ForwardKL, TokenDistributions
from spec_kd.losses.fused_linear import DivergenceOutput, fused_linear_divergence
from spec_kd.losses.sparse import SparseMethod, SparseTensors
from spec_kd.open_types import Argument, Arguments, Chunk
from spec_kd.options import refuse

DEFAULT_FRACTION = 0.4


@dataclass(frozen=True)
class TokenScores:
    """Scores that a selection may use, for N tokens of a batch.

    Args:
        value (`torch.Tensor`): `TokenSelection.score` of draft and teacher per token, float32 `(N,)`.
        is_top1 (`torch.Tensor`): Whether the written token is the draft's most likely one, bool `(N,)`.
        sequence (`torch.Tensor`): Which sequence a token belongs to, int64 `(N,)`, any numbers.
        reference (`torch.Tensor`, *optional*): KL(p‖q_ref) per token, float32 `(N,)`, if a reference was given.
    """

    value: torch.Tensor
    is_top1: torch.Tensor
    sequence: torch.Tensor
    reference: torch.Tensor | None = None


class TokenSelection(ABC):
    """A rule that keeps some tokens of the loss."""

    name: str
    score: Divergence = ForwardKL()
    """Divergence that the scoring pass computes per token."""
    needs_reference: bool = False

    @abstractmethod
    def select(self, scores: TokenScores) -> torch.Tensor:
        """The tokens to keep, bool `(N,)`."""


class _TopFraction(TokenSelection):
    """Keeps the top share of every sequence, by a score.

    Args:
        fraction (`float`, *optional*, defaults to `0.4`): Share in (0, 1]; rounded up, so that a sequence keeps one.
    """

    def __init__(self, fraction: float = DEFAULT_FRACTION):
        if not 0.0 < fraction <= 1.0:
            raise ValueError(
                f"`token_selection_fraction` must lie in (0, 1], got {fraction}: the share of each sequence to keep."
            )
        self.fraction = fraction


class AdaSPEC(_TopFraction):
    """The tokens a draft can still learn: top share by KL(p‖q) - KL(p‖q_ref) (AdaSPEC, arXiv 2510.19779).

    q_ref is a draft that was distilled before. A token where the reference is far from the target as well is too hard
    for a model of this size; a token where the draft is as near as the reference is learned.
    """

    name = "adaspec"
    needs_reference = True

    @override
    def select(self, scores: TokenScores) -> torch.Tensor:
        return select_top_fraction(scores.value - cast(torch.Tensor, scores.reference), scores.sequence, self.fraction)


class TargetEntropy(_TopFraction):
    """The tokens where the target is least sure: top share by the entropy of p (cf. arXiv 2601.18902, for samples).

    Acceptance is gained at flat tokens; peaked ones are learned soon.
    """

    name = "target_entropy"

    class _Entropy(Divergence):
        name = "target_entropy"
        is_coarsenable = True  # a lower bound

        @override
        def compute_value(self, d: TokenDistributions) -> torch.Tensor:
            return -weigh_(d.log_p.clone(), d.p).sum(-1)

        @override
        def compute_gradient(self, d: TokenDistributions, value: torch.Tensor) -> torch.Tensor:
            raise NotImplementedError("The entropy of the target is a score, not a loss.")

        @override
        def compute_sampled(
            self, log_p: torch.Tensor | None, log_q: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor] | None:
            return None if log_p is None else (-log_p, torch.zeros_like(log_p))

    score = _Entropy()

    @override
    def select(self, scores: TokenScores) -> torch.Tensor:
        return select_top_fraction(scores.value, scores.sequence, self.fraction)


class RejectedOnly(TokenSelection):
    """The tokens that a greedy draft would have lost: its most likely id is not the one that the target wrote.

    Offline form of Online Speculative Decoding's loss at rejected positions (arXiv 2310.07177).
    """

    name = "rejected"

    @override
    def select(self, scores: TokenScores) -> torch.Tensor:
        return ~scores.is_top1


ALL_TOKENS = "all"
TOKEN_SELECTIONS: dict[str, type[TokenSelection]] = {cls.name: cls for cls in (AdaSPEC, TargetEntropy, RejectedOnly)}


def select_top_fraction(score: torch.Tensor, sequence: torch.Tensor, fraction: float) -> torch.Tensor:
    """The ceil(fraction * n) highest-scored of the n tokens of every sequence; of equals, the earlier.

    Args:
        score (`torch.Tensor`): `(N,)`; NaN counts as highest, so that the loss becomes NaN and the training stops.
        sequence (`torch.Tensor`): int64 `(N,)`, which sequence a token belongs to.
        fraction (`float`): In (0, 1].

    Returns:
        `torch.Tensor`: bool `(N,)`.
    """
    score = score.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)
    by_score = score.argsort(descending=True, stable=True)
    order = by_score[sequence[by_score].argsort(stable=True)]  # by sequence, then by score
    _, index, counts = sequence[order].unique_consecutive(return_inverse=True, return_counts=True)
    starts = counts.cumsum(0) - counts
    rank = torch.arange(len(score), device=score.device) - starts[index]
    # In float64, less an ulp or so: 0.4 of 5 tokens is 2 of them, not 3
    kept = torch.ceil(counts.double() * fraction - 1e-9).clamp(min=1)
    mask = torch.empty_like(index, dtype=torch.bool)
    mask[order] = rank < kept[index]
    return mask


def build_selection(name: str = ALL_TOKENS, fraction: float | None = None) -> TokenSelection | None:
    """The selection for a name, `None` for `"all"`.

    Args:
        name (`str`): `"all"` or a name of `TOKEN_SELECTIONS`.
        fraction (`float`, *optional*): Share to keep, where the selection keeps a share; 0.4 by default.

    Raises:
        ValueError: For an unknown name, a fraction outside (0, 1], or one that the selection has no use for.
    """
    cls = TOKEN_SELECTIONS.get(name)
    refuse(
        (
            name != ALL_TOKENS and cls is None,
            f"Unknown `token_selection` {name!r}. Choose one of: {', '.join([ALL_TOKENS, *sorted(TOKEN_SELECTIONS)])}.",
        ),
        (
            fraction is not None and not (cls and issubclass(cls, _TopFraction)),
            f"`token_selection={name!r}` does not keep a fixed share, so `token_selection_fraction={fraction}` has no "
            f"meaning. Leave it out, or choose {AdaSPEC.name!r} or {TargetEntropy.name!r}.",
        ),
    )
    options: Arguments = {} if fraction is None else {"fraction": fraction}
    return cls(**options) if cls else None


class TokenTargets(Protocol):
    """What a teacher knows of N tokens: a function as `fused_linear_divergence` needs it, which a mask can divide."""

    def __call__(self, chunk: Chunk, /) -> torch.Tensor | SparseTensors:
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
        weighting (`BlockWeighting`, *optional*):
            Weight of each position of a block, for a draft that drafts several tokens in one pass.
    """

    divergence: Divergence
    temperature: float = 1.0
    ce_weight: float = 0.0
    selection: TokenSelection | None = None
    weighting: BlockWeighting | None = None

    def check_served_by(self, method: SparseMethod) -> None:
        """Raises `ValueError` unless `method` serves the divergence, and what a selection or a weighting reads."""
        method.check_serves(self.divergence)
        if self.weighting is not None and self.weighting.score == "acceptance" and method.alpha_metric is None:
            raise ValueError(
                f"A teacher kept as {method.name!r} does not say what is accepted, which "
                f"`parallel_weighting={self.weighting.name!r}` reads. Use 'position' or 'target_confidence', or "
                "another teacher signal."
            )
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
