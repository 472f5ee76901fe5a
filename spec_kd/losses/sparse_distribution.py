"""A target's distribution while it is read, and the few numbers of it that are kept."""

from dataclasses import dataclass

import torch

from spec_kd.open_types import Array, Chunk


@dataclass(frozen=True)
class SparseDistribution:
    """What was kept of p at each of T tokens, by the method of the request; lists of T arrays with K_t entries each.

    Args:
        ids (`list[numpy.ndarray]`): int32, distinct within a token.
        log_p (`list[numpy.ndarray]`, *optional*): float32, log p of the ids; absent if the method keeps none.
        counts (`list[numpy.ndarray]`, *optional*): int32, draws per id; for sampled methods only.
    """

    ids: list[Array]
    log_p: list[Array] | None = None
    counts: list[Array] | None = None

    def cut(self, part: Chunk) -> "SparseDistribution":
        """Some of the tokens."""
        log_p = None if self.log_p is None else self.log_p[part]
        return SparseDistribution(self.ids[part], log_p, None if self.counts is None else self.counts[part])


class TokenSoftmax:
    """softmax of logits, float32 `(B, V)`, asked for at a few ids: what generation waits for, so in few passes."""

    def __init__(self, logits: torch.Tensor):
        self.logits = logits
        self._log_normalizer = logits.logsumexp(-1, keepdim=True)  # (B, 1)

    def log_p(self, ids: torch.Tensor) -> torch.Tensor:
        """Log p at ids `(B, K)`."""
        return self.logits.gather(-1, ids.to(self.logits.device)) - self._log_normalizer

    def draw(self, num_draws: int, generator: torch.Generator) -> torch.Tensor:
        """Ids drawn from p, sorted within a row, int64 `(B, num_draws)`.

        Draws are systematic: equally spaced points after one random start. An id of probability p is then drawn
        num_draws * p times, rounded down or up, and exactly that many times in the mean. Counts stay unbiased, and
        those of likely ids have hardly any noise, where independent draws scatter by the square root of the count.

        The sum is in float64: a float32 running sum loses what is below 3e-8 near its end, and a vocabulary of 150,000
        can have half a percent of its mass there.
        """
        mass = self.logits.softmax(-1).cumsum(-1, dtype=torch.float64)  # (B, V)
        total = mass[:, -1:]
        start = torch.rand((len(mass), 1), generator=generator, device=mass.device, dtype=torch.float64)
        points = (torch.arange(num_draws, device=mass.device) + start) / num_draws * total
        points = torch.minimum(points, torch.nextafter(total, torch.zeros_like(total)))  # rounded up it would hit no id
        return torch.searchsorted(mass, points, right=True).clamp(max=mass.shape[1] - 1)  # beyond it only of NaN
