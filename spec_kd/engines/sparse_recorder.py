"""Reads the target's distribution at every step, and keeps the few numbers that a sparse method asks for."""

import numpy as np
import torch
from transformers import LogitsProcessor

from spec_kd.finite import NonFiniteError
from spec_kd.losses import SignalSpec, SparseDistribution
from spec_kd.losses.sparse import TokenSoftmax
from spec_kd.open_types import Array


class SparseRecorder(LogitsProcessor):
    """Reads the distribution at every step of `generate` and keeps what the method asks for; it changes nothing.

    The token of a step is known at the next one only, so one step's logits `(B, V)` are held at a time.

    Args:
        signal (`SignalSpec`): What to keep.
        vocab_size (`int`): Number of real ids.
        seed (`int`): Seed of the draws. They have a generator of their own, so that completions do not depend on them.
    """

    def __init__(self, signal: SignalSpec, vocab_size: int, seed: int):
        self.signal, self.vocab_size, self.seed = signal.complete(), vocab_size, seed
        self._method = self.signal.sparse_method
        self._generator: torch.Generator | None = None
        self._step: TokenSoftmax | None = None
        self._kept: list[tuple[torch.Tensor, ...]] = []
        self._logprobs: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Keeps what is asked of `scores` `(B, V)`, and the log-probability of the last ids of `input_ids`."""
        self._record_tokens(input_ids[:, -1])
        self._step = TokenSoftmax(scores[:, : self.vocab_size].float())  # (B, V)
        self._kept.append(self._record(self._step))
        return scores

    def close(self, last_tokens: torch.Tensor) -> None:
        """Takes the tokens of the last step, int64 `(B,)`, and brings everything to the CPU."""
        self._record_tokens(last_tokens)
        self._step = None
        self._all_logprobs = _to_numbers(torch.stack(self._logprobs, dim=1))  # (B, T)
        self._all_kept = [torch.stack(parts, dim=1).cpu().numpy() for parts in zip(*self._kept, strict=True)]

    def read(self, row: int, length: int) -> tuple[list[float], SparseDistribution | None]:
        """Log-probabilities of the first `length` tokens of a row, and what was kept at them."""
        kept = [part[row, :length] for part in self._all_kept]
        return self._all_logprobs[row, :length].tolist(), self._method.collect(kept)

    def reduce(self, logits: torch.Tensor, tokens: torch.Tensor) -> tuple[Array, SparseDistribution | None]:
        """The same for tokens that exist: logits `(n, vocab_size)` and the tokens they are to predict, `(n,)`."""
        p = TokenSoftmax(logits)
        kept = [part.cpu().numpy() for part in self._record(p)]
        return _to_numbers(p.log_p(tokens[:, None]).squeeze(-1)), self._method.collect(kept)

    def _record_tokens(self, tokens: torch.Tensor) -> None:
        if self._step is not None:
            self._logprobs.append(self._step.log_p(tokens[:, None]).squeeze(-1))

    def _record(self, p: TokenSoftmax) -> tuple[torch.Tensor, ...]:
        if self._generator is None:
            self._generator = torch.Generator(p.logits.device).manual_seed(self.seed)
        return self._method.record(p, self.signal.size, self._generator)


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
    """What was kept at consecutive pieces of a completion, as one."""
    known = [part for part in parts if part is not None]
    if not known:
        return None
    return SparseDistribution(
        [ids for part in known for ids in part.ids],
        None if known[0].log_p is None else [values for part in known for values in part.log_p or ()],
        None if known[0].counts is None else [counts for part in known for counts in part.counts or ()],
    )
