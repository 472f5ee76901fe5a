"""Per-token divergences between the target's distribution p and the draft's q, each with its gradient in closed form.

A divergence is one small class; `fused_linear.py` turns any of them into a memory-light loss, and `reference.py` holds
the same values written plainly for autograd, against which these are tested. `registry.py` finds them by name.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from typing_extensions import override

from spec_kd.acceptance import compute_alpha, compute_token_acceptance, weigh_
from spec_kd.options import check_number


@dataclass(frozen=True)
class TokenDistributions:
    """Both distributions over a few tokens, each once as probabilities and once as logarithms.

    All four are float32 of shape `(N, V)`. A divergence must not overwrite them, since they also feed the metrics. V is
    the vocabulary, or the ids of a coarsened teacher and one bucket for all others (`losses/sparse.py`).

    Where a model rules out an id, the probability is 0 and the logarithm is -inf: multiply them with `weigh_`.

    `shared` holds what `compute_value` leaves for `compute_gradient`.
    """

    p: torch.Tensor
    log_p: torch.Tensor
    q: torch.Tensor
    log_q: torch.Tensor
    shared: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenDivergence:
    """What a divergence is at a few tokens, from the whole target distribution or from what a sparse teacher kept.

    Args:
        value (`torch.Tensor`): D per token, `(N,)`.
        entropy (`torch.Tensor`): Entropy of q per token in nats, `(N,)`.
        alpha (`torch.Tensor`, *optional*): sum_v min(p, q) per token as far as it is known, `(N,)`.
        gradient (`torch.Tensor`, *optional*): dD/dz `(N, V)`, if it was asked for.
    """

    value: torch.Tensor
    entropy: torch.Tensor
    alpha: torch.Tensor | None
    gradient: torch.Tensor | None


class Divergence(ABC):
    """A divergence D(p, q) per token, p the target's distribution and q = softmax(z) the draft's.

    Define `name`, `compute_value` and `compute_gradient`, and register the class with `@register_divergence`: every
    trainer then knows it by name. Two more members say whether a *sparse* teacher can serve it; the defaults say no.
    """

    name: str
    is_coarsenable: bool = False
    """Whether D over a few ids and one bucket for the rest still means something (for an f-divergence: a bound)."""

    @abstractmethod
    def compute_value(self, d: TokenDistributions) -> torch.Tensor:
        """D per token, float32 `(N,)`, in nats."""

    @abstractmethod
    def compute_gradient(self, d: TokenDistributions, value: torch.Tensor) -> torch.Tensor:
        """dD/dz per token, a new float32 tensor `(N, V)`.

        Args:
            d (`TokenDistributions`): Both distributions, the same object that `compute_value` got.
            value (`torch.Tensor`): What `compute_value(d)` returned, `(N,)`; several gradients contain it.
        """

    def compute_sampled(
        self, log_p: torch.Tensor | None, log_q: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """For D = E_{v~p} f(p_v, q_v) with f of bounded variance: f and df/dlog q_v at sampled ids, `(N, K)` each.

        Their means over draws from p are unbiased estimates of D and, with dlog q_v/dz, of its gradient.

        Args:
            log_p (`torch.Tensor`, *optional*): log p at the ids, `None` if the teacher kept counts only.
            log_q (`torch.Tensor`): log q at the ids.

        Returns:
            The pair, or `None` if there is no such form (the default).
        """
        return None


class ForwardKL(Divergence):
    """KL(p‖q) = sum_v p (log p - log q), gradient q - p (Hinton et al. 2015, arXiv 1503.02531)."""

    name = "forward_kl"
    is_coarsenable = True

    @override
    def compute_value(self, d: TokenDistributions) -> torch.Tensor:
        return weigh_(d.log_p - d.log_q, d.p).sum(-1)

    @override
    def compute_gradient(self, d: TokenDistributions, value: torch.Tensor) -> torch.Tensor:
        return d.q - d.p

    @override
    def compute_sampled(
        self, log_p: torch.Tensor | None, log_q: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        # Without log p the value is the cross-entropy, larger by the entropy of p, and the gradient is the same.
        return (-log_q if log_p is None else log_p - log_q), torch.full_like(log_q, -1.0)


class ReverseKL(Divergence):
    """KL(q‖p) = sum_v q (log q - log p), gradient q (r - E_q r) with r = log q - log p (MiniLLM, arXiv 2306.08543).

    Infinite where the target rules out an id that the draft does not, as masked logits of the target do.
    """

    name = "reverse_kl"
    is_coarsenable = True

    @override
    def compute_value(self, d: TokenDistributions) -> torch.Tensor:
        return weigh_(d.log_q - d.log_p, d.q).sum(-1)

    @override
    def compute_gradient(self, d: TokenDistributions, value: torch.Tensor) -> torch.Tensor:
        return weigh_((d.log_q - d.log_p).sub_(value[:, None]), d.q)  # E_q r is the value itself


class JensenShannon(Divergence):
    """Generalized JSD of GKD (arXiv 2306.13649): b KL(p‖m) + (1-b) KL(q‖m) with m = b p + (1-b) q.

    The gradient is (1-b) q (r - E_q r) with r = log q - log m.

    Args:
        beta (`float`, *optional*, defaults to `0.5`):
            Weight b in the open interval (0, 1). The limits 0 and 1 are zero divergences; TRL's `beta` reads them as
            forward and reverse KL, and so does `build_divergence`.
    """

    name = "jsd"
    is_coarsenable = True

    def __init__(self, beta: float = 0.5):
        check_number(
            "beta",
            beta,
            above=0,
            below=1,
            reason="Use divergence='forward_kl' for beta = 0 and divergence='reverse_kl' for beta = 1.",
        )
        self.beta = beta

    @override
    def compute_value(self, d: TokenDistributions) -> torch.Tensor:
        # Where p and q both underflow the mixture is 0 and its logarithm only ever meets a factor of 0: keep it finite.
        mixture = torch.mul(d.q, 1.0 - self.beta).add_(d.p, alpha=self.beta)
        log_m = mixture.clamp_(min=torch.finfo(mixture.dtype).tiny).log_()
        from_target = weigh_(d.log_p - log_m, d.p).sum(-1)
        ratio = torch.sub(d.log_q, log_m, out=log_m)
        from_draft = weigh_(ratio.clone(), d.q).sum(-1)
        d.shared.update(ratio=ratio, mean=from_draft)
        return self.beta * from_target + (1.0 - self.beta) * from_draft

    @override
    def compute_gradient(self, d: TokenDistributions, value: torch.Tensor) -> torch.Tensor:
        ratio, mean = d.shared["ratio"], d.shared["mean"]
        return weigh_(ratio.sub(mean[:, None]), d.q).mul_(1.0 - self.beta)


class TotalVariation(Divergence):
    """TVD = 1 - sum_v min(p, q) = 1 - alpha: the share of drafted tokens that is rejected (arXiv 2310.08461).

    The gradient is q (E_q r - r) with r = 1[p > q].
    """

    name = "tvd"
    is_coarsenable = True

    @override
    def compute_value(self, d: TokenDistributions) -> torch.Tensor:
        return (d.p - d.q).clamp_(min=0.0).sum(-1)  # equal to 1 - alpha, without its cancellation near 1

    @override
    def compute_gradient(self, d: TokenDistributions, value: torch.Tensor) -> torch.Tensor:
        is_short = (d.p > d.q).to(d.q.dtype)  # r: the draft gives the token less than the target does
        mean = (is_short * d.q).sum(-1, keepdim=True)
        return is_short.neg_().add_(mean).mul_(d.q)

    @override
    def compute_sampled(
        self, log_p: torch.Tensor | None, log_q: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        if log_p is None:
            return None
        acceptance = compute_token_acceptance(log_p, log_q)  # TVD = 1 - E_p of it
        return 1.0 - acceptance, torch.where(log_q < log_p, -acceptance, torch.zeros_like(acceptance))


class TVDPlusPlus(TotalVariation):
    """TVD++ (arXiv 2403.00858): the TVD as a policy gradient whose rewards r = 1[p > q] are normalized.

    The value is the TVD, the gradient dTVD/dz / sigma with sigma^2 = Var_q r over the vocabulary of one position. The
    paper takes the moments over a batch, which is one number and has hardly any effect under Adam. Per position they
    change the weight of each token, and splitting a batch changes nothing. sigma is at least `SIGMA_MIN`: as it goes to
    0 (q = p, or a one-hot p that q misses) so does dTVD/dz, in proportion to sigma^2.
    """

    name = "tvd_plus_plus"
    SIGMA_MIN = 1e-3

    @override
    def compute_gradient(self, d: TokenDistributions, value: torch.Tensor) -> torch.Tensor:
        is_short = (d.p > d.q).to(d.q.dtype)
        mean = (is_short * d.q).sum(-1, keepdim=True)
        rest = ((1.0 - is_short) * d.q).sum(-1, keepdim=True)  # not 1 - mean, which rounds to 0 where mean is near 1
        sigma = (mean * rest).sqrt_().clamp_(min=self.SIGMA_MIN)
        return is_short.neg_().add_(mean).mul_(d.q).div_(sigma)

    @override
    def compute_sampled(
        self, log_p: torch.Tensor | None, log_q: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        return None  # 1 / sigma of an estimate is not an estimate of 1 / sigma


class NegLogAcceptance(Divergence):
    """-log alpha with alpha = sum_v min(p, q) (LK losses, arXiv 2602.23881): dTVD/dz / alpha.

    Where draft and target share nothing, the TVD is flat and this divergence still pulls. So alpha is computed in
    logarithms: log alpha = logsumexp_v min(log p, log q) is exact where alpha itself underflows.
    """

    name = "neg_log_acceptance"
    is_coarsenable = True

    @override
    def compute_value(self, d: TokenDistributions) -> torch.Tensor:
        return -torch.logsumexp(torch.minimum(d.log_p, d.log_q), dim=-1)

    @override
    def compute_gradient(self, d: TokenDistributions, value: torch.Tensor) -> torch.Tensor:
        # r min(p, q) / alpha: the accepted mass that lies where the draft gives less than the target
        share = torch.minimum(d.log_p, d.log_q).add_(value[:, None]).exp_()
        share.mul_(d.log_p > d.log_q)
        mean = share.sum(-1, keepdim=True)
        return (d.q * mean).sub_(share)


class LKHybrid(Divergence):
    """w KL(p‖q) + (1 - w) TVD with w = exp(-eta alpha), alpha held constant (LK losses, arXiv 2602.23881).

    Far from the target it is the KL, which pulls everywhere; near the target it is the TVD, which is what acceptance
    rewards.

    Args:
        eta (`float`, *optional*, defaults to `3.0`): How fast the weight moves from the KL to the TVD; positive.
    """

    name = "lk_hybrid"
    is_coarsenable = True

    def __init__(self, eta: float = 3.0):
        check_number("eta", eta, above=0, reason="It is a positive rate; use divergence='forward_kl' for eta = 0.")
        self.eta = eta
        self._kl, self._tvd = ForwardKL(), TotalVariation()

    def _mix(self, kl: torch.Tensor, tvd: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        weight = torch.exp(-self.eta * alpha)
        return kl.mul_(weight).add_(tvd.mul_(1.0 - weight))

    @override
    def compute_value(self, d: TokenDistributions) -> torch.Tensor:
        return self._mix(self._kl.compute_value(d), self._tvd.compute_value(d), compute_alpha(d.p, d.q))

    @override
    def compute_gradient(self, d: TokenDistributions, value: torch.Tensor) -> torch.Tensor:
        alpha = compute_alpha(d.p, d.q)[:, None]
        return self._mix(self._kl.compute_gradient(d, value), self._tvd.compute_gradient(d, value), alpha)
