"""Teachers that kept a few ids per token instead of the whole distribution, and what each may be used for.

A *sampled* teacher holds ids drawn from p: means over them estimate a divergence that is an expectation under p, and
its gradient, without bias. A *coarsened* teacher holds the most likely ids exactly and the rest as one bucket: any
divergence can be taken over these K + 1 outcomes, which for an f-divergence is a lower bound of the true one and for
its gradient a bias. What is neither is refused by name. Neither needs a matrix product with a teacher's head.
"""

from dataclasses import dataclass

import torch

from spec_kd.acceptance import compute_alpha, weigh_
from spec_kd.losses.divergences import Divergence, TokenDistributions
from spec_kd.losses.registry import DIVERGENCES
from spec_kd.open_types import Chunk

# Stands for log 0: exp() of it is 0 and 0 times it is 0, where -inf would give NaN.
LOG_ZERO = -1e30


@dataclass(frozen=True)
class SparseMethod:
    """A way to keep a teacher's distribution in a few numbers per token.

    Args:
        name (`str`): As written in a dataset.
        is_sampled (`bool`): Ids drawn from p; otherwise the most likely ids and a bucket for the rest.
        has_log_p (`bool`): Whether the true log p of the ids is kept.
        alpha (`str`, *optional*): What it says of sum_v min(p, q): `"unbiased"`, `"upper bound"` or nothing.
    """

    name: str
    is_sampled: bool
    has_log_p: bool
    alpha: str | None

    def describe_service(self, divergence: Divergence) -> str | None:
        """How this method serves a divergence: `"unbiased"`, `"coarsened"`, or `None` for not at all."""
        if not self.is_sampled:
            return "coarsened" if divergence.is_coarsenable else None
        probe = torch.zeros(1, 1)
        return "unbiased" if divergence.compute_sampled(probe if self.has_log_p else None, probe) is not None else None

    def check_serves(self, divergence: Divergence) -> None:
        """Raises `ValueError`, naming what would serve, unless the divergence can be trained from this method."""
        if self.describe_service(divergence) is not None:
            return
        others = [
            f"{method.name!r} ({service})"
            for method in SPARSE_METHODS.values()
            if (service := method.describe_service(divergence))
        ]
        served = [repr(name) for name, cls in DIVERGENCES.items() if self.describe_service(cls())]
        raise ValueError(
            f"A teacher kept as {self.name!r} cannot serve the divergence {divergence.name!r}: it gives neither an "
            f"unbiased estimate of bounded variance nor a bound. Use a live `teacher_model`"
            + (f", a dataset made with {' or '.join(others)}" if others else "")
            + f", or one of the divergences it serves: {', '.join(served)}."
        )


SPARSE_METHODS: dict[str, SparseMethod] = {
    method.name: method
    for method in (
        SparseMethod("token_only", is_sampled=True, has_log_p=True, alpha="unbiased"),
        SparseMethod("sampled_counts", is_sampled=True, has_log_p=False, alpha=None),
        SparseMethod("sampled_logprobs", is_sampled=True, has_log_p=True, alpha="unbiased"),
        SparseMethod("top_k_tail", is_sampled=False, has_log_p=True, alpha="upper bound"),
    )
}


@dataclass(frozen=True)
class SparseTensors:
    """What a sparse teacher says of N tokens, K slots each.

    Args:
        method (`SparseMethod`): How the slots came to be.
        ids (`torch.Tensor`): int64 `(N, K)`; any valid id in an unused slot.
        log_p (`torch.Tensor`, *optional*):
            float32 `(N, K)`, log p at the loss temperature; -inf in an unused slot of a coarsened teacher, anything
            finite in one of a sampled teacher.
        weights (`torch.Tensor`, *optional*):
            Of a sampled teacher: float32 `(N, K)`, the share of the draws that fell on the id, 0 in an unused slot.
    """

    method: SparseMethod
    ids: torch.Tensor
    log_p: torch.Tensor | None = None
    weights: torch.Tensor | None = None

    def __getitem__(self, tokens: Chunk | torch.Tensor) -> "SparseTensors":
        log_p = None if self.log_p is None else self.log_p[tokens]
        weights = None if self.weights is None else self.weights[tokens]
        return SparseTensors(self.method, self.ids[tokens], log_p, weights)

    def to(self, device: torch.device) -> "SparseTensors":
        """The same on another device."""
        log_p = None if self.log_p is None else self.log_p.to(device)
        weights = None if self.weights is None else self.weights.to(device)
        return SparseTensors(self.method, self.ids.to(device), log_p, weights)

    def __call__(self, chunk: Chunk) -> "SparseTensors":
        """The slice, so that targets can be handed to `fused_linear_divergence` as they are."""
        return self[chunk]

    def __len__(self) -> int:
        return self.ids.shape[0]


