"""Options of training on what the target wrote, without its distribution."""

from dataclasses import dataclass

from spec_kd.trainer.draft_config import DraftConfig


@dataclass
class BlackBoxSFTConfig(DraftConfig):  # type: ignore[explicit-any]  # fields of TRL
    """Configuration of [`BlackBoxSFTTrainer`], which has the options of [`~trl.SFTConfig`] and [`DraftConfig`]."""
