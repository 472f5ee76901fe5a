"""From whole distributions to the few numbers per token that a sparse teacher keeps."""

from dataclasses import replace

import numpy as np
import torch
from transformers import LogitsProcessor
from typing_extensions import override

from spec_kd.checks import check_int
from spec_kd.engines.base import SignalSpec, SparseDistribution
from spec_kd.finite import NonFiniteError
from spec_kd.losses import SPARSE_METHODS
from spec_kd.open_types import Array

DEFAULT_DRAWS = 50  # of RS-KD (arXiv 2503.16870): about 12 distinct ids a token on natural text
DEFAULT_TOP_K = 16


def complete_request(signal: SignalSpec) -> SignalSpec:
    """The request with its defaults filled in.

    Raises:
        ValueError: For an unknown method, a number out of its range, or one that the method has no use for.
    """
    if signal.method not in SPARSE_METHODS:
        raise ValueError(f"Unknown method {signal.method!r}. Choose one of: {', '.join(SPARSE_METHODS)}.")
    draws, top_k = signal.num_draws, signal.top_k
    is_drawn = signal.method in ("sampled_counts", "sampled_logprobs")
    for name, value, is_used in (("num_draws", draws, is_drawn), ("top_k", top_k, signal.method == "top_k_tail")):
        if value is not None and not is_used:
            raise ValueError(f"The method {signal.method!r} has no use for `{name}={value}`. Leave it out.")
        check_int(name, value, is_optional=True)
    return replace(
        signal,
        num_draws=(draws or DEFAULT_DRAWS) if is_drawn else None,
        top_k=(top_k or DEFAULT_TOP_K) if signal.method == "top_k_tail" else None,
    )


def check_signal(signal: SignalSpec, vocab_size: int) -> None:
    """Raises `ValueError` unless the request can be met with this vocabulary."""
    top_k = complete_request(signal).top_k
    if top_k is not None and top_k > vocab_size:
        raise ValueError(f"`top_k={top_k}` is more than the {vocab_size} ids there are. Lower it.")


class _Distribution:
    """softmax of logits, float32 `(B, V)`, asked for at a few ids: what generation waits for, so in few passes."""

    def __init__(self, logits: torch.Tensor):
        self.logits = logits
        self.log_normaliser = logits.logsumexp(-1, keepdim=True)  # (B, 1)

    def log_p(self, ids: torch.Tensor) -> torch.Tensor:
        """Log p at ids `(B, K)`."""
        ids = ids.to(self.logits.device)
        return self.logits.gather(-1, ids) - self.log_normaliser

    def draw(self, num_draws: int, generator: torch.Generator) -> torch.Tensor:
        """Ids drawn from p, sorted within a row, int64 `(B, num_draws)`.

        Systematically: equally spaced points behind one random start. An id of probability p is then drawn
        num_draws * p times, rounded down or up, and that many times in the mean, where independent draws scatter by
        its square root: counts stay unbiased, and what is likely has hardly any noise.

        In float64: a float32 running sum loses what is below 3e-8 near its end, and a vocabulary of 150,000 can have
        half a percent of its mass there.
        """
        mass = self.logits.softmax(-1).cumsum(-1, dtype=torch.float64)  # (B, V)
        total = mass[:, -1:]
        start = torch.rand((len(mass), 1), generator=generator, device=mass.device, dtype=torch.float64)
        points = (torch.arange(num_draws, device=mass.device) + start) / num_draws * total
        points = torch.minimum(points, torch.nextafter(total, torch.zeros_like(total)))  # rounded up it would hit no id
        return torch.searchsorted(mass, points, right=True).clamp(max=mass.shape[1] - 1)  # beyond it only of NaN


