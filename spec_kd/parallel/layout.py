"""The masks that a parallel draft is trained with: where they stand, what they see, and which tokens they stand for.

A pass over a text and K - 1 masks drafts K tokens, and any token may be the last that is known. So training appends a
block of masks for every such token, a *start*, to the row that has it, and all blocks are computed in one pass
(PARD, arXiv 2504.18583). A mask sees what it sees in a server: the text up to its start, and the earlier masks of its
own block. The masks of a start t have the positions t + 1 .. t + K - 1, and stand for the tokens there.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from spec_kd.losses import Blocks


@dataclass(frozen=True)
class MaskLayout:
    """B rows of T tokens, and up to M masks after each of them: T + M places in a row.

    Args:
        last (`torch.Tensor`): Index of the last token that each place sees, int64 `(B, T + M)`.
        depth (`torch.Tensor`): Number of a mask in its block from 1 on, int64 `(B, T + M)`; 0 elsewhere.
        segment (`torch.Tensor`): Which sequence of a packed row each place belongs to, int64 `(B, T + M)`.
        is_text (`torch.Tensor`): Tokens that are not padding, bool `(B, T + M)`.
        positions (`torch.Tensor`): Position ids, int64 `(B, T + M)`.
        slots (`torch.Tensor`): Where the N scored distributions are among the B * (T + M) outputs, int64 `(N,)`.
        scored (`torch.Tensor`):
            Which of the tokens of the loss, row after row, each of them is a distribution of, int64 `(N,)`, ascending.
        blocks (`Blocks`): The block and the position of each; a token of the loss is the first of one block.
    """

    last: torch.Tensor
    depth: torch.Tensor
    segment: torch.Tensor
    is_text: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    scored: torch.Tensor
    blocks: Blocks

    def append_masks(self, input_ids: torch.Tensor, mask_token_id: int) -> torch.Tensor:
        """Ids of tokens and masks, `(B, T + M)`."""
        num_masks = self.positions.shape[1] - input_ids.shape[1]
        return torch.nn.functional.pad(input_ids, (0, num_masks), value=mask_token_id)

    def sees(self, row: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Whether a place attends to another one of its row, bool, for index tensors that broadcast."""
        depth = self.depth[row, key]
        is_same_text = self.is_text[row, key] & (self.segment[row, key] == self.segment[row, query])
        is_same_block = (depth > 0) & (self.last[row, key] == self.last[row, query])
        return (
            (is_same_text & (key <= self.last[row, query]))
            | (is_same_block & (depth <= self.depth[row, query]))
            | (query == key)  # padding and unused places see themselves: a softmax over nothing is NaN
        )

    def build_attention_mask(self) -> torch.Tensor:
        """Which places see which, bool `(B, 1, T + M, T + M)`."""
        row, index = (torch.arange(size, device=self.positions.device) for size in self.positions.shape)
        return self.sees(row[:, None, None], index[:, None], index)[:, None]


def compute_shares(num_tokens: int, retention: float, floor: float) -> list[float]:
    """Share of the starts that keeps each position of a block: max(r^(k - 1), floor) at k = 1 .. K (PARD's COD).

    Args:
        num_tokens (`int`): K.
        retention (`float`): r in (0, 1].
        floor (`float`): Least share, in [0, 1].
    """
    return [max(retention**k, floor) for k in range(num_tokens)]


