"""Distil draft models for speculative decoding.

The public names are imported when they are first used, so that `import spec_kd` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_ROOMS = {
    "spec_kd.data": ("generate_responses",),
    "spec_kd.evaluation": ("AcceptanceFigures", "SpeculativeEvalCallback", "generate_assisted", "replay"),
    "spec_kd.hub": ("export_draft", "serving_commands"),
    "spec_kd.losses": ("fused_linear_divergence",),
    "spec_kd.trainer": (
        "BlackBoxSFTConfig",
        "BlackBoxSFTTrainer",
        "WhiteBoxDistillConfig",
        "WhiteBoxDistillTrainer",
    ),
    "spec_kd.vocabulary": ("VocabularyMismatchError", "align_vocabulary"),
}
_HOME = {name: room for room, names in _ROOMS.items() for name in names}

if TYPE_CHECKING:
    from spec_kd.data import generate_responses
    from spec_kd.evaluation import AcceptanceFigures, SpeculativeEvalCallback, generate_assisted, replay
    from spec_kd.hub import export_draft, serving_commands
    from spec_kd.losses import fused_linear_divergence
    from spec_kd.trainer import BlackBoxSFTConfig, BlackBoxSFTTrainer, WhiteBoxDistillConfig, WhiteBoxDistillTrainer
    from spec_kd.vocabulary import VocabularyMismatchError, align_vocabulary

__all__ = [
    "AcceptanceFigures",
    "BlackBoxSFTConfig",
    "BlackBoxSFTTrainer",
    "SpeculativeEvalCallback",
    "VocabularyMismatchError",
    "WhiteBoxDistillConfig",
    "WhiteBoxDistillTrainer",
    "align_vocabulary",
    "export_draft",
    "fused_linear_divergence",
    "generate_assisted",
    "generate_responses",
    "replay",
    "serving_commands",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
