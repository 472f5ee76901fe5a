"""The recipe that every domain's example runs: target responses -> distillation -> acceptance before and after.

Nothing here is specific to a domain or a model size; `domain_example.py` adds the embedded models of a run without any.
"""

import json
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from transformers import AutoTokenizer, PreTrainedModel
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from spec_kd import (
    AcceptanceMetrics,
    BlackBoxSFTConfig,
    BlackBoxSFTTrainer,
    SpeculativeEvalCallback,
    WhiteBoxDistillConfig,
    WhiteBoxDistillTrainer,
    generate_responses,
)
from spec_kd.losses import SPARSE_METHODS
from spec_kd.prompts.splitting import hold_out_rows
from spec_kd.trainer.draft_trainer import DraftTrainer
from spec_kd.trainer.teachers.live import load_teacher

METHODS = ("white_box", "black_box")
LIVE = "live"
History = list[tuple[int, dict[float, AcceptanceMetrics]]]  # step, and figures by temperature


@dataclass
class RecipeArguments(ScriptArguments):
    r"""
    What the recipe needs besides the trainer's and the model's arguments.

    Args:
        method (`str`): `"white_box"` (the target's distribution) or `"black_box"` (its tokens).
        generate_responses (`bool`):
            Whether the target answers the training prompts first. `False` takes the dataset's completions as they are,
            which is right only if the target wrote them.
        response_temperature (`float`):
            Sampling temperature of those answers, 0 for greedy. Sampled text shows the draft more of what the target
            may write; a server that samples needs that.
        teacher_signal (`str`):
            White box: what the target leaves with its answers for the draft to learn from (a name of
            `spec_kd.losses.SPARSE_METHODS`), or `"live"`: it reads along at every step, as it does where it has not
            answered first, and must where the signal does not serve the loss. The default is the winner of a search at
            equal cost in three domains: steps without the target are cheaper, so there are more of them
            (docs/findings.md).
        max_new_tokens (`int`): Longest answer, in training and in evaluation.
        generation_batch_size (`int`): Prompts that the target answers at a time.
        num_train_prompts (`int`, *optional*): Take only so many training prompts.
        num_eval_prompts (`int`): Test prompts that acceptance is measured on.
        num_assistant_tokens (`int`): Tokens drafted in a round.
    """

    method: str = field(default="white_box", metadata={"help": "'white_box' or 'black_box'."})
    generate_responses: bool = field(
        default=True, metadata={"help": "Whether the target answers the training prompts first."}
    )
    response_temperature: float = field(
        default=1.0, metadata={"help": "Sampling temperature of the target's answers, 0 for greedy."}
    )
    teacher_signal: str = field(
        default="sampled_logprobs",
        metadata={"help": "What the target leaves with its answers, such as 'sampled_logprobs'; 'live': reads along."},
    )
    max_new_tokens: int = field(default=512, metadata={"help": "Longest answer of the target, in tokens."})
    generation_batch_size: int = field(default=16, metadata={"help": "Prompts the target answers at a time."})
    num_train_prompts: int | None = field(default=None, metadata={"help": "Take only so many training prompts."})
    num_eval_prompts: int = field(default=100, metadata={"help": "Test prompts that acceptance is measured on."})
    num_assistant_tokens: int = field(default=5, metadata={"help": "Tokens drafted in a round (gamma)."})

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"`method` is {self.method!r}, but must be one of {', '.join(METHODS)}.")
        if self.teacher_signal not in (LIVE, *SPARSE_METHODS):
            names = ", ".join(map(repr, (LIVE, *SPARSE_METHODS)))
            raise ValueError(f"`teacher_signal` is {self.teacher_signal!r}, but must be one of {names}.")
        for name in ("max_new_tokens", "num_eval_prompts", "num_assistant_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}, but must be at least 1.")

    @property
    def stored_targets(self) -> str | None:
        """What takes the place of the target in training, if anything does."""
        is_stored = self.method == "white_box" and self.generate_responses and self.teacher_signal != LIVE
        return self.teacher_signal if is_stored else None


