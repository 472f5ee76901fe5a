"""Types and configurations of TRL's and transformers' trainers, and how they become those of this package."""

import copy
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, TypeVar

import torch
from peft import PeftModel
from transformers import PreTrainedModel, TrainingArguments
from transformers.utils import ModelOutput

from spec_kd._private import get_config_model_id
from spec_kd.open_types import Arguments, JsonObject
from spec_kd.vocabulary import ProcessingClass, get_tokenizer

if TYPE_CHECKING:
    from spec_kd.trainer.draft_config import DraftConfig

Config = TypeVar("Config", bound="DraftConfig")
BatchSamples = tuple[list[JsonObject], torch.Tensor | int | None]
"""The batches of an optimizer step, and the number of their loss tokens."""
FormattingFunction = Callable[[JsonObject], str]
"""Makes a text of a row."""
InitKwargs = Arguments | str | None
"""Arguments of `from_pretrained` in a configuration, which turns JSON text into a dictionary."""
LossResult = torch.Tensor | tuple[torch.Tensor, ModelOutput]
"""The loss, or the loss and the outputs of the model."""


def as_config(
    args: TrainingArguments | None, config_class: type[Config], model: str | PreTrainedModel | PeftModel
) -> Config:
    """`args` as the trainer's own configuration; the caller's object is not changed.

    Args:
        args (`TrainingArguments`, *optional*):
            Returned if it is a `config_class`; copied if it is an `SFTConfig` or another configuration whose options
            `config_class` has; `None` for the defaults.
        config_class (`type`): The trainer's own configuration class.
        model (`str` or `PreTrainedModel`): The draft, which the default `output_dir` is named after.

    Raises:
        TypeError: If `args` is not a configuration.
        ValueError: If it has options that `config_class` does not have.
    """
    if isinstance(args, config_class):
        return args
    if args is None:
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        return config_class(output_dir=f"{name.split('/')[-1]}-{config_class.__name__.removesuffix('Config')}")
    if not isinstance(args, TrainingArguments):
        raise TypeError(f"`args` must be a `{config_class.__name__}` or another TrainingArguments, got {type(args)}.")
    # not `to_dict()`, which writes dtypes as strings into the caller's own dictionaries and hides tokens
    values = {field.name: copy.deepcopy(getattr(args, field.name)) for field in fields(args) if field.init}
    values = config_class.translate(values, type(args))
    known = {field.name for field in fields(config_class) if field.init}
    unknown = sorted(values.keys() - known)
    if unknown:
        raise ValueError(
            f"`args` is a {type(args).__name__} with options that {config_class.__name__} does not have: {unknown}. "
            f"Use {config_class.__name__}."
        )
    return config_class(**values)


def get_load_options(args: "DraftConfig", init_kwargs: InitKwargs) -> Arguments:
    """Arguments of `from_pretrained` for a model of the run, with the configuration's `trust_remote_code`."""
    return {"trust_remote_code": args.trust_remote_code, **to_dict(init_kwargs)}


def check_tokens(processing_class: ProcessingClass | None, args: "DraftConfig") -> None:
    """Raises `ValueError` without a tokenizer or an EOS token (a missing pad token is replaced by EOS, as in TRL)."""
    if processing_class is None:
        raise ValueError("No tokenizer was found with the model. Pass the target's as `processing_class`.")
    if args.eos_token is None and get_tokenizer(processing_class).eos_token is None:
        raise ValueError(
            "The processing class has no `eos_token`, so the draft could not learn where a response ends (nor have "
            "a default for a missing `pad_token`). Set `tokenizer.eos_token` to the target's."
        )


def to_dict(init_kwargs: InitKwargs) -> Arguments:
    """A copy of arguments that a configuration may have left out."""
    return dict(init_kwargs) if isinstance(init_kwargs, dict) else {}