def keep_starts(
    available: torch.Tensor, shares: Sequence[float], generator: torch.Generator | None = None
) -> torch.Tensor:
    """Chooses the blocks that have each position at random: conditional drop of tokens (PARD, arXiv 2504.18583).

    Position k is kept in round(share_k S) of the S blocks, as far as so many can have it, and only where the positions
    before it are kept. It is chosen from the last position on, so that the numbers are exact.

    Args:
        available (`torch.Tensor`): Positions that each of S blocks could have, bool `(S, K)`; all before one as well.
        shares (`Sequence[float]`): K shares that do not rise, the first of them 1.
        generator (`torch.Generator`, *optional*): Source of the choice; the global one by default.

    Returns:
        `torch.Tensor`: bool `(S, K)`.
    """
    kept = available.clone()
    draw = torch.rand(len(available), generator=generator, device=available.device)
    chosen = torch.zeros_like(available[:, 0])
    for k in range(available.shape[1] - 1, 0, -1):
        can_have = available[:, k]
        count = min(round(shares[k] * len(available)), int(can_have.sum()))
        order = draw.masked_fill(chosen, -1.0).masked_fill(~can_have, 2.0).argsort()
        chosen = torch.zeros_like(chosen)
        chosen[order[:count]] = True
        kept[:, k] = chosen
    return kept


def build_layout(
    labels: torch.Tensor,
    shares: Sequence[float],
    *,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> MaskLayout:
    """Places the masks of a batch.

    A block starts before each token of the loss, and ends before the first token after it that is not of the loss.

    Args:
        labels (`torch.Tensor`): int64 `(B, T)`, -100 outside of the loss.
        shares (`Sequence[float]`): Share of the starts that keeps each of the K positions, see [`compute_shares`].
        attention_mask (`torch.Tensor`, *optional*): 0 at padding on the right, `(B, T)`; none by default.
        position_ids (`torch.Tensor`, *optional*): Positions of packed rows, `(B, T)`, from 0 in each sequence.
        generator (`torch.Generator`, *optional*): Source of the choice of starts; the global one by default.
    """
    rows, width = labels.shape
    if position_ids is None:
        position_ids = torch.arange(width, device=labels.device).expand(rows, -1)
    is_text = torch.ones_like(labels, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    of_loss = labels[:, 1:] != -100  # (B, T - 1): the next token belongs to the loss
    goes_on = of_loss & (position_ids[:, 1:] != 0)
    available = torch.empty(*of_loss.shape, len(shares), dtype=torch.bool, device=labels.device)
    available[..., 0] = of_loss
    for k in range(1, len(shares)):
        ahead = torch.nn.functional.pad(goes_on[:, k:], (0, min(k, width - 1)))
        available[..., k] = available[..., k - 1] & ahead
    kept = torch.zeros_like(available)
    kept[of_loss] = keep_starts(available[of_loss], shares, generator)

    number = of_loss.flatten().cumsum(0).view_as(of_loss) - 1  # of the token of the loss that comes next
    row, start, position = kept.nonzero(as_tuple=True)
    is_mask = position > 0
    mask_row, mask_start, mask_depth = row[is_mask], start[is_mask], position[is_mask]
    per_row = torch.bincount(mask_row, minlength=rows)
    num_masks = int(per_row.max())
    column = torch.arange(len(mask_row), device=row.device) - (per_row.cumsum(0) - per_row)[mask_row]
    starts, depth = (torch.zeros(rows, num_masks, dtype=torch.long, device=row.device) for _ in range(2))
    starts[mask_row, column], depth[mask_row, column] = mask_start, mask_depth
    place = start.clone()
    place[is_mask] = width + column
    scored = number[row, start + position]
    order = scored.argsort(stable=True)
    segment = (position_ids == 0).cumsum(1)
    return MaskLayout(
        last=torch.cat([torch.arange(width, device=row.device).expand(rows, -1), starts], dim=1),
        depth=torch.nn.functional.pad(depth, (width, 0)),
        segment=torch.cat([segment, segment.gather(1, starts)], dim=1),
        is_text=torch.nn.functional.pad(is_text, (0, num_masks)),
        positions=torch.cat([position_ids, position_ids.gather(1, starts) + depth], dim=1),
        slots=(row * (width + num_masks) + place)[order],
        scored=scored[order],
        blocks=Blocks(
            block=number[row, start][order],
            position=position[order],
            num_blocks=int(of_loss.sum()),
            num_available=available[of_loss].sum(0),
        ),
    )