@dataclass(frozen=True)
class RecipeResult:
    """What a run leaves in memory: the trainer, and the figures before and after by temperature."""

    trainer: DraftTrainer
    target: PreTrainedModel
    history: History

    @property
    def before(self) -> dict[float, AcceptanceMetrics]:
        return self.history[0][1]

    @property
    def after(self) -> dict[float, AcceptanceMetrics]:
        return self.history[-1][1]


def parse_arguments(
    argv: list[str], defaults: dict[str, Any] | None = None
) -> tuple[RecipeArguments, WhiteBoxDistillConfig, ModelConfig]:
    """Command line (and `--config file.yaml`) into dataclasses; `defaults` replace those of the dataclasses."""
    parser = TrlParser((RecipeArguments, WhiteBoxDistillConfig, ModelConfig))
    unknown = parser.set_defaults_with_config(**(defaults or {}))
    if unknown:
        raise ValueError(f"Unknown defaults: {unknown}")
    return parser.parse_args_and_config(argv)


def load_prompts(arguments: RecipeArguments) -> tuple[Dataset, Dataset]:
    """Training and test rows of a dataset on the Hub or in a local folder (`train.jsonl`, `test.jsonl`, ...)."""
    if arguments.dataset_name is None:
        raise ValueError("`--dataset_name` is missing: a Hub name, or a folder with train.jsonl and test.jsonl.")
    data = load_dataset(arguments.dataset_name, name=arguments.dataset_config)
    splits = (arguments.dataset_train_split, arguments.dataset_test_split)
    missing = [split for split in splits if split not in data]
    if missing:
        raise ValueError(f"`{arguments.dataset_name}` has the splits {list(data)}, but not {missing}.")
    return data[splits[0]], data[splits[1]]


