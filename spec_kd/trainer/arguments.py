"""What the trainers are given, as TRL's are: its types, how a configuration becomes ours, and checks of datasets."""

import copy
import os
import tempfile
from collections.abc import Callable
from dataclasses import fields
from typing import TypeAlias, TypeVar

import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from peft import PeftModel
from transformers import PreTrainedModel, TrainingArguments
from transformers.utils import ModelOutput

from spec_kd._private import get_config_model_id
from spec_kd.data.training_rows import check_training_columns
from spec_kd.open_types import Arguments, JsonObject
from spec_kd.options import refuse
from spec_kd.stored_sets import check_stored_set
from spec_kd.trainer.configs import DraftConfig, InitKwargs, to_dict
from spec_kd.vocabulary import ProcessingClass, get_tokenizer

Config = TypeVar("Config", bound=DraftConfig)
AnyDataset: TypeAlias = Dataset | IterableDataset
EvalDataset: TypeAlias = AnyDataset | DatasetDict | IterableDatasetDict | dict[str, AnyDataset]
IMAGE_COLUMNS = {"image", "images"}
ID_COLUMNS = {"input_ids", "prompt_ids"}
BatchSamples = tuple[list[JsonObject], torch.Tensor | int | None]
"""The batches of an optimizer step, and the number of their loss tokens."""
FormattingFunction = Callable[[JsonObject], str]
"""Makes a text of a row."""
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
    if unknown := sorted(values.keys() - {field.name for field in fields(config_class) if field.init}):
        raise ValueError(
            f"`args` is a {type(args).__name__} with options that {config_class.__name__} does not have: {unknown}. "
            f"Use {config_class.__name__}."
        )
    return config_class(**values)


def get_load_options(args: DraftConfig, init_kwargs: InitKwargs) -> Arguments:
    """Arguments of `from_pretrained` for a model of the run, with the configuration's `trust_remote_code`."""
    return {"trust_remote_code": args.trust_remote_code, **to_dict(init_kwargs)}


def check_output_dir(output_dir: str | None) -> None:
    """Raises `ValueError` unless files can be written to `output_dir`; creates it."""
    try:
        os.makedirs(str(output_dir), exist_ok=True)
        tempfile.TemporaryFile(dir=output_dir).close()
    except OSError as error:
        raise ValueError(
            f"`output_dir={output_dir!r}` cannot be written to ({error}). Pass a folder that can."
        ) from error


def check_tokens(processing_class: ProcessingClass | None, args: DraftConfig) -> None:
    """Raises `ValueError` without a tokenizer or an EOS token (a missing pad token is replaced by EOS, as in TRL)."""
    eos_token = args.eos_token or (processing_class and get_tokenizer(processing_class).eos_token)
    refuse(
        (
            processing_class is None,
            "No tokenizer was found with the model. Pass the target's as `processing_class`.",
        ),
        (
            eos_token is None,
            "The processing class has no `eos_token`, so the draft could not learn where a response ends (nor have "
            "a default for a missing `pad_token`). Set `tokenizer.eos_token` to the target's.",
        ),
    )


def check_datasets(
    args: DraftConfig,
    train_dataset: AnyDataset | None,
    eval_dataset: EvalDataset | None,
    formatting_func: FormattingFunction | None = None,
) -> AnyDataset:
    """Returns the training set if it and the evaluation sets say what the target wrote.

    Raises:
        ValueError: For a missing, empty or damaged dataset, or one without what the target wrote.
        TypeError: For a training set that is not a dataset, or several of them.
    """
    if train_dataset is None:
        raise ValueError("`train_dataset` is required: the target's responses to learn from.")
    if isinstance(train_dataset, dict):
        raise TypeError(
            f"`train_dataset` is a {type(train_dataset).__name__} with the splits {list(train_dataset)}. Pass one of "
            'them, such as `dataset["train"]`.'
        )
    if not isinstance(train_dataset, Dataset | IterableDataset):
        raise TypeError(f"`train_dataset` must be a `Dataset` or an `IterableDataset`, got {type(train_dataset)}.")
    eval_datasets = eval_dataset if isinstance(eval_dataset, dict) else {"evaluation": eval_dataset}
    for name, dataset in {"training": train_dataset, **eval_datasets}.items():
        if dataset is not None:
            check_dataset(args, dataset, name, formatting_func)
            check_stored_set(dataset)
    return train_dataset


def check_dataset(
    args: DraftConfig, dataset: AnyDataset, name: str, formatting_func: FormattingFunction | None = None
) -> None:
    """Raises `ValueError` unless a dataset says what the target wrote, in a form that will be prepared."""
    columns = find_columns(dataset)
    makes_text = formatting_func is not None and columns
    if makes_text and not ID_COLUMNS & columns and not args.accepts_any_text:
        raise ValueError(
            f"`formatting_func` makes one text of each row of the {name} dataset, without saying which part the target "
            "wrote. If it wrote all of it, set `assume_target_completions=True`; otherwise give `prompt` and "
            "`completion`."
        )
    check_training_columns(dataset, name, assume_target_completions=args.accepts_any_text)
    has_spans = {"prompt", "completion"} <= columns or args.assistant_only_loss or args.accepts_any_text
    refuse(
        (
            IMAGE_COLUMNS & columns and not has_spans,
            f"The {name} dataset has `messages` with images, of which every token would be trained on. Set "
            "`assistant_only_loss=True`, or `assume_target_completions=True` if the target wrote all of them.",
        ),
        (
            to_dict(args.dataset_kwargs).get("skip_prepare_dataset") and ID_COLUMNS & columns == {"prompt_ids"},
            f"`skip_prepare_dataset=True` leaves the `prompt_ids` and `completion_ids` of the {name} dataset as they "
            "are, and no collator can batch them. Drop it from `dataset_kwargs`.",
        ),
    )


def find_columns(dataset: AnyDataset) -> set[str]:
    """Names of the columns; of a stream that does not know them, those of its first row."""
    return set(dataset.column_names or next(iter(dataset), {}))


def find_dataset_name(dataset: AnyDataset) -> str | None:
    """The name that a dataset was loaded by; `None` for others, such as those made of files or lists."""
    name = dataset.info.dataset_name
    return name if name != dataset.info.builder_name else None