@dataclass(frozen=True)
class SparseResult:
    """Of one call of `compute_sparse`: per token `(N,)`, the gradient `(N, V)`; absent is what there is no word on."""

    value: torch.Tensor
    entropy: torch.Tensor
    alpha: torch.Tensor | None
    gradient: torch.Tensor | None


def compute_sparse(
    z: torch.Tensor, targets: SparseTensors, divergence: Divergence, needs_gradient: bool = True
) -> SparseResult:
    """Divergence of the draft's logits from a sparse teacher, and its gradient.

    Args:
        z (`torch.Tensor`): Draft logits over the loss temperature, float32 `(N, V)`; left as they are.
        targets (`SparseTensors`): N tokens.
        divergence (`Divergence`): One that the method serves (`SparseMethod.check_serves`, not asked again here).
        needs_gradient (`bool`, *optional*, defaults to `True`): Whether to form dD/dz.

    Returns:
        `SparseResult`
    """
    compute = _compute_sampled if targets.method.is_sampled else _compute_coarsened
    return compute(z, targets, divergence, needs_gradient)


def _softmax(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(z) `(N, V)` and log sum exp z `(N, 1)`: with one exponential per entry instead of two."""
    probabilities = torch.softmax(z, dim=-1)
    return probabilities, z.amax(-1, keepdim=True) - probabilities.amax(-1, keepdim=True).log()


def _compute_sampled(
    z: torch.Tensor, targets: SparseTensors, divergence: Divergence, needs_gradient: bool
) -> SparseResult:
    q, log_normaliser = _softmax(z)
    log_q = z.gather(-1, targets.ids) - log_normaliser  # (N, K)
    values, slopes = divergence.compute_sampled(targets.log_p, log_q)
    entropy = log_normaliser.squeeze(-1) - weigh_(z.clone(), q).sum(-1)
    alpha = None
    if targets.log_p is not None:
        alpha = ((log_q - targets.log_p).clamp(max=0.0).exp() * targets.weights).sum(-1)
    gradient = None
    if needs_gradient:
        pull = slopes * targets.weights  # d log q_v / dz = e_v - q
        gradient = q.mul_(-pull.sum(-1, keepdim=True)).scatter_add_(-1, targets.ids, pull)
    return SparseResult(weigh_(values, targets.weights).sum(-1), entropy, alpha, gradient)


def _compute_coarsened(
    z: torch.Tensor, targets: SparseTensors, divergence: Divergence, needs_gradient: bool
) -> SparseResult:
    is_used = targets.log_p > LOG_ZERO  # not so: an empty slot, or an id of probability 0, which belongs to the bucket
    z_head = z.gather(-1, targets.ids).masked_fill_(~is_used, LOG_ZERO)  # (N, K)
    z_tail = z.scatter_add(-1, targets.ids, is_used * LOG_ZERO)  # (N, V): the ids in use are gone
    within_tail, log_tail = _softmax(z_tail)  # (N, V): q given that it is none of the ids
    log_normaliser = torch.logaddexp(log_tail, torch.logsumexp(z_head, dim=-1, keepdim=True))

    log_q = torch.cat([z_head, log_tail], dim=-1) - log_normaliser  # (N, K + 1)
    log_p_head = targets.log_p.masked_fill(~is_used, LOG_ZERO)
    p_tail = 1.0 - log_p_head.exp().sum(-1, keepdim=True)
    # Where no other id exists the rest of a rounded sum must not weigh against a log q of `LOG_ZERO`
    p_tail = p_tail.masked_fill_(log_tail < LOG_ZERO / 2, 0.0).clamp_(min=torch.finfo(z.dtype).tiny)
    log_p = torch.cat([log_p_head, p_tail.log()], dim=-1)
    d = TokenDistributions(p=log_p.exp(), log_p=log_p, q=log_q.exp(), log_q=log_q)
    value = divergence.compute_value(d)

    mean_tail = weigh_(z_tail, within_tail).sum(-1)
    entropy = log_normaliser.squeeze(-1) - weigh_(z_head, d.q[:, :-1]).sum(-1) - d.q[:, -1] * mean_tail
    gradient = None
    if needs_gradient:
        coarse = divergence.compute_gradient(d, value)  # (N, K + 1)
        gradient = within_tail.mul_(coarse[:, -1:]).scatter_add_(-1, targets.ids, coarse[:, :-1] * is_used)
    return SparseResult(value, entropy, compute_alpha(d.p, d.q), gradient)
