"""Distill draft models for speculative decoding.

The public names are imported when they are first used, so that `import spec_kd` costs nothing.
"""

from typing import TYPE_CHECKING

from spec_kd.lazy_imports import import_lazily
from spec_kd.version import __version__ as __version__

_ROOMS = {
    "spec_kd.data.corpus": ("tokenize_corpus",),
    "spec_kd.data.reference_scores": ("add_reference_scores",),
    "spec_kd.data.response_options": ("ResponseOptions", "ScoreOptions"),
    "spec_kd.data.responses": ("generate_responses", "score_completions"),
    "spec_kd.engines": (
        "RayEngine",
        "RayOptions",
        "ServerEngine",
        "ServerOptions",
        "TransformersEngine",
        "VLLMEngine",
    ),
    "spec_kd.decoding": ("SpeculationOptions", "generate_speculatively"),
    "spec_kd.drafts": (
        "DraftPlan",
        "DraftPlanOptions",
        "DraftShapeOptions",
        "InitialDraft",
        "PlannedShape",
        "ShortRun",
        "init_draft",
        "plan_draft",
    ),
    "spec_kd.evaluation": (
        "AcceptanceMetrics",
        "EvaluationOptions",
        "EvaluationReport",
        "Observation",
        "ObservationOptions",
        "ObservedReport",
        "ReplayOptions",
        "ServerTimingOptions",
        "ServingCosts",
        "SpeculativeEvalCallback",
        "SyntheticSpeed",
        "check_gates",
        "compare_observed",
        "describe_observation",
        "evaluate_draft",
        "find_loop",
        "generate_assisted",
        "measure_server_costs",
        "measure_synthetic_speed",
        "observe_serving",
        "replay",
        "save_observed",
        "save_report",
    ),
    "spec_kd.finite": ("NonFiniteError",),
    "spec_kd.hub": ("ExportOptions", "GGUFError", "ServingFile", "export_draft", "export_gguf", "recommend_in_card"),
    "spec_kd.losses": (
        "Divergence",
        "SignalSpec",
        "fused_linear_divergence",
        "register_divergence",
        "register_sparse_method",
    ),
    "spec_kd.prompts.curated": ("CuratedOptions", "load_curated_prompts"),
    "spec_kd.prompts.filters": ("TextFilter",),
    "spec_kd.prompts.logs.completion_ids": ("add_completion_ids",),
    "spec_kd.prompts.mixing": ("MixOptions", "mix_prompts"),
    "spec_kd.prompts.description": ("describe_prompts",),
    "spec_kd.prompts.logs.options": ("LogOptions",),
    "spec_kd.prompts.logs.query_logs": ("load_query_logs",),
    "spec_kd.prompts.logs.scale.options": ("ScaleOptions",),
    "spec_kd.prompts.synthesis.options": ("SynthesisOptions",),
    "spec_kd.prompts.synthesis.synthesis": ("synthesize_queries",),
    "spec_kd.serving": ("serving_commands",),
    "spec_kd.serving.check": ("check_serving",),
    "spec_kd.serving.pair": ("ServingFinding",),
    "spec_kd.trainer": (
        "BlackBoxSFTConfig",
        "BlackBoxSFTTrainer",
        "OnlineGKDConfig",
        "OnlineGKDTrainer",
        "WhiteBoxDistillConfig",
        "WhiteBoxDistillTrainer",
    ),
    "spec_kd.vocabulary": ("VocabularyMismatchError", "align_vocabulary"),
}

