"""Sampling inside `generate` with one random number a token."""

import torch
from transformers import LogitsProcessor

from spec_kd.decoding.acceptance_sampling import sample


class DrawnToken(LogitsProcessor):
    """Leaves one id of each row, drawn from the softmax of its scores: `generate` then samples by taking the largest.

    Its own sampling draws a number for every id of the vocabulary, which on a CPU takes as long as a small model. To be
    the last processor of a greedy `generate`.

    Args:
        generator (`torch.Generator`): On the scores' device; the global random state is not touched.
    """

    def __init__(self, generator: torch.Generator):
        self._generator = generator

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores `(B, V)`: 0 at the drawn id and -inf elsewhere."""
        drawn = sample(scores.softmax(dim=-1), self._generator)  # (B,)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn[:, None], 0.0)  # (B, V)
