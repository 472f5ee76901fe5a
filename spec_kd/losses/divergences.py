"""Per-token divergences between the target's distribution p and the draft's q, each with its gradient in closed form.

A divergence is one small class; `fused_linear.py` turns any of them into a memory-light loss, and `reference.py` holds
the same values written plainly for autograd, against which these are tested.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TokenDistributions:
    """Both distributions over a chunk of tokens, each once as probabilities and once as logarithms.

    All four are float32 of shape `(N, V)` and belong to whoever computes the divergence: it may overwrite none of
    them, since they also feed the metrics.
    """

    p: torch.Tensor
    log_p: torch.Tensor
    q: torch.Tensor
    log_q: torch.Tensor


class Divergence(ABC):
    """A divergence D(p, q) per token, p the target's distribution and q = softmax(z) the draft's."""

    name: str

    @abstractmethod
    def compute_value(self, d: TokenDistributions) -> torch.Tensor:
        """D per token, float32 `(N,)`, in nats."""

    @abstractmethod
    def compute_gradient(self, d: TokenDistributions, value: torch.Tensor) -> torch.Tensor:
        """dD/dz per token, a new float32 tensor `(N, V)`.

        Args:
            d (`TokenDistributions`): Both distributions.
            value (`torch.Tensor`): What `compute_value(d)` returned, `(N,)`; several gradients contain it.
        """


class ForwardKL(Divergence):
    """KL(p‖q) = sum_v p (log p - log q), gradient q - p (Hinton et al. 2015, arXiv 1503.02531)."""

    name = "forward_kl"

    def compute_value(self, d: TokenDistributions) -> torch.Tensor:
        return (d.log_p - d.log_q).mul_(d.p).sum(-1)

    def compute_gradient(self, d: TokenDistributions, value: torch.Tensor) -> torch.Tensor:
        return d.q - d.p


class ReverseKL(Divergence):
    """KL(q‖p) = sum_v q (log q - log p), gradient q (r - E_q r) with r = log q - log p (MiniLLM, arXiv 2306.08543)."""

    name = "reverse_kl"

    def compute_value(self, d: TokenDistributions) -> torch.Tensor:
        return (d.log_q - d.log_p).mul_(d.q).sum(-1)

    def compute_gradient(self, d: TokenDistributions, value: torch.Tensor) -> torch.Tensor:
        return (d.log_q - d.log_p).sub_(value[:, None]).mul_(d.q)  # E_q r is the value itself


class JensenShannon(Divergence):
    """Generalised JSD of GKD (arXiv 2306.13649): b KL(p‖m) + (1-b) KL(q‖m) with m = b p + (1-b) q.

    The gradient is (1-b) q (r - E_q r) with r = log q - log m.

    Args:
        beta (`float`, *optional*, defaults to `0.5`):
            Weight b in the open interval (0, 1). The limits 0 and 1 are zero divergences; TRL's `beta` reads them as
            forward and reverse KL, and so does `build_divergence`.
    """

    name = "jsd"

    def __init__(self, beta: float = 0.5):
        if not 0.0 < beta < 1.0:
            raise ValueError(
                f"`beta` of the JSD must lie strictly between 0 and 1, got {beta}. Use divergence='forward_kl' for "
                "beta = 0 and divergence='reverse_kl' for beta = 1."
            )
        self.beta = beta

    def _log_mixture(self, d: TokenDistributions) -> torch.Tensor:
        # Where p and q both underflow the mixture is 0 and its logarithm only ever meets a factor of 0: keep it finite.
        mixture = torch.mul(d.q, 1.0 - self.beta).add_(d.p, alpha=self.beta)
        return mixture.clamp_(min=torch.finfo(mixture.dtype).tiny).log_()

    def compute_value(self, d: TokenDistributions) -> torch.Tensor:
        log_m = self._log_mixture(d)
        from_target = (d.log_p - log_m).mul_(d.p).sum(-1)
        from_draft = (d.log_q - log_m).mul_(d.q).sum(-1)
        return self.beta * from_target + (1.0 - self.beta) * from_draft

    def compute_gradient(self, d: TokenDistributions, value: torch.Tensor) -> torch.Tensor:
        ratio = d.log_q - self._log_mixture(d)
        mean = (ratio * d.q).sum(-1, keepdim=True)
        return ratio.sub_(mean).mul_(d.q).mul_(1.0 - self.beta)


DIVERGENCES: dict[str, type[Divergence]] = {cls.name: cls for cls in (ForwardKL, ReverseKL, JensenShannon)}


def resolve_divergence_name(divergence: str | None, beta: float | None) -> str:
    """The divergence that `divergence` and TRL's `beta` ask for together.

    Args:
        divergence (`str`, *optional*): A name of `DIVERGENCES`; `None` leaves the choice to `beta`.
        beta (`float`, *optional*): TRL's knob: 0 = forward KL, 1 = reverse KL, between = JSD with that weight.

    Returns:
        `str`: The name; `"forward_kl"` when neither is given.

    Raises:
        ValueError: If the name is unknown, `beta` lies outside [0, 1], or the two disagree.
    """
    if divergence is not None and divergence not in DIVERGENCES:
        raise ValueError(f"Unknown `divergence` {divergence!r}. Choose one of: {', '.join(sorted(DIVERGENCES))}.")
    if beta is None:
        return divergence or ForwardKL.name
    if not (math.isfinite(beta) and 0.0 <= beta <= 1.0):
        raise ValueError(f"`beta` must lie in [0, 1], got {beta}: 0 is forward KL, 1 reverse KL, between them JSD.")
    asked = {0.0: ForwardKL.name, 1.0: ReverseKL.name}.get(beta, JensenShannon.name)
    if divergence is not None and divergence != asked:
        raise ValueError(
            f"`divergence={divergence!r}` and `beta={beta}` disagree: in TRL's convention beta={beta} means "
            f"{asked!r}. Set only `divergence`, or only `beta`."
        )
    return asked


def build_divergence(divergence: str | None = None, beta: float | None = None) -> Divergence:
    """The divergence object for a name and/or TRL's `beta`; raises as `resolve_divergence_name`."""
    name = resolve_divergence_name(divergence, beta)
    if name == JensenShannon.name:
        return JensenShannon() if beta is None else JensenShannon(beta)
    return DIVERGENCES[name]()