if TYPE_CHECKING:
    from spec_kd.data.corpus import tokenize_corpus
    from spec_kd.data.reference_scores import add_reference_scores
    from spec_kd.data.response_options import ResponseOptions, ScoreOptions
    from spec_kd.data.responses import generate_responses, score_completions
    from spec_kd.decoding import SpeculationOptions, generate_speculatively
    from spec_kd.drafts import (
        DraftPlan,
        DraftPlanOptions,
        DraftShapeOptions,
        InitialDraft,
        PlannedShape,
        ShortRun,
        init_draft,
        plan_draft,
    )
    from spec_kd.engines import RayEngine, RayOptions, ServerEngine, ServerOptions, TransformersEngine, VLLMEngine
    from spec_kd.evaluation import (
        AcceptanceMetrics,
        EvaluationOptions,
        EvaluationReport,
        Observation,
        ObservationOptions,
        ObservedReport,
        ReplayOptions,
        ServerTimingOptions,
        ServingCosts,
        SpeculativeEvalCallback,
        SyntheticSpeed,
        check_gates,
        compare_observed,
        describe_observation,
        evaluate_draft,
        find_loop,
        generate_assisted,
        measure_server_costs,
        measure_synthetic_speed,
        observe_serving,
        replay,
        save_observed,
        save_report,
    )
    from spec_kd.finite import NonFiniteError
    from spec_kd.hub import ExportOptions, GGUFError, ServingFile, export_draft, export_gguf, recommend_in_card
    from spec_kd.losses import (
        Divergence,
        SignalSpec,
        fused_linear_divergence,
        register_divergence,
        register_sparse_method,
    )
    from spec_kd.prompts.curated import CuratedOptions, load_curated_prompts
    from spec_kd.prompts.description import describe_prompts
    from spec_kd.prompts.filters import TextFilter
    from spec_kd.prompts.logs.completion_ids import add_completion_ids
    from spec_kd.prompts.logs.options import LogOptions
    from spec_kd.prompts.logs.query_logs import load_query_logs
    from spec_kd.prompts.logs.scale.options import ScaleOptions
    from spec_kd.prompts.mixing import MixOptions, mix_prompts
    from spec_kd.prompts.synthesis.options import SynthesisOptions
    from spec_kd.prompts.synthesis.synthesis import synthesize_queries
    from spec_kd.serving import serving_commands
    from spec_kd.serving.check import check_serving
    from spec_kd.serving.pair import ServingFinding
    from spec_kd.trainer import (
        BlackBoxSFTConfig,
        BlackBoxSFTTrainer,
        OnlineGKDConfig,
        OnlineGKDTrainer,
        WhiteBoxDistillConfig,
        WhiteBoxDistillTrainer,
    )
    from spec_kd.vocabulary import VocabularyMismatchError, align_vocabulary

__all__ = [
    "AcceptanceMetrics",
    "BlackBoxSFTConfig",
    "BlackBoxSFTTrainer",
    "CuratedOptions",
    "Divergence",
    "DraftPlan",
    "DraftPlanOptions",
    "DraftShapeOptions",
    "EvaluationOptions",
    "EvaluationReport",
    "ExportOptions",
    "GGUFError",
    "InitialDraft",
    "LogOptions",
    "MixOptions",
    "NonFiniteError",
    "Observation",
    "ObservationOptions",
    "ObservedReport",
    "OnlineGKDConfig",
    "OnlineGKDTrainer",
    "PlannedShape",
    "RayEngine",
    "RayOptions",
    "ReplayOptions",
    "ResponseOptions",
    "ScaleOptions",
    "ScoreOptions",
    "ServerEngine",
    "ServerOptions",
    "ServerTimingOptions",
    "ServingCosts",
    "ServingFile",
    "ServingFinding",
    "ShortRun",
    "SignalSpec",
    "SpeculationOptions",
    "SpeculativeEvalCallback",
    "SynthesisOptions",
    "SyntheticSpeed",
    "TextFilter",
    "TransformersEngine",
    "VLLMEngine",
    "VocabularyMismatchError",
    "WhiteBoxDistillConfig",
    "WhiteBoxDistillTrainer",
    "add_completion_ids",
    "add_reference_scores",
    "align_vocabulary",
    "check_gates",
    "check_serving",
    "compare_observed",
    "describe_observation",
    "describe_prompts",
    "evaluate_draft",
    "export_draft",
    "export_gguf",
    "find_loop",
    "fused_linear_divergence",
    "generate_assisted",
    "generate_responses",
    "generate_speculatively",
    "init_draft",
    "load_curated_prompts",
    "load_query_logs",
    "measure_server_costs",
    "measure_synthetic_speed",
    "mix_prompts",
    "observe_serving",
    "plan_draft",
    "recommend_in_card",
    "register_divergence",
    "register_sparse_method",
    "replay",
    "save_observed",
    "save_report",
    "score_completions",
    "serving_commands",
    "synthesize_queries",
    "tokenize_corpus",
]

__getattr__, __dir__ = import_lazily(__name__, _ROOMS)
