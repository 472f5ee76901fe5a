"""`spec-kd train METHOD`: a draft learns from the target's responses, or from completions written during training."""

from dataclasses import dataclass
from typing import cast

from datasets import Dataset
from transformers import TrainerCallback
from trl import get_peft_config, get_quantization_config

import spec_kd
from spec_kd.cli.arguments import DraftArguments, TrainArguments
from spec_kd.cli.model_checks import check_model, check_training, naming_model
from spec_kd.cli.paths import check_exists
from spec_kd.cli.rows import load_rows
from spec_kd.cli.steps import Workspace, tell
from spec_kd.loading import choose_processing_class, find_processing_class, load_config
from spec_kd.open_types import Arguments, JsonObject
from spec_kd.prompts.splitting import hold_out_rows
from spec_kd.trainer.arguments import get_load_options
from spec_kd.trainer.checkpoint_sums import find_whole_checkpoint
from spec_kd.trainer.configs import DraftConfig
from spec_kd.trainer.draft_trainer import DraftTrainer
from spec_kd.trainer.teachers.stored import read_teacher_info

TRAINERS = {
    "white_box": spec_kd.WhiteBoxDistillTrainer,
    "black_box": spec_kd.BlackBoxSFTTrainer,
    "online_gkd": spec_kd.OnlineGKDTrainer,
}
BUDGETS = ("max_train_tokens", "max_train_minutes")  # a finished run goes on if they are raised
PRODUCTS = ("checkpoint-*", "config.json", "adapter_config.json", "*.safetensors", "tokenizer*", "README.md")
# Of where and how a run is written and watched, not of what it learns.
NOT_INPUTS = (
    "output_dir", "run_name", "report_to", "disable_tqdm", "log_level", "log_level_replica", "logging_steps",
    "logging_first_step", "logging_strategy", "resume_from_checkpoint", "push_to_hub", "hub_model_id", "hub_token",
    "hub_strategy", "hub_private_repo", "save_total_limit", "trackio_space_id", "project",
    "model_name_or_path", "teacher_model_name_or_path", "responses", "target",  # these by their content
)  # fmt: skip


@dataclass(frozen=True)
class TrainCall:
    """A training with its options.

    Args:
        method (`str`): Name in `TRAINERS`.
        arguments (`TrainArguments`), draft (`DraftArguments`), config (`DraftConfig`): Options.
        chosen (`dict[str, Any]`):
            The options that are not defaults, as they were given. A configuration replaces some by what the machine
            has, and it must not be built twice in a process, because it sets up the communication with others.
    """

    method: str
    arguments: TrainArguments
    draft: DraftArguments
    config: DraftConfig
    chosen: JsonObject


def run(call: TrainCall, workspace: Workspace) -> JsonObject:
    """Trains a draft, and writes it to `config.output_dir`.

    Raises:
        ValueError: A model or the responses cannot be read, or options do not fit each other.
        OSError: A model or the responses do not exist.
        ImportError: A package is not installed.
    """
    method, arguments, config, draft = call.method, call.arguments, call.config, call.draft
    if draft.model_name_or_path is None:
        raise ValueError("`model_name_or_path` (`--draft`) is missing: a folder, or a name on the Hub.")
    teacher = getattr(config, "teacher_model_name_or_path", None)
    sources = {"draft": draft.model_name_or_path, "target": arguments.target, "teacher": teacher}
    for role, source in {**sources, "responses": arguments.responses}.items():
        check_exists(role, source)
    fingerprints = workspace.fingerprints
    inputs = {
        "method": method,
        "draft": fingerprints.of_model(draft.model_name_or_path),
        "target": fingerprints.of_model(arguments.target),
        "teacher": fingerprints.of_model(teacher),
        "responses": fingerprints.of_data(arguments.responses),
        "options": {name: value for name, value in call.chosen.items() if name not in NOT_INPUTS},
    }

    output_dir = cast(str, config.output_dir)
    if not workspace.is_finished(output_dir, inputs):
        check_call(call)

    def work() -> JsonObject:
        rows = load_rows(arguments.responses, arguments.split, option="responses")
        trainer = build_trainer(call, rows)
        trainer.dataset_name, trainer.target_name = arguments.responses, arguments.target or trainer.target_name
        trainer.train(resume_from_checkpoint=config.resume_from_checkpoint or find_last_checkpoint(output_dir))
        trainer.save_model()
        trainer.create_model_card()
        if config.push_to_hub:
            trainer.push_to_hub()
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        return {
            "path": output_dir,
            "method": method,
            "num_rows": len(rows),
            "steps": trainer.state.global_step,
            "last_loss": losses[-1] if losses else None,
        }

    return workspace.do(output_dir, f"train {method}", inputs, PRODUCTS, work, continues=BUDGETS)


