"""What the draft trainers' configurations share."""

from dataclasses import dataclass

import torch
from transformers import TrainingArguments
from trl import SFTConfig

from spec_kd.checks import check_int, check_number, read_path
from spec_kd.finite import check_finite_options
from spec_kd.open_types import JsonObject
from spec_kd.options import document_own_options, option
from spec_kd.secrets import strip_secrets

# By name: the bounds of whole numbers as `check_int` takes them.
INTEGERS: dict[str, JsonObject] = {
    "per_device_train_batch_size": {},
    "per_device_eval_batch_size": {},
    "gradient_accumulation_steps": {},
    "eval_accumulation_steps": {"is_optional": True},
    "max_steps": {"minimum": -1},
    "max_length": {"minimum": 2, "is_optional": True},  # a single token has none before it to be predicted from
    "seed": {"minimum": 0, "maximum": 2**32 - 1},
    "data_seed": {"minimum": 0, "maximum": 2**32 - 1, "is_optional": True},
    "save_total_limit": {"minimum": 0, "is_optional": True},
    "dataset_num_proc": {"is_optional": True},
    "dataloader_num_workers": {"minimum": 0},
    "target_vocab_size": {"is_optional": True},
    "vllm_server_port": {"maximum": 65535},
    "vllm_group_port": {"maximum": 65535},
    "vllm_tensor_parallel_size": {},
    "vllm_max_model_length": {"is_optional": True},
}
# By name: the bounds of numbers as `check_number` takes them.
NUMBERS: dict[str, JsonObject] = {
    "learning_rate": {"minimum": 0},
    "num_train_epochs": {"above": 0},
    "weight_decay": {"minimum": 0},
    "adam_beta1": {"minimum": 0, "below": 1},
    "adam_beta2": {"minimum": 0, "below": 1},
    "adam_epsilon": {"minimum": 0},
    "max_grad_norm": {"minimum": 0, "is_optional": True},
    "warmup_steps": {"minimum": 0, "is_optional": True},
    "warmup_ratio": {"minimum": 0, "maximum": 1, "is_optional": True},
    "logging_steps": {"minimum": 0},
    "eval_steps": {"minimum": 0, "is_optional": True},
    "save_steps": {"minimum": 0},
    "label_smoothing_factor": {"minimum": 0, "maximum": 1},
    "vllm_server_timeout": {"above": 0},
    "vllm_gpu_memory_utilization": {"above": 0, "maximum": 1},
    "neftune_noise_alpha": {"minimum": 0, "is_optional": True},
}


@document_own_options
@dataclass
class DraftConfig(SFTConfig):  # type: ignore[explicit-any]  # fields of TRL
    """Options shared by the draft trainers, on top of [`~trl.SFTConfig`].

    `bf16` defaults to `False` where there is no accelerator (TRL: `True`): most CPUs only emulate it.
    `logging_nan_inf_filter` is always off: it would log other batches' losses in place of a NaN.
    """

    assume_target_completions: bool = option(
        "Whether rows that do not say what the target wrote are trained on from the first token to the last: `text` "
        "and `input_ids` alone, what a `formatting_func` returns, and `messages` with images.",
        default=False,
    )
    merge_adapter: bool = option(
        "Whether `save_model` and `push_to_hub` write LoRA weights merged into the draft, as servers need them. "
        "Checkpoints stay adapters, so that training can resume.",
        default=False,
    )
    align_vocabulary: bool = option(
        "Whether `save_model` and `push_to_hub` pad or cut the draft's vocabulary rows to the target's number, as "
        "vLLM, SGLang and `generate` demand. The distribution over real ids and checkpoints do not change.",
        default=False,
    )
    target_vocab_size: int | None = option(
        "Number of rows of the target's head, which `align_vocabulary` needs; read from the teacher by default.",
        default=None,
    )

    def to_dict(self) -> JsonObject:
        """As `TrainingArguments.to_dict`, which trackers log, without secrets such as a token for the draft."""
        return strip_secrets(super().to_dict())

    def __post_init__(self) -> None:
        check_finite_options(self)
        check_training_options(self)
        self.output_dir = read_path("output_dir", self.output_dir, is_optional=True)
        self.logging_nan_inf_filter = False
        if self.bf16 is None and (self.use_cpu or not torch.accelerator.is_available()):
            self.bf16 = False
        super().__post_init__()

    @classmethod
    def translate(cls, values: JsonObject, source: type) -> JsonObject:
        """Options of another configuration class, by this one's names.

        Args:
            values (`dict[str, Any]`): The options' values by their names there.
            source (`type`): That class.
        """
        return values


def check_training_options(config: TrainingArguments) -> None:
    """Raises `ValueError` for a training option out of its range, NaN and infinities included.

    Args:
        config (`TrainingArguments`): The options; those that it does not have are not checked.
    """
    for name, bounds in INTEGERS.items():
        if hasattr(config, name):
            check_int(name, getattr(config, name), **bounds)
    for name, bounds in NUMBERS.items():
        if hasattr(config, name):
            check_number(name, getattr(config, name), **bounds)
