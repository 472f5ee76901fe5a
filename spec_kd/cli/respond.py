"""`spec-kd respond`: the target answers a prompt set, once, with what it thought if asked."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from spec_kd.checks import check_int
from spec_kd.cli.parsing import Parser
from spec_kd.cli.rows import check_exists, load_rows
from spec_kd.cli.steps import Workspace, list_options
from spec_kd.cli.target import GROUP, TargetArguments
from spec_kd.open_types import JsonObject

if TYPE_CHECKING:
    from spec_kd.data.response_options import ResponseOptions

DESCRIPTION = (
    "Lets the target answer every prompt, and with --teacher_signal keeps what distillation needs of its distribution, "
    "so that drafts train without it. A killed job continues after its last whole shard; `accelerate launch -m "
    "spec_kd.cli respond ...` shares the shards between processes."
)
PRODUCTS = ("responses.parquet",)
COMMON = ("target", "prompts", "output_dir", "teacher_signal", "max_new_tokens", "temperature", "engine")
NOT_INPUTS = ("prompts", "output_dir", "on_unidentified_token", "on_unusable_prompt")  # the first by its content


@dataclass
class RespondArguments:
    r"""
    Options of [`~spec_kd.generate_responses`].

    Args:
        prompts (`str`): Prompt set: a file, a folder or a name on the Hub.
        output_dir (`str`): For `responses.parquet` and the shards.
        split (`str`, *optional*, defaults to `"train"`): Of a folder or a Hub name.
        num_prompts (`int`, *optional*): Only the first ones.
        num_draws (`int`, *optional*), signal_top_k (`int`, *optional*): Numbers of the `teacher_signal`.
        others: As of [`~spec_kd.generate_responses`].
    """

    _argument_group_name = "responses"

    prompts: str = field(metadata={"help": "Prompt set: a file, a folder or a name on the Hub, with `prompt`."})
    output_dir: str = field(metadata={"help": "Folder for the responses; the same command again continues there."})
    split: str = field(default="train", metadata={"help": "Split of the prompts, for a folder or a Hub name."})
    num_prompts: int | None = field(default=None, metadata={"help": "Answer only so many prompts, the first ones."})
    max_new_tokens: int = field(default=512, metadata={"help": "Most tokens of an answer."})
    temperature: float = field(default=1.0, metadata={"help": "Of the sampling; 0 is greedy."})
    top_k: int = field(default=0, metadata={"help": "Most likely ids to sample from; 0 for all."})
    top_p: float = field(default=1.0, metadata={"help": "Mass of the most likely ids to sample from."})
    teacher_signal: str | None = field(
        default=None,
        metadata={
            "help": "What to keep of the target's distribution: 'token_only', 'sampled_counts', 'sampled_logprobs' or "
            "'top_k_tail'."
        },
    )
    num_draws: int | None = field(default=None, metadata={"help": "Draws per token of the sampled signals (50)."})
    signal_top_k: int | None = field(default=None, metadata={"help": "Ids per token of 'top_k_tail' (16)."})
    batch_size: int | None = field(
        default=None, metadata={"help": "Prompts at a time: 8 for transformers, a whole shard elsewhere by default."}
    )
    shard_size: int = field(default=512, metadata={"help": "Answers between two savings."})
    seed: int = field(default=0, metadata={"help": "Of the sampling."})
    on_unidentified_token: str = field(
        default="raise",
        metadata={"help": "'raise' or 'drop' answers of a server of which the exact ids are not known."},
    )

    on_unusable_prompt: str = field(
        default="raise",
        metadata={"help": "'raise' or 'skip' prompts that the target cannot take, such as those that are too long."},
    )

    def build_options(self) -> "ResponseOptions":
        """The options of [`~spec_kd.generate_responses`]; raises `ValueError` whatever the prompts and the target."""
        from spec_kd.data.response_options import ResponseOptions

        check_int("num_prompts", self.num_prompts, is_optional=True)
        return ResponseOptions(**{option.name: getattr(self, option.name) for option in fields(ResponseOptions)})


RespondCall = tuple[RespondArguments, TargetArguments]


def build_parser() -> Parser:
    """The options of the command."""
    return Parser("respond", DESCRIPTION, {"responses": RespondArguments, GROUP: TargetArguments}, COMMON)


def parse(argv: Sequence[str]) -> RespondCall:
    """The command line."""
    return build_parser().parse(argv)


def run(call: RespondCall) -> JsonObject:
    """The command."""
    return respond(*call, Workspace())


def respond(arguments: RespondArguments, target: TargetArguments, workspace: Workspace) -> JsonObject:
    """The step: answers in `output_dir/responses.parquet`."""
    target.check()
    check_exists("prompts", arguments.prompts)
    options = arguments.build_options()
    inputs = {
        "target": target.list_inputs(workspace.fingerprints),
        "prompts": workspace.fingerprints.of_data(arguments.prompts),
        "options": list_options(arguments, NOT_INPUTS),
    }

    def work() -> JsonObject:
        from spec_kd import generate_responses

        join_processes()
        prompts = take_first(load_rows(arguments.prompts, arguments.split, option="prompts"), arguments.num_prompts)
        model, processing_class = target.load()
        rows = generate_responses(
            model, prompts, options, processing_class=processing_class, output_dir=arguments.output_dir
        )
        return {
            "path": f"{arguments.output_dir}/{PRODUCTS[0]}",
            "num_prompts": len(prompts),
            "num_responses": len(rows),
            "num_tokens": sum(map(len, rows["completion_ids"])),
        }

    return workspace.do(arguments.output_dir, "respond", inputs, PRODUCTS, work)


def join_processes() -> None:
    """Lets the processes of `accelerate launch` share the work on a CPU too, where accelerate has to be told."""
    import accelerate
    import torch

    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available():
        accelerate.PartialState(cpu=True)


def take_first(rows: Any, count: int | None) -> Any:
    """The first `count` rows of a dataset, or all of them."""
    return rows if count is None else rows.select(range(min(count, len(rows))))
