"""`spec-kd plan-draft`: compares shapes of a draft by what they cost and by what they learn in equal time."""

from pathlib import Path

import spec_kd
from spec_kd.cli.arguments import PlanDraftFiles
from spec_kd.cli.model_checks import check_model, naming_model
from spec_kd.cli.paths import check_exists
from spec_kd.cli.rows import load_rows
from spec_kd.cli.steps import Workspace, list_options
from spec_kd.evaluation import read_costs
from spec_kd.files import COSTS_FILE
from spec_kd.loading import load_tokenizer
from spec_kd.open_types import JsonObject

PRODUCTS = ("plan.json", "plan.md", "plan.png", "shapes.jsonl", COSTS_FILE)
NOT_INPUTS = ("target", "responses", "costs", "output_dir", "target_gguf")  # these by their content
# What is computed from the measurements, and further ones
CONTINUES = ("shapes", "wished_speedup", "reachable_alpha", "alphas", "run_minutes", "repeats")


def run(
    files: PlanDraftFiles,
    options: spec_kd.DraftPlanOptions,
    timing: spec_kd.ServerTimingOptions,
    workspace: Workspace | None = None,
) -> JsonObject:
    """Writes the plan to `output_dir`; returns its headline, the recommended shape and what is known of every shape.

    Raises:
        ValueError: An option is wrong, the target cannot give a shape, or a model or the responses cannot be read.
        OSError: A model, a file or a program does not exist.
        GGUFError: A tool of llama.cpp failed.
        LlamaServerError: The server does not start, or ends.
        MeasurementError: The times contradict each other.
    """
    workspace = workspace or Workspace()
    data = {"responses": files.responses, "costs": files.costs, "target_gguf": options.target_gguf}
    for name, source in {"target": files.target, **data}.items():
        check_exists(name, source)
    inputs: JsonObject = {
        "target": workspace.fingerprints.of_model(files.target),
        **{name: None if source is None else workspace.fingerprints.of_data(source) for name, source in data.items()},
        "options": list_options(files, NOT_INPUTS) | list_options(options, NOT_INPUTS) | list_options(timing),
    }
    if not workspace.is_finished(files.output_dir, inputs):
        check_model("target", files.target)

    def work() -> JsonObject:
        with naming_model("tokenizer of the target", files.target):
            tokenizer = load_tokenizer(files.target)
        plan = spec_kd.plan_draft(
            files.target,
            options,
            output_dir=files.output_dir,
            timing=timing,
            responses=None if files.responses is None else load_rows(files.responses, option="responses"),
            costs=None if files.costs is None else read_costs(files.costs),
            processing_class=tokenizer,
        )
        best = plan.recommended
        named = ("name", "num_parameters", "num_bytes", "break_even_alpha", "wished_alpha", "num_assistant_tokens")
        return {
            "headline": plan.headline,
            "recommended": None if best is None else {"name": best.name, **list_options(best.options)},
            "num_assistant_tokens": None if best is None else best.num_assistant_tokens,
            "shapes": [{name: getattr(one, name) for name in named} for one in plan.shapes],
            "path": str(Path(files.output_dir) / "plan.md"),
        }

    return workspace.do(files.output_dir, "plan-draft", inputs, PRODUCTS, work, CONTINUES)