def run_recipe(
    arguments: RecipeArguments,
    training: WhiteBoxDistillConfig,
    *,
    draft_path: str,
    target_path: str,
    train_prompts: Dataset,
    test_prompts: Dataset,
    model: ModelConfig | None = None,
) -> RecipeResult:
    """Answers, trains, measures and saves; see the module's first lines.

    Args:
        arguments (`RecipeArguments`): The recipe.
        training (`WhiteBoxDistillConfig`): The trainer's arguments; black-box takes what it shares with them.
        draft_path (`str`): Folder or Hub id of the draft.
        target_path (`str`): Folder or Hub id of the target.
        train_prompts (`Dataset`): Rows with `prompt` (and `completion`, if the target does not answer anew).
        test_prompts (`Dataset`): Rows with `prompt`.
        model (`ModelConfig`, *optional*): TRL's flags for LoRA and for a quantized base.
    """
    signal = arguments.stored_targets
    if signal is not None:
        training.build_loss().check_served_by(SPARSE_METHODS[signal])
    if arguments.num_train_prompts is not None:
        train_prompts = train_prompts.select(range(min(arguments.num_train_prompts, len(train_prompts))))
    test_prompts = test_prompts.select(range(min(arguments.num_eval_prompts, len(test_prompts))))
    tokenizer = AutoTokenizer.from_pretrained(target_path, trust_remote_code=training.trust_remote_code)
    target = load_teacher(
        target_path,
        training.teacher_model_init_kwargs,
        is_distributed=training.distributed_state.num_processes > 1,
        trust_remote_code=training.trust_remote_code,
        dtype="auto",
    )
    if not hasattr(target, "hf_device_map"):
        target.to(training.device)
    rows = train_prompts
    if arguments.generate_responses:
        # The first process works, the others read what it wrote.
        with training.main_process_first(desc="target responses"):
            rows = generate_responses(
                target,
                train_prompts,
                processing_class=tokenizer,
                max_new_tokens=arguments.max_new_tokens,
                temperature=arguments.response_temperature,
                batch_size=arguments.generation_batch_size,
                seed=training.seed,
                teacher_signal=signal,
                output_dir=os.path.join(training.output_dir, "responses"),
            )
    # rows of `eval_loss`; acceptance has its own prompts
    held_out, train_rows = hold_out_rows(rows, min(64, max(1, len(rows) // 20)))
    callback = SpeculativeEvalCallback(
        test_prompts.select_columns(
            [name for name in ("prompt", "tools", "chat_template_kwargs") if name in test_prompts.column_names]
        ),
        target,
        num_assistant_tokens=arguments.num_assistant_tokens,
        max_new_tokens=arguments.max_new_tokens,
        processing_class=tokenizer,
        batch_size=arguments.generation_batch_size,
    )
    common = {
        "model": draft_path,
        "train_dataset": train_rows,
        "eval_dataset": held_out,
        "processing_class": tokenizer,
        "peft_config": None if model is None else get_peft_config(model),
        "quantization_config": None if model is None else get_quantization_config(model),
        "callbacks": [callback],
    }
    if arguments.method == "white_box":
        training.teacher_model_init_kwargs = None  # used above
        if signal is not None:  # else the trainer would load the target by its name
            training.teacher_model_name_or_path = None
            training.target_vocab_size = target.config.get_text_config().vocab_size
        trainer = WhiteBoxDistillTrainer(args=training, teacher_model=None if signal else target, **common)
    else:
        trainer = BlackBoxSFTTrainer(args=to_black_box(training, target.config.get_text_config().vocab_size), **common)
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model()
    trainer.create_model_card(dataset_name=arguments.dataset_name)
    if training.push_to_hub:
        trainer.push_to_hub(dataset_name=arguments.dataset_name)
    return RecipeResult(trainer, target, callback.history)


def to_black_box(training: WhiteBoxDistillConfig, target_vocab_size: int) -> BlackBoxSFTConfig:
    """The same run without the white-box loss."""
    shared = {f.name: getattr(training, f.name) for f in fields(BlackBoxSFTConfig) if f.init}
    return BlackBoxSFTConfig(**{**shared, "target_vocab_size": target_vocab_size})


def describe_metrics(figures: AcceptanceMetrics) -> dict[str, list[float]]:
    """Value and 95 % interval of each figure, as JSON: `[value, low, high]`."""
    named = {
        "alpha": figures.alpha,
        "block_efficiency": figures.block_efficiency,
        "acceptance_rate": figures.acceptance_rate,
    }
    return {name: [round(x, 4) for x in interval] for name, interval in named.items() if interval is not None}


def format_table(rows: dict[str, dict[float, AcceptanceMetrics]]) -> str:
    """A Markdown table, one line for each label: alpha, block efficiency and acceptance with 95 % intervals."""

    def cell(interval: Any) -> str:
        return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"

    lines = [
        "| | alpha_greedy | alpha_t1 | block efficiency (greedy) | acceptance rate (greedy) |",
        "|---|---|---|---|---|",
    ]
    for label, figures in rows.items():
        greedy, sampled = figures[0.0], figures[1.0]
        cells = (greedy.alpha, sampled.alpha, greedy.block_efficiency, greedy.acceptance_rate)
        lines.append(f"| {label} | " + " | ".join(map(cell, cells)) + " |")
    return "\n".join(lines)


def describe_history(history: History) -> list[dict[str, Any]]:
    """Step and figures of every evaluation, as JSON."""
    return [
        {"step": step, **{f"T={t:g}": describe_metrics(f) for t, f in figures.items()}} for step, figures in history
    ]


def plot_histories(histories: dict[str, list[dict[str, Any]]], path: Path, title: str) -> None:
    """Greedy acceptance over training steps with 95 % bands, one line for each label, from `describe_history`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, name, ylabel in (
        (axes[0], "alpha", "alpha_greedy"),
        (axes[1], "block_efficiency", "tokens per target pass (greedy)"),
    ):
        for label, history in histories.items():
            steps = [entry["step"] for entry in history]
            value, low, high = zip(*(entry["T=0"][name] for entry in history), strict=True)
            axis.plot(steps, value, marker="o", markersize=3, label=label)
            axis.fill_between(steps, low, high, alpha=0.2)
        axis.set(xlabel="training step", ylabel=ylabel)
        axis.set_ylim(bottom=0 if name == "alpha" else 1)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def save_record(record: dict[str, Any], path: Path) -> None:
    """Writes JSON for people and scripts."""
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def use_all_cores() -> None:
    """`accelerate launch` gives a CPU process one thread; a single process may have every core."""
    if not torch.accelerator.is_available() and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        is_linux = hasattr(os, "sched_getaffinity")  # which also counts what a container may use
        torch.set_num_threads(len(os.sched_getaffinity(0)) if is_linux else os.cpu_count() or 1)
