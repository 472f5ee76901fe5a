"""What a draft is trained with: divergences, the fused loss, sparse teachers, and which tokens count."""

from spec_kd.losses.block_weighting import (
    BLOCK_WEIGHTINGS,
    Blocks,
    BlockWeighting,
    DPace,
    ExpectedLength,
    PositionWeights,
    TargetConfidence,
)
from spec_kd.losses.blocks import RepeatedTargets, block_linear_divergence
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
from spec_kd.losses.reference import dense_divergence, dense_rejected_length
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
    "BLOCK_WEIGHTINGS",
    "DIVERGENCES",
    "SPARSE_METHODS",
    "TOKEN_SELECTIONS",
    "BlockWeighting",
    "Blocks",
    "CoarsenedMethod",
    "DPace",
    "Divergence",
    "DivergenceOutput",
    "ExpectedLength",
    "ForwardKL",
    "JensenShannon",
    "LKHybrid",
    "NegLogAcceptance",
    "PositionWeights",
    "RepeatedTargets",
    "ReverseKL",
    "SampledMethod",
    "SignalSpec",
    "SparseDistribution",
    "SparseMethod",
    "SparseTensors",
    "TVDPlusPlus",
    "TargetConfidence",
    "TokenDistributions",
    "TokenLoss",
    "TokenSelection",
    "TotalVariation",
    "block_linear_divergence",
    "build_divergence",
    "build_selection",
    "dense_divergence",
    "dense_rejected_length",
    "fused_linear_divergence",
    "register_divergence",
    "register_sparse_method",
    "selected_linear_divergence",
]
