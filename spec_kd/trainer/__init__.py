"""The trainers, which take the options of TRL and transformers."""

from spec_kd.trainer.black_box_sft_trainer import BlackBoxSFTTrainer
from spec_kd.trainer.configs import BlackBoxSFTConfig, WhiteBoxDistillConfig
from spec_kd.trainer.online.online_gkd_config import OnlineGKDConfig
from spec_kd.trainer.online.online_gkd_trainer import OnlineGKDTrainer
from spec_kd.trainer.white_box_distill_trainer import WhiteBoxDistillTrainer

__all__ = [
    "BlackBoxSFTConfig",
    "BlackBoxSFTTrainer",
    "OnlineGKDConfig",
    "OnlineGKDTrainer",
    "WhiteBoxDistillConfig",
    "WhiteBoxDistillTrainer",
]
