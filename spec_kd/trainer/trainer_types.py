"""Types of what TRL's and transformers' trainers take and return."""

from collections.abc import Callable

import torch
from transformers.utils import ModelOutput

from spec_kd.open_types import Arguments, JsonObject

BatchSamples = tuple[list[JsonObject], torch.Tensor | int | None]
"""The batches of an optimizer step, and the number of their loss tokens."""
FormattingFunction = Callable[[JsonObject], str]
"""Makes a text of a row."""
InitKwargs = Arguments | str | None
"""Arguments of `from_pretrained` in a configuration, which turns JSON text into a dictionary."""
LossResult = torch.Tensor | tuple[torch.Tensor, ModelOutput]
"""The loss, or the loss and the outputs of the model."""


def to_dict(init_kwargs: InitKwargs) -> Arguments:
    """A copy of arguments that a configuration may have left out."""
    return dict(init_kwargs) if isinstance(init_kwargs, dict) else {}