def check_call(call: TrainCall) -> None:
    """Checks what a training needs besides weights and rows.

    Raises:
        ValueError: An option is wrong, options do not fit each other, or the files of a model are damaged.
        OSError: A model does not exist.
        ImportError: A package is not installed.
    """
    config, draft = call.config, call.draft
    check_training(config, draft)
    if draft.use_peft and config.align_vocabulary and not config.merge_adapter:
        raise ValueError("`align_vocabulary` with `use_peft` needs `merge_adapter`: an adapter has no vocabulary rows.")
    for prefix, role in {"teacher": "teacher", "ref": "reference draft"}.items():
        name = getattr(config, f"{prefix}_model_name_or_path", None)
        if name is not None:
            check_model(role, name, getattr(config, f"{prefix}_model_init_kwargs", None))


def build_trainer(call: TrainCall, rows: Dataset) -> DraftTrainer:
    """Builds the trainer of a method on these rows; raises what the trainer raises for them."""
    method, arguments, config, draft = call.method, call.arguments, call.config, call.draft
    is_live = False
    if isinstance(config, spec_kd.WhiteBoxDistillConfig):
        if config.teacher_model_name_or_path is None and not (
            method == "white_box" and "teacher_info" in rows.column_names
        ):
            config.teacher_model_name_or_path = arguments.target
        is_live = config.teacher_model_name_or_path is not None
    if config.align_vocabulary and config.target_vocab_size is None and not is_live and arguments.target is not None:
        with naming_model("target", arguments.target):
            target_config = load_config(arguments.target, {"trust_remote_code": config.trust_remote_code})
        config.target_vocab_size = target_config.get_text_config().vocab_size
    config.model_init_kwargs = {
        "revision": draft.model_revision,
        "attn_implementation": draft.attn_implementation,
        "dtype": draft.dtype,
        **cast(Arguments, config.model_init_kwargs or {}),
    }
    if getattr(config, "lmbda", None) == 1 and "completion_ids" not in rows.column_names:
        rows = rows.select_columns([name for name in rows.column_names if name != "completion"])  # all are generated
    check_completions(rows)
    held_out = None
    callbacks: list[TrainerCallback] = []
    if config.eval_strategy != "no":
        held_out, rows = hold_out_rows(rows, min(arguments.num_held_out, max(1, len(rows) // 20)))
        info = read_teacher_info(rows)
        # replay needs no target for greedy rows, and for those with log p at their sampling temperature
        can_replay = info is not None and info.sampling_temperature in (0.0, info.logprobs_temperature)
        has_prompts = bool({"prompt", "prompt_ids"} & set(rows.column_names))
        if has_prompts and (is_live or can_replay):
            limit = max(map(len, held_out["completion_ids"])) if "completion_ids" in rows.column_names else None
            callbacks.append(
                spec_kd.SpeculativeEvalCallback(
                    held_out,
                    num_assistant_tokens=arguments.eval_num_assistant_tokens,
                    max_new_tokens=limit if is_live and limit is not None and limit > 1 else None,
                )
            )
    name = cast(str, draft.model_name_or_path)
    return TRAINERS[method](
        model=name,
        args=config,
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=choose_processing_class(
            find_processing_class(name, get_load_options(config, config.model_init_kwargs)),
            find_processing_class(arguments.target, get_load_options(config, None)) if arguments.target else None,
        ),
        peft_config=get_peft_config(draft),
        quantization_config=get_quantization_config(draft),
        callbacks=callbacks,
    )


def check_completions(rows: Dataset) -> None:
    """Raises `ValueError` for rows without a completion among rows that have one, such as those of incomplete logs."""
    if "completion" not in rows.column_names or "completion_ids" in rows.column_names:
        return
    if missing := rows.with_format("arrow")[:]["completion"].null_count:
        raise ValueError(
            f"{missing} of {len(rows)} rows have no `completion`. Let the target complete them (`spec-kd respond`), or "
            "remove them."
        )


def find_last_checkpoint(output_dir: str) -> str | None:
    """Finds the newest whole checkpoint, and says which newer ones are damaged; `None` if there is none."""
    whole, damages = find_whole_checkpoint(output_dir)
    for folder, damage in damages.items():
        tell(f"training does not continue from {folder}: {damage}")
    if damages:
        tell("training begins from the start" if whole is None else f"training continues from {whole}")
    return None if whole is None else str(whole)
