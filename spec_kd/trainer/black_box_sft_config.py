"""Options of the training on what the target wrote, without its probabilities."""

from dataclasses import dataclass

from spec_kd.trainer.draft_config import DraftConfig


@dataclass
class BlackBoxSFTConfig(DraftConfig):
    r"""
    Configuration of [`BlackBoxSFTTrainer`]: everything of [`~trl.SFTConfig`] and of [`DraftConfig`].
    """
