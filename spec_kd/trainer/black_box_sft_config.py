"""Options of training on what the target wrote, without its distribution."""

from dataclasses import dataclass

from spec_kd.trainer.draft_config import DraftConfig


@dataclass
class BlackBoxSFTConfig(DraftConfig):  # type: ignore[explicit-any]  # fields of TRL
    r"""
    Configuration of [`BlackBoxSFTTrainer`]: everything of [`~trl.SFTConfig`] and of [`DraftConfig`].
    """
