from spec_kd.losses.divergences import DIVERGENCES, Divergence, ForwardKL, JensenShannon, ReverseKL, build_divergence
from spec_kd.losses.fused_linear import DivergenceOutput, fused_linear_divergence
from spec_kd.losses.reference import dense_divergence

__all__ = [
    "DIVERGENCES",
    "Divergence",
    "DivergenceOutput",
    "ForwardKL",
    "JensenShannon",
    "ReverseKL",
    "build_divergence",
    "dense_divergence",
    "fused_linear_divergence",
]
