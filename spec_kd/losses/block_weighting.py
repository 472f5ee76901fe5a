"""Losses of drafts that draft a block of tokens in one pass: how much each position of a block counts.

A token of a block is of use only where all tokens before it are accepted. So the gradient of a block's expected
accepted length is a gradient per token times a weight that the other tokens of the block decide. A weighting says what
that weight is; it is a constant for the gradient.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from typing_extensions import override

DEFAULT_SMOOTHING = 0.5
"""Smoothing of D-PACE's reference code."""


@dataclass(frozen=True)
class Blocks:
    """Which block each of N scored tokens belongs to, and where in it.

    Blocks have K positions, of which the last ones may be left out.

    Args:
        block (`torch.Tensor`): Number of the block, int64 `(N,)`, below `num_blocks`.
        position (`torch.Tensor`): Position in the block from 0 to K - 1, int64 `(N,)`.
        num_blocks (`int`): S.
        num_available (`torch.Tensor`): Blocks that could have each position, before some were left out, int64 `(K,)`.
    """

    block: torch.Tensor
    position: torch.Tensor
    num_blocks: int
    num_available: torch.Tensor

    @property
    def num_tokens(self) -> int:
        """K."""
        return len(self.num_available)

    @property
    def scale(self) -> torch.Tensor:
        """Blocks that could have a position over those that have it, float32 `(K,)`, so that sums stay unbiased."""
        kept = torch.bincount(self.position, minlength=self.num_tokens)
        return self.num_available.to(kept.device) / kept.clamp(min=1)

    def arrange(self, values: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
        """Values per token `(N,)` as a row per block, `(S, K)`, with `fill` at positions that are left out."""
        grid = values.new_full((self.num_blocks, self.num_tokens), fill)
        grid[self.block, self.position] = values
        return grid

    def pick(self, grid: torch.Tensor) -> torch.Tensor:
        """The inverse of [`arrange`]: the values `(N,)` of the scored tokens."""
        return grid[self.block, self.position]

    def compute_accepted(self, acceptance: torch.Tensor) -> torch.Tensor:
        """Expected accepted tokens per block, `(S,)`: sum over k of the product of a_1 .. a_k.

        Args:
            acceptance (`torch.Tensor`): a per token, `(N,)`.
        """
        return (self.arrange(acceptance).cumprod(-1) * self.scale).sum(-1)


class BlockWeighting(ABC):
    """How much each position of a block counts.

    Attributes:
        name (`str`): Name in options.
        score (`str`, *optional*): What the weights are computed from: `"acceptance"` or `"confidence"`, the target's
            probability of the written token.
    """

    name: str
    score: str | None = None

    @abstractmethod
    def weigh(self, blocks: Blocks, scores: torch.Tensor | None) -> torch.Tensor:
        """Weight of each scored token, float32 `(N,)`.

        Args:
            blocks (`Blocks`): The scored tokens.
            scores (`torch.Tensor`, *optional*): What `score` names, per token, `(N,)`.
        """

    def compute_value(self, blocks: Blocks, scores: torch.Tensor | None) -> torch.Tensor | None:
        """Value of the loss, where it is not the weighted sum of the divergences; `None` by default."""
        return None


class PositionWeights(BlockWeighting):
    """Fixed weights: w_k over the sum of share_k w_k, so that the loss is a weighted mean of the scored tokens.

    Args:
        weights (`Sequence[float]`): w_1 .. w_K, not negative and not all 0.
        shares (`Sequence[float]`): Share of the blocks that keeps each position.
    """

    name = "position"

    def __init__(self, weights: Sequence[float], shares: Sequence[float]):
        total = sum(weight * share for weight, share in zip(weights, shares, strict=True))
        self.weights = [weight / total for weight in weights]

    @override
    def weigh(self, blocks: Blocks, scores: torch.Tensor | None) -> torch.Tensor:
        return torch.tensor(self.weights, device=blocks.position.device)[blocks.position]


class ExpectedLength(BlockWeighting):
    """The gradient of the expected accepted length E = sum_k a_1 .. a_k with respect to each a_j = sum_v min(p, q).

    dE/da_j = (a_1 .. a_{j-1}) (1 + a_{j+1} + a_{j+1} a_{j+2} + ...). With the TVD, 1 - a_j, as the divergence the loss
    has exactly the gradient of -E. Its value is the expected number of tokens of a block that are not accepted.
    """

    name = "expected_length"
    score = "acceptance"

    @override
    def weigh(self, blocks: Blocks, scores: torch.Tensor | None) -> torch.Tensor:
        assert scores is not None
        before, after = _split_products(blocks, scores)
        return blocks.pick(before * after)

    @override
    def compute_value(self, blocks: Blocks, scores: torch.Tensor | None) -> torch.Tensor | None:
        assert scores is not None
        whole = blocks.compute_accepted(torch.ones_like(scores))
        return (whole - blocks.compute_accepted(scores)).sum()


class DPace(BlockWeighting):
    """D-PACE (arXiv 2605.18810): the contribution of each log a_j to the expected accepted length, with a smoothed.

    w_j = sum_{k >= j} a'_1 .. a'_k with a' = (1 - s) a + s. In the paper a is the draft's probability of the written
    token, and in training without the target's distribution as well; with it, a = sum_v min(p, q).

    Args:
        smoothing (`float`, *optional*, defaults to `0.5`): s in [0, 1).
    """

    name = "d_pace"
    score = "acceptance"

    def __init__(self, smoothing: float = DEFAULT_SMOOTHING):
        self.smoothing = smoothing

    @override
    def weigh(self, blocks: Blocks, scores: torch.Tensor | None) -> torch.Tensor:
        assert scores is not None
        smooth = scores + self.smoothing * (1 - scores)
        before, after = _split_products(blocks, smooth)
        return blocks.pick(before * after) * smooth


class TargetConfidence(BlockWeighting):
    """PARD-2's confidence-adaptive weights (arXiv 2605.08632): w_j = p(x_1) .. p(x_{j-1}).

    p is the target's probability of a written token: a token counts as much as the target was sure of the tokens of the
    block before it.
    """

    name = "target_confidence"
    score = "confidence"

    @override
    def weigh(self, blocks: Blocks, scores: torch.Tensor | None) -> torch.Tensor:
        assert scores is not None
        return blocks.pick(_split_products(blocks, scores)[0])


BLOCK_WEIGHTINGS: dict[str, type[BlockWeighting]] = {
    cls.name: cls for cls in (PositionWeights, ExpectedLength, DPace, TargetConfidence)
}


def _split_products(blocks: Blocks, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """a_1 .. a_{j-1} and sum_{k >= j} scale_k a_{j+1} .. a_k at each position j of each block, `(S, K)` each."""
    a = blocks.arrange(scores)  # (S, K)
    before = torch.cat([torch.ones_like(a[:, :1]), a[:, :-1]], dim=-1).cumprod(-1)
    terms = blocks.arrange(torch.ones_like(scores)) * blocks.scale
    after = torch.empty_like(a)
    total = torch.zeros_like(a[:, 0])
    for j in reversed(range(blocks.num_tokens)):
        after[:, j] = total = terms[:, j] + total
        total = total * a[:, j]
    return before, after
