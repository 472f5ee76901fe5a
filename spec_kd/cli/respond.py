"""`spec-kd respond`: the target completes a prompt set, and leaves a teacher signal if asked."""

import os

import accelerate
import torch

import spec_kd
from spec_kd.cli.arguments import ResponseFiles, TargetArguments
from spec_kd.cli.paths import check_exists
from spec_kd.cli.rows import load_rows, take_first
from spec_kd.cli.steps import Workspace, list_options
from spec_kd.cli.target import check_target, list_inputs, loaded_target
from spec_kd.open_types import JsonObject

PRODUCTS = ("responses.parquet",)
NOT_INPUTS = ("prompts", "output_dir")  # the first by its content
CHANGE_NO_ROW = ("on_unidentified_token", "on_unusable_prompt")

ResponseCall = tuple[ResponseFiles, spec_kd.ResponseOptions, spec_kd.RayOptions, TargetArguments]


def run(
    files: ResponseFiles,
    options: spec_kd.ResponseOptions,
    workers: spec_kd.RayOptions,
    target: TargetArguments,
    workspace: Workspace,
) -> JsonObject:
    """Writes the target's responses to `output_dir/responses.parquet`.

    Raises:
        ValueError: The target or the prompts cannot be read, or the engine cannot do what is asked.
        OSError: The target or the prompts do not exist.
        ImportError: The engine is not installed.
    """
    check_target(target, workers)
    check_exists("prompts", files.prompts)
    inputs = {
        "target": list_inputs(target, workspace.fingerprints),
        "prompts": workspace.fingerprints.of_data(files.prompts),
        "options": list_options(files, NOT_INPUTS) | list_options(options, CHANGE_NO_ROW),
    }

    def work() -> JsonObject:
        share_on_cpu()
        prompts = take_first(load_rows(files.prompts, files.split, option="prompts"), files.num_prompts)
        with loaded_target(target, workers) as (engine, processing_class):
            rows = spec_kd.generate_responses(
                engine, prompts, options, processing_class=processing_class, output_dir=files.output_dir
            )
        return {
            "path": f"{files.output_dir}/{PRODUCTS[0]}",
            "num_prompts": len(prompts),
            "num_responses": len(rows),
            "num_tokens": sum(map(len, rows["completion_ids"])),
        }

    return workspace.do(files.output_dir, "respond", inputs, PRODUCTS, work)


def share_on_cpu() -> None:
    """Tells accelerate, where there is no accelerator, that several processes share the work on the CPU."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available():
        accelerate.PartialState(cpu=True)
