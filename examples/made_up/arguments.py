"""The arguments of an example, and the models and prompts they name."""

from dataclasses import dataclass
from typing import Any

from datasets import Dataset, load_dataset
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig, ScriptArguments, TrlParser

from spec_kd import WhiteBoxDistillConfig
from spec_kd.losses import SPARSE_METHODS
from spec_kd.options import check_choice, check_int, document_options, option
from spec_kd.trainer.teachers.live import load_teacher

METHODS = ("white_box", "black_box")
LIVE = "live"


@document_options
@dataclass(kw_only=True)
class ExampleOptions:
    """What an example needs besides the arguments of the trainer and of the model."""

    method: str = option("'white_box' learns the target's distribution, 'black_box' its tokens.", "white_box")
    generate_responses: bool = option("Whether the target completes the training prompts first.", True)
    response_temperature: float = option("Sampling temperature of these completions; 0 is greedy.", 1.0)
    teacher_signal: str = option(
        "What the target stores with its completions for white-box training, a name of "
        "`spec_kd.losses.SPARSE_METHODS`; 'live' keeps the target in memory instead.",
        "sampled_logprobs",
    )
    max_new_tokens: int = option("Longest completion in tokens, in training and in evaluation.", 512)
    generation_batch_size: int = option("Prompts that the target completes at a time.", 16)
    num_train_prompts: int | None = option("Number of training prompts; all by default.", None)
    num_eval_prompts: int = option("Number of test prompts that acceptance is measured on.", 100)
    num_assistant_tokens: int = option("Tokens drafted in a round (gamma).", 5)

    def __post_init__(self):
        check_choice("method", self.method, METHODS)
        if self.teacher_signal not in (LIVE, *SPARSE_METHODS):
            names = ", ".join(map(repr, (LIVE, *SPARSE_METHODS)))
            raise ValueError(f"`teacher_signal` is {self.teacher_signal!r}, but must be one of {names}.")
        for name in ("max_new_tokens", "num_eval_prompts", "num_assistant_tokens"):
            check_int(name, getattr(self, name))


@dataclass
class ExampleArguments(ExampleOptions, ScriptArguments):
    """[`ExampleOptions`] and TRL's `ScriptArguments`, which name the dataset."""

    @property
    def stored_signal(self) -> str | None:
        """The signal that takes the target's place in training, if any does."""
        is_stored = self.method == "white_box" and self.generate_responses and self.teacher_signal != LIVE
        return self.teacher_signal if is_stored else None


def parse_arguments(
    argv: list[str], embedded_defaults: dict[str, Any]
) -> tuple[ExampleArguments, WhiteBoxDistillConfig, ModelConfig]:
    """A command line, with the YAML file of `--config`; without any model, `embedded_defaults` replace the defaults.

    Raises:
        ValueError: One of the two models is missing, or an option is out of its range.
    """
    parser = TrlParser((ExampleArguments, WhiteBoxDistillConfig, ModelConfig))
    if not any(argument.split("=")[0] in ("--config", "--model_name_or_path") for argument in argv):
        if unknown := parser.set_defaults_with_config(**embedded_defaults):
            raise ValueError(f"Unknown defaults: {unknown}")
        return parser.parse_args_and_config(argv)
    options, training, model = parser.parse_args_and_config(argv)
    for name, value in (
        ("--model_name_or_path", model.model_name_or_path),
        ("--teacher_model_name_or_path", training.teacher_model_name_or_path),
    ):
        if value is None:
            raise ValueError(f"`{name}` is missing. Without any model, leave all arguments out for the embedded run.")
    if training.eval_strategy == "no":
        training.eval_strategy = "epoch"  # acceptance before and after is the point of the example
    training.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(training.model_init_kwargs or {}),
    }
    return options, training, model


def load_data(options: ExampleArguments) -> tuple[Dataset, Dataset]:
    """Training and test rows of a dataset on the Hub or in a local folder (`train.jsonl`, `test.jsonl`, ...)."""
    if options.dataset_name is None:
        raise ValueError("`--dataset_name` is missing: a Hub name, or a folder with train.jsonl and test.jsonl.")
    data = load_dataset(options.dataset_name, name=options.dataset_config)
    splits = (options.dataset_train_split, options.dataset_test_split)
    if missing := [split for split in splits if split not in data]:
        raise ValueError(f"`{options.dataset_name}` has the splits {list(data)}, but not {missing}.")
    return data[splits[0]], data[splits[1]]


def load_target(training: WhiteBoxDistillConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The target on the training's device, and its tokenizer."""
    name = training.teacher_model_name_or_path
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=training.trust_remote_code)
    target = load_teacher(
        name,
        training.teacher_model_init_kwargs,
        is_distributed=training.distributed_state.num_processes > 1,
        trust_remote_code=training.trust_remote_code,
        dtype="auto",
    )
    return target if hasattr(target, "hf_device_map") else target.to(training.device), tokenizer
