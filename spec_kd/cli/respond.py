"""`spec-kd respond`: the target completes a prompt set, and leaves a teacher signal if asked."""

import os
from dataclasses import dataclass

from spec_kd.checks import check_int
from spec_kd.cli.parsing import Parser
from spec_kd.cli.rows import check_exists, load_rows, take_first
from spec_kd.cli.steps import Workspace, list_options
from spec_kd.cli.target import GROUP, TargetArguments
from spec_kd.data.response_options import ResponseOptions
from spec_kd.open_types import JsonObject
from spec_kd.options import document_options, option

DESCRIPTION = (
    "Lets the target complete every prompt. With --teacher_signal it stores what distillation needs of the target's "
    "distribution, so that drafts train without the target. A stopped job continues after its last whole shard. "
    "`accelerate launch -m spec_kd.cli respond ...` shares the shards between processes."
)
PRODUCTS = ("responses.parquet",)
COMMON = ("target", "prompts", "output_dir", "teacher_signal", "max_new_tokens", "temperature", "engine")
NOT_INPUTS = ("prompts", "output_dir")  # the first by its content
CHANGE_NO_ROW = ("on_unidentified_token", "on_unusable_prompt")


@document_options
@dataclass(frozen=True)
class ResponseFiles:
    """What `spec-kd respond` reads and writes."""

    prompts: str = option("Prompt set: a file, a folder or a name on the Hub, with the column `prompt`.")
    output_dir: str = option("Folder for the responses, where a stopped job continues.")
    split: str = option("Split of the prompts, for a folder or a name on the Hub.", "train")
    num_prompts: int | None = option("Number of prompts to complete, the first ones; all by default.", None)

    def __post_init__(self) -> None:
        check_int("num_prompts", self.num_prompts, is_optional=True)


ResponseCall = tuple[ResponseFiles, ResponseOptions, TargetArguments]


def build_parser() -> Parser:
    """The options of the command."""
    groups = {"files": ResponseFiles, "responses": ResponseOptions, GROUP: TargetArguments}
    return Parser("respond", DESCRIPTION, groups, COMMON)


def run(
    files: ResponseFiles, options: ResponseOptions, target: TargetArguments, workspace: Workspace | None = None
) -> JsonObject:
    """Writes the target's responses to `output_dir/responses.parquet`.

    Raises:
        ValueError: The target or the prompts cannot be read, or the engine cannot do what is asked.
        OSError: The target or the prompts do not exist.
        ImportError: The engine is not installed.
    """
    workspace = workspace or Workspace()
    target.check()
    check_exists("prompts", files.prompts)
    inputs = {
        "target": target.list_inputs(workspace.fingerprints),
        "prompts": workspace.fingerprints.of_data(files.prompts),
        "options": list_options(files, NOT_INPUTS) | list_options(options, CHANGE_NO_ROW),
    }

    def work() -> JsonObject:
        from spec_kd import generate_responses

        join_processes()
        prompts = take_first(load_rows(files.prompts, files.split, option="prompts"), files.num_prompts)
        model, processing_class = target.load()
        rows = generate_responses(
            model, prompts, options, processing_class=processing_class, output_dir=files.output_dir
        )
        return {
            "path": f"{files.output_dir}/{PRODUCTS[0]}",
            "num_prompts": len(prompts),
            "num_responses": len(rows),
            "num_tokens": sum(map(len, rows["completion_ids"])),
        }

    return workspace.do(files.output_dir, "respond", inputs, PRODUCTS, work)


def join_processes() -> None:
    """Lets the processes of `accelerate launch` share the work on a CPU too, where accelerate has to be told."""
    import accelerate
    import torch

    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available():
        accelerate.PartialState(cpu=True)
