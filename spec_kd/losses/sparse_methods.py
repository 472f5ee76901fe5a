"""The sparse methods that come with the package, and the two families that hold their losses."""

import numpy as np
import torch

from spec_kd.acceptance import LOG_ZERO, bound_alpha, compute_alpha, compute_token_acceptance, weigh_
from spec_kd.losses.divergences import Divergence, TokenDistributions, TokenDivergence
from spec_kd.losses.sparse import (
    AlphaEstimate,
    SignalSpec,
    SparseDistribution,
    SparseMethod,
    SparseTensors,
    TokenSoftmax,
    register_sparse_method,
)
from spec_kd.open_types import Array


class SampledMethod(SparseMethod):
    """Keeps ids drawn from p: losses are means over them, unbiased wherever the divergence has such a form.

    Derived classes need a `name`, and may record draws of their own in [`record`]: ids of shape `(B, num_draws)`, equal
    ones next to each other, with their log p if the method has it.
    """

    is_sampled = True
    size_name: str | None = "num_draws"
    default_size: int | None = 50  # of RS-KD (arXiv 2503.16870): about 12 distinct ids a token on natural text

    def record(self, p: TokenSoftmax, size: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        """Systematic draws, `(B, num_draws)`, and their log p if the method has it."""
        drawn = p.draw(size, generator)
        return (drawn.int(), p.log_p(drawn)) if self.has_log_p else (drawn.int(),)

    def collect(self, kept: list[Array]) -> SparseDistribution | None:
        """Each drawn id once, with its count."""
        ids = kept[0]  # (T, num_draws)
        is_first = np.ones(ids.shape, dtype=bool)
        is_first[:, 1:] = ids[:, 1:] != ids[:, :-1]
        starts = np.flatnonzero(is_first)  # row after row, and equal draws of a row are neighbors
        counts = np.diff(starts, append=ids.size).astype(np.int32)
        cuts = np.cumsum(is_first.sum(-1))[:-1]
        return SparseDistribution(
            np.split(ids.reshape(-1)[starts], cuts),
            np.split(kept[1].reshape(-1)[starts], cuts) if self.has_log_p else None,
            np.split(counts, cuts),
        )

    def pack_counts(self, sparse: SparseDistribution, size: int) -> bytes:
        """Every count in unary: count - 1 zeros, then a one; `num_draws` bits per token."""
        all_counts = sparse.counts or []
        for i, counts in enumerate(all_counts):
            if counts.sum() != size:
                raise ValueError(f"Token {i} has {counts.sum()} draws, the dataset {size} per token.")
        ends = np.zeros(len(sparse.ids) * size, np.uint8)
        ends[np.cumsum(np.concatenate(all_counts)) - 1] = 1
        return np.packbits(ends, bitorder="little").tobytes()

    def unpack_counts(self, content: bytes, num_tokens: int, size: int) -> tuple[Array, Array, bytes]:
        """The counts from their unary code; the weight is the share of the draws."""
        num_bits = num_tokens * size
        num_bytes = -(-num_bits // 8)
        bits = np.unpackbits(np.frombuffer(content[:num_bytes], np.uint8), count=num_bits, bitorder="little")
        ends = np.flatnonzero(bits)
        per_token = np.bincount(ends // size, minlength=num_tokens)
        return per_token, np.diff(ends, prepend=-1) / size, content[num_bytes:]

    def build_tensors(self, ids: torch.Tensor, log_p: torch.Tensor, weights: torch.Tensor) -> SparseTensors:
        """The columns, with a finite log p where the weight is 0."""
        known = log_p.masked_fill(weights == 0, 0.0) if self.has_log_p else None
        return SparseTensors(self, ids.long(), known, weights)

    def describe_service(self, divergence: Divergence) -> str | None:
        """`"unbiased"` where the divergence is a mean over draws, with log p or without."""
        probe = torch.zeros(1, 1)
        return "unbiased" if divergence.compute_sampled(probe if self.has_log_p else None, probe) is not None else None

    def compute(
        self, z: torch.Tensor, targets: SparseTensors, divergence: Divergence, needs_gradient: bool
    ) -> TokenDivergence:
        """Means over the draws of f(p_v, q_v) and of df/dlog q_v dlog q_v/dz."""
        q, log_normalizer = _softmax(z)
        log_q = z.gather(-1, targets.ids) - log_normalizer  # (N, K)
        sampled = divergence.compute_sampled(targets.log_p, log_q)
        assert sampled is not None and targets.weights is not None  # `check_serves` and `build_tensors` see to it
        values, slopes = sampled
        entropy = log_normalizer.squeeze(-1) - z.clamp(min=LOG_ZERO).mul_(q).sum(-1)
        gradient = None
        if needs_gradient:
            pull = slopes * targets.weights  # d log q_v / dz = e_v - q
            gradient = q.mul_(-pull.sum(-1, keepdim=True)).scatter_add_(-1, targets.ids, pull)
        alpha, _, _ = self.estimate_alpha(targets, log_q)
        return TokenDivergence(weigh_(values, targets.weights).sum(-1), entropy, alpha, gradient)

    def estimate_alpha(self, targets: SparseTensors, log_q: torch.Tensor) -> AlphaEstimate:
        """The mean of min(1, q/p) over the draws, which is unbiased."""
        if targets.log_p is None or targets.weights is None:
            return None, None, None
        return (compute_token_acceptance(targets.log_p, log_q) * targets.weights).sum(-1), None, None


class CoarsenedMethod(SparseMethod):
    """Keeps the most likely ids exactly, and all others as one bucket: losses are divergences over these outcomes.

    Derived classes need a `name`, and may record other ids in [`record`]: `(B, top_k)` with their log p.
    """

    is_sampled = False
    size_name = "top_k"
    default_size = 16
    alpha_metric = "alpha_upper_bound_on_data"

    def record(self, p: TokenSoftmax, size: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        """The `top_k` most likely ids with their log p, `(B, top_k)` each."""
        ids = p.logits.topk(size).indices
        return ids.int(), p.log_p(ids)

    def collect(self, kept: list[Array]) -> SparseDistribution | None:
        """The ids and their log p, token by token."""
        return SparseDistribution(list(kept[0]), list(kept[1]))

    def pack_counts(self, sparse: SparseDistribution, size: int) -> bytes:
        """Nothing: every token has `top_k` ids."""
        if found := sorted({len(token) for token in sparse.ids} - {size}):
            raise ValueError(f"Every token must have {size} ids, got {found}.")
        return b""

    def unpack_counts(self, content: bytes, num_tokens: int, size: int) -> tuple[Array, Array, bytes]:
        """`top_k` ids per token, of weight 1."""
        return np.full(num_tokens, size), np.ones(num_tokens * size), content

    def count_likely_ids(self, signal: SignalSpec) -> int | None:
        """The `top_k` of the request."""
        if signal.top_k is None or signal.top_k < 1:
            raise ValueError(f"The method {self.name!r} needs `top_k` of at least 1, got {signal.top_k}.")
        return signal.top_k

    def build_tensors(self, ids: torch.Tensor, log_p: torch.Tensor, weights: torch.Tensor) -> SparseTensors:
        """Ids and log p; the weights say nothing more."""
        return SparseTensors(self, ids.long(), log_p)

    def describe_service(self, divergence: Divergence) -> str | None:
        """`"coarsened"` where the divergence still means something over a bucket."""
        return "coarsened" if divergence.is_coarsenable else None

    def compute(
        self, z: torch.Tensor, targets: SparseTensors, divergence: Divergence, needs_gradient: bool
    ) -> TokenDivergence:
        """The divergence over K + 1 outcomes; its gradient in the bucket is shared out by q."""
        assert targets.log_p is not None  # `build_tensors` sees to it
        is_used = targets.log_p > LOG_ZERO  # not so: an unused place, or an id of probability 0, part of the bucket
        z_head = z.gather(-1, targets.ids).masked_fill_(~is_used, LOG_ZERO)  # (N, K)
        z_tail = z.scatter_add(-1, targets.ids, is_used * LOG_ZERO)  # (N, V): the ids in use are gone
        within_tail, log_tail = _softmax(z_tail)  # (N, V): q given that it is none of the ids
        log_normalizer = torch.logaddexp(log_tail, torch.logsumexp(z_head, dim=-1, keepdim=True))

        log_q = torch.cat([z_head, log_tail], dim=-1) - log_normalizer  # (N, K + 1)
        log_p_head = targets.log_p.masked_fill(~is_used, LOG_ZERO)
        p_tail = 1.0 - log_p_head.exp().sum(-1, keepdim=True)
        # Where no other id exists the rest of a rounded sum must not weigh against a log q of `LOG_ZERO`
        p_tail = p_tail.masked_fill_(log_tail < LOG_ZERO / 2, 0.0).clamp_(min=torch.finfo(z.dtype).tiny)
        log_p = torch.cat([log_p_head, p_tail.log()], dim=-1)
        d = TokenDistributions(p=log_p.exp(), log_p=log_p, q=log_q.exp(), log_q=log_q)
        value = divergence.compute_value(d)

        mean_tail = z_tail.clamp_(min=LOG_ZERO).mul_(within_tail).sum(-1)
        entropy = log_normalizer.squeeze(-1) - weigh_(z_head, d.q[:, :-1]).sum(-1) - d.q[:, -1] * mean_tail
        gradient = None
        if needs_gradient:
            coarse = divergence.compute_gradient(d, value)  # (N, K + 1)
            gradient = within_tail.mul_(coarse[:, -1:]).scatter_add_(-1, targets.ids, coarse[:, :-1] * is_used)
        return TokenDivergence(value, entropy, compute_alpha(d.p, d.q), gradient)

    def estimate_alpha(self, targets: SparseTensors, log_q: torch.Tensor) -> AlphaEstimate:
        """The bounds of [`bound_alpha`]."""
        return (None, None, None) if targets.log_p is None else (None, *bound_alpha(targets.log_p, log_q))

    def compute_tail_mass(self, log_p: torch.Tensor) -> torch.Tensor | None:
        """The probability of the bucket, `(N,)`."""
        return 1.0 - log_p.exp().sum(-1)


@register_sparse_method
class TokenOnly(SampledMethod):
    """The log-probability of the written token, which is a draw from p where the completion was sampled from it."""

    name = "token_only"
    keeps_ids = False
    size_name = default_size = None

    def record(self, p: TokenSoftmax, size: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        """Nothing: engines return the written token's log-probability with every method."""
        return ()

    def collect(self, kept: list[Array]) -> SparseDistribution | None:
        """Nothing."""
        return None

    def count_likely_ids(self, signal: SignalSpec) -> int | None:
        """None beside the written token."""
        return 0


@register_sparse_method
class SampledCounts(SampledMethod):
    """Draws from p without their log-probabilities (RS-KD, arXiv 2503.16870)."""

    name = "sampled_counts"
    has_log_p = False
    alpha_metric = None


@register_sparse_method
class SampledLogprobs(SampledMethod):
    """Draws from p with their log-probabilities."""

    name = "sampled_logprobs"


@register_sparse_method
class TopKTail(CoarsenedMethod):
    """The k most likely ids and one bucket for all others."""

    name = "top_k_tail"


def _softmax(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(z) `(N, V)` and log sum exp z `(N, 1)`: with one exponential per entry instead of two."""
    probabilities = torch.softmax(z, dim=-1)
    return probabilities, z.amax(-1, keepdim=True) - probabilities.amax(-1, keepdim=True).log()
