"""The examples of one optimizer step with what was generated for them."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from typing_extensions import override

from spec_kd.open_types import Argument


@dataclass
class Window:
    """The batches of an optimizer step on this process, as they came and with generated completions."""

    source: list[dict[str, torch.Tensor]]
    batches: list[dict[str, torch.Tensor]]
    texts: list[list[list[int]]]
    uses: int = 1


class WindowCallback(TrainerCallback):
    """Calls the trainer where it has no method of its own to override."""

    def __init__(self, trainer: Any):
        self._trainer = trainer

    @override
    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Argument) -> None:
        if args.log_completions and state.is_world_process_zero and "loss" in kwargs["logs"]:
            self._trainer._write_texts()
