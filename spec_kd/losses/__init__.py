"""What a draft is trained with: divergences, the fused loss, sparse teachers, and which tokens count."""

from spec_kd.losses.divergences import (
    Divergence,
    ForwardKL,
    JensenShannon,
    LKHybrid,
    NegLogAcceptance,
    ReverseKL,
    TokenDistributions,
    TotalVariation,
    TVDPlusPlus,
)
from spec_kd.losses.fused_linear import DivergenceOutput, fused_linear_divergence
from spec_kd.losses.reference import dense_divergence
from spec_kd.losses.registry import DIVERGENCES, build_divergence, register_divergence
from spec_kd.losses.selection import (
    TOKEN_SELECTIONS,
    TokenLoss,
    TokenSelection,
    build_selection,
    selected_linear_divergence,
)
from spec_kd.losses.sparse import (
    SPARSE_METHODS,
    SignalSpec,
    SparseDistribution,
    SparseMethod,
    SparseTensors,
    register_sparse_method,
)
from spec_kd.losses.sparse_methods import CoarsenedMethod, SampledMethod

__all__ = [
    "DIVERGENCES",
    "SPARSE_METHODS",
    "TOKEN_SELECTIONS",
    "CoarsenedMethod",
    "Divergence",
    "DivergenceOutput",
    "ForwardKL",
    "JensenShannon",
    "LKHybrid",
    "NegLogAcceptance",
    "ReverseKL",
    "SampledMethod",
    "SignalSpec",
    "SparseDistribution",
    "SparseMethod",
    "SparseTensors",
    "TVDPlusPlus",
    "TokenDistributions",
    "TokenLoss",
    "TokenSelection",
    "TotalVariation",
    "build_divergence",
    "build_selection",
    "dense_divergence",
    "fused_linear_divergence",
    "register_divergence",
    "register_sparse_method",
    "selected_linear_divergence",
]
