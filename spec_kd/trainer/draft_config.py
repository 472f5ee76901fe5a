"""What the draft trainers' configurations share."""

from dataclasses import dataclass, field

import torch
from trl import SFTConfig

from spec_kd.checks import read_path
from spec_kd.finite import check_finite_options
from spec_kd.open_types import JsonObject
from spec_kd.secrets import strip_secrets
from spec_kd.trainer.option_checks import check_training_options


@dataclass
class DraftConfig(SFTConfig):
    r"""
    Options shared by the draft trainers, on top of [`~trl.SFTConfig`].

    `bf16` defaults to `False` where there is no accelerator (TRL: `True`): most CPUs only emulate it.
    `logging_nan_inf_filter` is always off: it would log other batches' losses in place of a NaN.

    Args:
        assume_target_completions (`bool`, *optional*, defaults to `False`):
            Whether rows that do not say what the target wrote are taken as the target's from the first token to the
            last: `text` and `input_ids` alone, what a `formatting_func` returns, and `messages` with images.
        merge_adapter (`bool`, *optional*, defaults to `False`):
            Whether `save_model` and `push_to_hub` write LoRA weights merged into the draft, as servers want it.
            Checkpoints written during training stay adapters, so that training can resume.
        align_vocabulary (`bool`, *optional*, defaults to `False`):
            Whether `save_model` and `push_to_hub` pad or cut the draft's vocabulary rows to the target's number, which
            vLLM, SGLang and `generate` demand. The distribution over real ids does not change. Not for checkpoints.
        target_vocab_size (`int`, *optional*):
            Rows of the target's head. Read from the teacher where there is one; otherwise `align_vocabulary` needs it.
    """

    assume_target_completions: bool = field(
        default=False,
        metadata={"help": "Whether rows that do not say what the target wrote are trained on as a whole."},
    )
    merge_adapter: bool = field(
        default=False, metadata={"help": "Whether the final model is saved with its LoRA weights merged."}
    )
    align_vocabulary: bool = field(
        default=False,
        metadata={"help": "Whether the final model is saved with as many vocabulary rows as the target has."},
    )
    target_vocab_size: int | None = field(
        default=None,
        metadata={"help": "Vocabulary rows of the target, for `align_vocabulary` where there is no teacher model."},
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
