"""Selections of the tokens that a loss is taken over, for any divergence.

A selection reads scores of *all* tokens, from a pass without gradients, and returns a mask. Selections that keep a
share do so within each sequence, so that splitting a batch in another way changes nothing. The loss stays a mean over
all tokens of the completions; a token that is not kept counts as zero.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import cast

import torch
from typing_extensions import override

from spec_kd.acceptance import weigh_
from spec_kd.losses.divergences import Divergence, ForwardKL, TokenDistributions
from spec_kd.open_types import Arguments

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
    if name != ALL_TOKENS and name not in TOKEN_SELECTIONS:
        raise ValueError(
            f"Unknown `token_selection` {name!r}. Choose one of: {', '.join([ALL_TOKENS, *sorted(TOKEN_SELECTIONS)])}."
        )
    cls = TOKEN_SELECTIONS.get(name)
    options: Arguments = {} if fraction is None else {"fraction": fraction}
    if options and not (cls and issubclass(cls, _TopFraction)):
        raise ValueError(
            f"`token_selection={name!r}` does not keep a fixed share, so `token_selection_fraction={fraction}` has no "
            f"meaning. Leave it out, or choose {AdaSPEC.name!r} or {TargetEntropy.name!r}."
        )
    return cls(**options) if cls else None
