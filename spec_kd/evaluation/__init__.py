"""How good a draft is for its target: replayed from one pass, or measured in real assisted generation."""

from spec_kd.evaluation.assisted import AssistedFigures, generate_assisted
from spec_kd.evaluation.callback import SpeculativeEvalCallback
from spec_kd.evaluation.figures import AcceptanceFigures
from spec_kd.evaluation.replay import TextScores, replay, score_texts
from spec_kd.evaluation.statistics import Interval, bootstrap, bootstrap_ratio

__all__ = [
    "AcceptanceFigures",
    "AssistedFigures",
    "Interval",
    "SpeculativeEvalCallback",
    "TextScores",
    "bootstrap",
    "bootstrap_ratio",
    "generate_assisted",
    "replay",
    "score_texts",
]
