"""Teachers that kept a few ids per token instead of the whole distribution: what such a method decides, and its data.

A *sampled* teacher holds ids drawn from p: means over them estimate a divergence that is an expectation under p, and
its gradient, without bias. A *coarsened* teacher holds the most likely ids exactly and the rest as one bucket: any
divergence can be taken over these K + 1 outcomes, which for an f-divergence is a lower bound of the true one and for
its gradient a bias. A method refuses by name what it can serve in neither way. Neither needs a matrix product with a
teacher's head. `sparse_methods.py` holds the methods that come with the package.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch

from spec_kd.losses.divergences import Divergence, TokenDivergence
from spec_kd.losses.registry import DIVERGENCES, check_class
from spec_kd.open_types import Array, Chunk
from spec_kd.options import check_int

AlphaEstimate: TypeAlias = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


@dataclass(frozen=True)
class SignalSpec:
    """What to keep of the target's distribution at every completion token.

    Args:
        method (`str`, *optional*, defaults to `"token_only"`):
            A name of `spec_kd.losses.SPARSE_METHODS`. `"token_only"` is the log-probability of the token itself.
        num_draws (`int`, *optional*): Draws from p per token, for the sampled methods.
        top_k (`int`, *optional*): Most likely ids per token, for `"top_k_tail"`.
    """

    method: str = "token_only"
    num_draws: int | None = None
    top_k: int | None = None

    @property
    def sparse_method(self) -> "SparseMethod":
        """The method of this name; raises `ValueError` if there is none."""
        if self.method not in SPARSE_METHODS:
            raise ValueError(f"Unknown method {self.method!r}. Choose one of: {', '.join(SPARSE_METHODS)}.")
        return SPARSE_METHODS[self.method]

    def complete(self) -> "SignalSpec":
        """The same with the method's default filled in.

        Raises:
            ValueError: For an unknown method, a number out of its range, or one that the method has no use for.
        """
        method = self.sparse_method
        for name, value in (("num_draws", self.num_draws), ("top_k", self.top_k)):
            if value is not None and name != method.size_name:
                raise ValueError(f"The method {self.method!r} has no use for `{name}={value}`. Leave it out.")
            check_int(name, value, is_optional=True)
        return method.build_spec(self.size or None)

    @property
    def size(self) -> int:
        """The number that the method reads, 0 if there is none."""
        return self.num_draws or self.top_k or 0

    def check(self, vocab_size: int) -> None:
        """Raises `ValueError` as [`complete`], and for more ids than a vocabulary has."""
        top_k = self.complete().top_k
        if top_k is not None and top_k > vocab_size:
            raise ValueError(f"`top_k={top_k}` is more than the {vocab_size} ids there are. Lower it.")


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


@dataclass(frozen=True)
class SparseTensors:
    """What a sparse teacher says of N tokens, K ids each.

    Args:
        method (`SparseMethod`): How the ids came to be.
        ids (`torch.Tensor`): int64 `(N, K)`; any valid id in an unused place.
        log_p (`torch.Tensor`, *optional*):
            float32 `(N, K)`, log p at the loss temperature. In an unused place it is -inf for a coarsened teacher, and
            anything finite for a sampled one.
        weights (`torch.Tensor`, *optional*):
            float32 `(N, K)`, the share of the draws that fell on the id, 0 in an unused place; for a sampled teacher.
    """

    method: "SparseMethod"
    ids: torch.Tensor
    log_p: torch.Tensor | None = None
    weights: torch.Tensor | None = None

    def __getitem__(self, tokens: Chunk | torch.Tensor) -> "SparseTensors":
        return self._map(lambda part: part[tokens])

    def to(self, device: torch.device) -> "SparseTensors":
        """The same on another device."""
        return self._map(lambda part: part.to(device))

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "SparseTensors":
        log_p, weights = (None if part is None else change(part) for part in (self.log_p, self.weights))
        return SparseTensors(self.method, change(self.ids), log_p, weights)

    __call__ = __getitem__  # so that targets can be handed to `fused_linear_divergence` as they are

    def __len__(self) -> int:
        return self.ids.shape[0]


class SparseMethod(ABC):
    """A way to keep a teacher's distribution in a few numbers per token, from the pass that reads it to the loss.

    Derive from [`SampledMethod`] or [`CoarsenedMethod`], which hold the loss, and say what is recorded. Register the
    class with `@register_sparse_method`, and every engine that gives whole distributions, every dataset, trainer and
    evaluation knows it by name.
    """

    name: str
    """Name in datasets and options."""
    is_sampled: bool
    """Whether the ids are drawn from p; otherwise they are its most likely ones."""
    has_log_p: bool = True
    """Whether log p of the ids is kept."""
    keeps_ids: bool = True
    """Whether ids are kept; otherwise the log-probability of the written token is all that there is."""
    size_name: str | None = None
    """Number of a `SignalSpec` that the method reads: `"num_draws"`, `"top_k"` or none."""
    default_size: int | None = None
    """Value of that number if it is not given."""
    alpha_metric: str | None = "alpha_on_data"
    """Name under which trainers log what the method says of alpha; `None` if it says nothing."""

    def build_spec(self, size: int | None = None) -> SignalSpec:
        """A request for this method, with `size` as its number; raises `ValueError` for a size it has no use for."""
        if self.size_name is not None:
            return SignalSpec(self.name, **{self.size_name: size or self.default_size})
        if size is not None:
            raise ValueError(f"The method {self.name!r} has no use for a size, got {size}. Leave it out.")
        return SignalSpec(self.name)

    @abstractmethod
    def record(self, p: TokenSoftmax, size: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        """What is kept of one step.

        Args:
            p (`TokenSoftmax`): The target's distribution for B completions.
            size (`int`): Number of the request: draws, or ids to keep.
            generator (`torch.Generator`): Source of draws, on the device of the logits.

        Returns:
            `tuple[torch.Tensor, ...]` of shape `(B, ...)` each: what [`collect`] reads once the steps are joined.
        """

    @abstractmethod
    def collect(self, kept: list[Array]) -> SparseDistribution | None:
        """The record of T tokens as ids, log-probabilities and counts; `None` if no ids are kept.

        Args:
            kept (`list[numpy.ndarray]`): Parts that [`record`] returned, `(T, ...)` each.
        """

    @abstractmethod
    def pack_counts(self, sparse: SparseDistribution, size: int) -> bytes:
        """How many ids each token has, and their counts where there are any, as bytes before the packed ids.

        Raises:
            ValueError: If a token does not have what the request says.
        """

    @abstractmethod
    def unpack_counts(self, content: bytes, num_tokens: int, size: int) -> tuple[Array, Array, bytes]:
        """The reverse: ids per token int64 `(T,)`, the weight of every id float `(sum,)`, and the rest of the bytes."""

    def count_likely_ids(self, signal: SignalSpec) -> int | None:
        """How many of the most likely ids an engine must return that has no whole distributions, such as a server.

        0 asks for the written token alone; `None` (the default) says that such an engine cannot serve the method.

        Raises:
            ValueError: For a request without the number.
        """
        return None

    @abstractmethod
    def build_tensors(self, ids: torch.Tensor, log_p: torch.Tensor, weights: torch.Tensor) -> SparseTensors:
        """What the loss reads, of unpacked columns of N tokens: `(N, K)` each, weight 0 in unused places."""

    @abstractmethod
    def describe_service(self, divergence: Divergence) -> str | None:
        """How this method serves a divergence: `"unbiased"`, `"coarsened"`, or `None` for not at all."""

    @abstractmethod
    def compute(
        self, z: torch.Tensor, targets: SparseTensors, divergence: Divergence, needs_gradient: bool
    ) -> TokenDivergence:
        """Divergence of the draft's logits from what was kept, and its gradient.

        Args:
            z (`torch.Tensor`): Draft logits over the loss temperature, float32 `(N, V)`; left as they are.
            targets (`SparseTensors`): N tokens.
            divergence (`Divergence`): One that the method serves ([`check_serves`], not asked again here).
            needs_gradient (`bool`): Whether to form dD/dz.
        """

    @abstractmethod
    def estimate_alpha(self, targets: SparseTensors, log_q: torch.Tensor) -> AlphaEstimate:
        """Unbiased estimate of sum_v min(p, q) per token, and its bounds, from log q at the kept ids `(N, K)`.

        Returns:
            `(value, low, high)`, float `(N,)` each; `None` for what the ids do not tell.
        """

    def compute_tail_mass(self, log_p: torch.Tensor) -> torch.Tensor | None:
        """Probability outside of the ids kept, `(N,)`, from log p at them `(N, K)`; `None` for a sampled method."""
        return None

    def check_serves(self, divergence: Divergence) -> None:
        """Raises `ValueError`, naming what would serve, unless the divergence can be trained from this method."""
        if self.describe_service(divergence) is not None:
            return
        services = {name: method.describe_service(divergence) for name, method in SPARSE_METHODS.items()}
        others = [f"{name!r} ({service})" for name, service in services.items() if service]
        served = [repr(name) for name, cls in DIVERGENCES.items() if self.describe_service(cls())]
        raise ValueError(
            f"A teacher kept as {self.name!r} cannot serve the divergence {divergence.name!r}: it gives neither an "
            f"unbiased estimate of bounded variance nor a bound. Use a live `teacher_model`"
            + (f", a dataset made with {' or '.join(others)}" if others else "")
            + f", or one of the divergences it serves: {', '.join(served)}."
        )


SPARSE_METHODS: dict[str, SparseMethod] = {}


def register_sparse_method(cls: type[SparseMethod]) -> type[SparseMethod]:
    """Makes a sparse method known by its `name`, to every trainer and command; usable as a decorator.

    Args:
        cls (`type[SparseMethod]`): With a `name` of its own, and a constructor without arguments.

    Returns:
        `cls`.

    Raises:
        TypeError: If `cls` is not a concrete [`SparseMethod`], or has no `name`.
        ValueError: If the name belongs to another class.
    """
    known = {name: type(method) for name, method in SPARSE_METHODS.items()}
    check_class(cls, SparseMethod, known, "sparse method", "derive it from `SampledMethod` or `CoarsenedMethod`")
    SPARSE_METHODS[cls.name] = cls()
    return cls
