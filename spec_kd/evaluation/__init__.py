"""How good a draft is for its target: replayed from one pass, or measured in real assisted generation."""

from typing import TYPE_CHECKING

from spec_kd.lazy_imports import import_lazily

if TYPE_CHECKING:
    from spec_kd.evaluation.assisted import AssistedMetrics, generate_assisted
    from spec_kd.evaluation.assisted_costs import measure_assisted_costs
    from spec_kd.evaluation.callback import SpeculativeEvalCallback
    from spec_kd.evaluation.cost import ServingCosts, measure_costs
    from spec_kd.evaluation.cost_files import read_costs, write_costs
    from spec_kd.evaluation.evaluate import evaluate_draft
    from spec_kd.evaluation.gates import check_gates
    from spec_kd.evaluation.looping import find_loop
    from spec_kd.evaluation.metrics import AcceptanceMetrics, Interval, bootstrap, bootstrap_ratio
    from spec_kd.evaluation.observation.compare import compare_observed, describe_observation
    from spec_kd.evaluation.observation.observe import observe_serving
    from spec_kd.evaluation.observation.options import ObservationOptions
    from spec_kd.evaluation.observation.records import Observation, ObservedRequest
    from spec_kd.evaluation.observation.save import load_observed, save_observed
    from spec_kd.evaluation.options import EvaluationOptions, ReplayOptions
    from spec_kd.evaluation.report import EvaluationReport, load_report, save_report
    from spec_kd.evaluation.report.observed import ObservedReport
    from spec_kd.evaluation.response_replay import ResponseScores, replay, score_responses
    from spec_kd.evaluation.server_costs import SyntheticSpeed, measure_server_costs, measure_synthetic_speed
    from spec_kd.evaluation.server_options import ServerTimingOptions

__all__ = [
    "AcceptanceMetrics",
    "AssistedMetrics",
    "EvaluationOptions",
    "EvaluationReport",
    "Interval",
    "Observation",
    "ObservationOptions",
    "ObservedReport",
    "ObservedRequest",
    "ReplayOptions",
    "ResponseScores",
    "ServerTimingOptions",
    "ServingCosts",
    "SpeculativeEvalCallback",
    "SyntheticSpeed",
    "bootstrap",
    "bootstrap_ratio",
    "check_gates",
    "compare_observed",
    "describe_observation",
    "evaluate_draft",
    "find_loop",
    "generate_assisted",
    "load_observed",
    "load_report",
    "measure_assisted_costs",
    "measure_costs",
    "measure_server_costs",
    "measure_synthetic_speed",
    "observe_serving",
    "read_costs",
    "replay",
    "save_observed",
    "save_report",
    "score_responses",
    "write_costs",
]

__getattr__, __dir__ = import_lazily(
    __name__,
    {
        "spec_kd.evaluation.assisted": ("AssistedMetrics", "generate_assisted"),
        "spec_kd.evaluation.assisted_costs": ("measure_assisted_costs",),
        "spec_kd.evaluation.callback": ("SpeculativeEvalCallback",),
        "spec_kd.evaluation.cost": ("ServingCosts", "measure_costs"),
        "spec_kd.evaluation.cost_files": ("read_costs", "write_costs"),
        "spec_kd.evaluation.evaluate": ("evaluate_draft",),
        "spec_kd.evaluation.gates": ("check_gates",),
        "spec_kd.evaluation.looping": ("find_loop",),
        "spec_kd.evaluation.metrics": ("AcceptanceMetrics", "Interval", "bootstrap", "bootstrap_ratio"),
        "spec_kd.evaluation.observation.compare": ("compare_observed", "describe_observation"),
        "spec_kd.evaluation.observation.observe": ("observe_serving",),
        "spec_kd.evaluation.observation.options": ("ObservationOptions",),
        "spec_kd.evaluation.observation.records": ("Observation", "ObservedRequest"),
        "spec_kd.evaluation.observation.save": ("load_observed", "save_observed"),
        "spec_kd.evaluation.options": ("EvaluationOptions", "ReplayOptions"),
        "spec_kd.evaluation.report": ("EvaluationReport", "load_report", "save_report"),
        "spec_kd.evaluation.report.observed": ("ObservedReport",),
        "spec_kd.evaluation.response_replay": ("ResponseScores", "replay", "score_responses"),
        "spec_kd.evaluation.server_costs": ("SyntheticSpeed", "measure_server_costs", "measure_synthetic_speed"),
        "spec_kd.evaluation.server_options": ("ServerTimingOptions",),
    },
)
