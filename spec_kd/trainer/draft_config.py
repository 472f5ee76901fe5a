"""What the draft trainers' configurations share."""

from dataclasses import dataclass

import torch
from trl import SFTConfig

from spec_kd.checks import read_path
from spec_kd.finite import check_finite_options
from spec_kd.open_types import JsonObject
from spec_kd.options import document_own_options, option
from spec_kd.secrets import strip_secrets
from spec_kd.trainer.option_checks import check_training_options


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