class SparseRecorder(LogitsProcessor):
    """Reads the distribution at every step of `generate` and keeps what the method asks for; it changes nothing.

    The token of a step is known at the next one only, so one step's logits `(B, V)` are held at a time.

    Args:
        signal (`SignalSpec`): What to keep.
        vocab_size (`int`): Number of real ids.
        seed (`int`): Of the draws. They have a generator of their own, so that the text does not depend on them.
    """

    def __init__(self, signal: SignalSpec, vocab_size: int, seed: int):
        self.signal, self.vocab_size, self.seed = complete_request(signal), vocab_size, seed
        self._generator: torch.Generator | None = None
        self._step: _Distribution | None = None
        self._kept: list[tuple[torch.Tensor, ...]] = []
        self._logprobs: list[torch.Tensor] = []

    @override
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self._step is not None:
            self._record_tokens(input_ids[:, -1])
        self._step = _Distribution(scores[:, : self.vocab_size].float())  # (B, V)
        self._kept.append(self._keep(self._step))
        return scores

    def close(self, last_tokens: torch.Tensor) -> None:
        """Takes the tokens of the last step, int64 `(B,)`, and brings everything to the CPU."""
        self._record_tokens(last_tokens)
        self._step = None
        self._all_logprobs = _to_numbers(torch.stack(self._logprobs, dim=1))  # (B, T)
        self._all_kept = [torch.stack(parts, dim=1).cpu().numpy() for parts in zip(*self._kept, strict=True)]

    def read(self, row: int, length: int) -> tuple[list[float], SparseDistribution | None]:
        """Log-probabilities of the first `length` tokens of a row, and their slots."""
        kept = [part[row, :length] for part in self._all_kept]
        return self._all_logprobs[row, :length].tolist(), self._to_sparse(kept, length)

    def reduce(self, logits: torch.Tensor, tokens: torch.Tensor) -> tuple[Array, SparseDistribution | None]:
        """The same for text that exists: logits `(n, vocab_size)` and the tokens they are to predict, `(n,)`."""
        distribution = _Distribution(logits)
        kept = [part.cpu().numpy() for part in self._keep(distribution)]
        logprobs = _to_numbers(distribution.log_p(tokens[:, None]).squeeze(-1))
        return logprobs, self._to_sparse(kept, len(tokens))

    def _record_tokens(self, tokens: torch.Tensor) -> None:
        self._logprobs.append(self._step.log_p(tokens[:, None]).squeeze(-1))

    def _keep(self, distribution: "_Distribution") -> tuple[torch.Tensor, ...]:
        """`()`, `(ids,)` of the draws sorted, with their log p where asked, or `(ids, log p)` of the top k."""
        if self.signal.method == "token_only":
            return ()
        if self.signal.method == "top_k_tail":
            ids = distribution.logits.topk(self.signal.top_k).indices
            return ids.int(), distribution.log_p(ids)
        if self._generator is None:
            self._generator = torch.Generator(distribution.logits.device).manual_seed(self.seed)
        drawn = distribution.draw(self.signal.num_draws, self._generator)  # (B, draws)
        has_log_p = self.signal.method == "sampled_logprobs"
        return (drawn.int(), distribution.log_p(drawn)) if has_log_p else (drawn.int(),)

    def _to_sparse(self, kept: list[Array], length: int) -> SparseDistribution | None:
        if not kept:
            return None
        ids, log_p = kept[0], kept[1] if len(kept) > 1 else None  # (T, K)
        if self.signal.method == "top_k_tail":
            return SparseDistribution(list(ids), list(log_p))
        is_first = np.ones(ids.shape, dtype=bool)
        is_first[:, 1:] = ids[:, 1:] != ids[:, :-1]
        starts = np.flatnonzero(is_first)  # row after row, and the draws of every row are sorted
        counts = np.diff(starts, append=ids.size).astype(np.int32)
        cuts = np.cumsum(is_first.sum(-1))[:-1]
        return SparseDistribution(
            np.split(ids.reshape(-1)[starts], cuts),
            None if log_p is None else np.split(log_p.reshape(-1)[starts], cuts),
            np.split(counts, cuts),
        )


def _to_numbers(logprobs: torch.Tensor) -> Array:
    """Log-probabilities as an array; raises [`NonFiniteError`] for NaN, which only logits that are not finite give."""
    values = logprobs.cpu().numpy()
    if np.isnan(values).any():
        raise NonFiniteError(
            "The target's logits are NaN or infinite, with weights that are finite: they overflow in its dtype. Load "
            "the target in bfloat16 or float32."
        )
    return values


def stack_sparse(parts: list[SparseDistribution | None]) -> SparseDistribution | None:
    """Slots of consecutive pieces of one text as one."""
    if not parts or parts[0] is None:
        return None
    return SparseDistribution(
        [ids for part in parts for ids in part.ids],
        None if parts[0].log_p is None else [values for part in parts for values in part.log_p],
        None if parts[0].counts is None else [counts for part in parts for counts in part.counts],
    )
