"""Checks of a trainer's datasets, before anything expensive starts."""

from typing import TypeAlias

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

from spec_kd.data.training_rows import check_training_columns
from spec_kd.stored_sets import check_stored_set
from spec_kd.trainer.arguments import FormattingFunction, to_dict
from spec_kd.trainer.draft_config import DraftConfig

AnyDataset: TypeAlias = Dataset | IterableDataset
EvalDataset: TypeAlias = AnyDataset | DatasetDict | IterableDatasetDict | dict[str, AnyDataset]
IMAGE_COLUMNS = {"image", "images"}
ID_COLUMNS = {"input_ids", "prompt_ids"}


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
    if formatting_func is not None and columns and not ID_COLUMNS & columns and not args.assume_target_completions:
        raise ValueError(
            f"`formatting_func` makes one text of each row of the {name} dataset, without saying which part the target "
            "wrote. If it wrote all of it, set `assume_target_completions=True`; otherwise give `prompt` and "
            "`completion`."
        )
    check_training_columns(dataset, name, assume_target_completions=args.assume_target_completions)
    has_spans = {"prompt", "completion"} <= columns or args.assistant_only_loss or args.assume_target_completions
    if IMAGE_COLUMNS & columns and not has_spans:
        raise ValueError(
            f"The {name} dataset has `messages` with images, of which every token would be trained on. Set "
            "`assistant_only_loss=True`, or `assume_target_completions=True` if the target wrote all of them."
        )
    if to_dict(args.dataset_kwargs).get("skip_prepare_dataset") and ID_COLUMNS & columns == {"prompt_ids"}:
        raise ValueError(
            f"`skip_prepare_dataset=True` leaves the `prompt_ids` and `completion_ids` of the {name} dataset as they "
            "are, and no collator can batch them. Drop it from `dataset_kwargs`."
        )


def find_columns(dataset: AnyDataset) -> set[str]:
    """Names of the columns; of a stream that does not know them, those of its first row."""
    return set(dataset.column_names or next(iter(dataset), {}))


def apply_formatting(dataset: AnyDataset, formatting_func: FormattingFunction, text_column: str) -> AnyDataset:
    """Replaces the columns of each row by the text that a function makes of it."""
    columns = list(find_columns(dataset))
    return dataset.map(lambda row: {text_column: formatting_func(row)}, remove_columns=columns)


def find_dataset_name(dataset: AnyDataset | None) -> str | None:
    """The name that a dataset was loaded by; `None` for others, such as those made of files or lists."""
    info = getattr(dataset, "info", None)
    name = getattr(info, "dataset_name", None)
    return name if name != getattr(info, "builder_name", None) else None
