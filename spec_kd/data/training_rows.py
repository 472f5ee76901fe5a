"""Rows of target text as the trainers take them, checked before anything expensive starts."""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset, IterableDataset
from trl import pack_dataset

from spec_kd.data.token_columns import TOKEN_COLUMNS, read_token_column

IGNORED_LABEL = -100

ACCEPTED_COLUMNS = (
    ("prompt_ids", "completion_ids"),
    ("input_ids", "labels"),
    ("input_ids", "completion_mask"),
    ("prompt", "completion"),
)


def check_training_columns(dataset: Dataset | IterableDataset, name: str, assistant_only_loss: bool = False) -> None:
    """Raises unless every row says which tokens the target wrote.

    Args:
        dataset (`Dataset` or `IterableDataset`): Training or evaluation data.
        name (`str`): What to call it in the error.
        assistant_only_loss (`bool`, *optional*, defaults to `False`): Whether a `messages` column is enough.

    Raises:
        ValueError: If the data set is empty, or none of `ACCEPTED_COLUMNS` is complete.
    """
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"The {name} data set is empty: there is no row to learn from. Check the path and the split.")
    if any(set(columns) <= first.keys() for columns in ACCEPTED_COLUMNS):
        return
    if assistant_only_loss and "messages" in first:
        return
    accepted = ", ".join(" + ".join(f"`{column}`" for column in columns) for columns in ACCEPTED_COLUMNS)
    raise ValueError(
        f"The {name} data set has the columns {sorted(first)}, which do not say what the target wrote. Needed is one "
        f"of: {accepted}; or `messages` with `assistant_only_loss=True`. A set of prompts becomes one with "
        "`spec_kd.generate_responses(target, prompts)`."
    )


def to_training_rows(
    dataset: Dataset | IterableDataset, token_columns: Sequence[str] = ()
) -> Dataset | IterableDataset:
    """Turns `prompt_ids` + `completion_ids` into `input_ids` + `labels`, the loss on the completion alone.

    Where a row has both text and ids, the ids count: they are what the target saw and wrote, and text tokenised again
    need not give them back. A data set without them, or already prepared, is returned as it is.

    Args:
        dataset (`Dataset` or `IterableDataset`): Any of `ACCEPTED_COLUMNS`.
        token_columns (`Sequence[str]`, *optional*): Names of `TOKEN_COLUMNS` to keep; those of the prompt are empty.

    Raises:
        ValueError: While mapping: a token column that does not have one entry per completion token.
    """
    columns = dataset.column_names or list(next(iter(dataset)))
    if "input_ids" in columns or not {"prompt_ids", "completion_ids"} <= set(columns):
        return dataset

    def join(row: dict[str, Any], index: int) -> dict[str, list[Any]]:
        prompt, completion = list(row["prompt_ids"]), list(row["completion_ids"])
        joined = {"input_ids": prompt + completion, "labels": [IGNORED_LABEL] * len(prompt) + completion}
        for name in token_columns:
            entries = read_token_column(row, name, f"Row {index}")
            joined[name] = [TOKEN_COLUMNS[name]] * len(prompt) + entries
        return joined

    if isinstance(dataset, Dataset):
        return dataset.map(join, with_indices=True, remove_columns=columns, desc="Joining prompt and completion ids")
    return dataset.map(join, with_indices=True, remove_columns=columns)


def cut_and_pack(
    dataset: Dataset | IterableDataset,
    columns: list[str],
    *,
    max_length: int | None,
    truncation_mode: str,
    packing_strategy: str | None,
    shuffle_seed: int | None,
    name: str,
) -> Dataset | IterableDataset:
    """What `SFTTrainer` does to `input_ids` and `labels`, done to token columns as well, which it would drop.

    Args:
        dataset (`Dataset` or `IterableDataset`): With `input_ids`, `labels` and `columns`, equally long in each row.
        columns (`list[str]`): Token columns to keep; other columns are dropped.
        max_length (`int`, *optional*): Tokens of a row at most. Rows left without a label are dropped, as TRL does.
        truncation_mode (`str`): `"keep_start"` or `"keep_end"`.
        packing_strategy (`str`, *optional*): As in `trl.pack_dataset`; `None` packs nothing.
        shuffle_seed (`int`, *optional*): Rows are shuffled before they are packed, as TRL does.
        name (`str`): For the progress bars.

    Raises:
        ValueError: If rows are to be packed without a `max_length`.
    """
    dataset = dataset.select_columns(["input_ids", "labels", *columns])
    describe = (lambda what: {"desc": f"{what} {name} dataset"}) if isinstance(dataset, Dataset) else lambda what: {}
    if packing_strategy is not None:
        if max_length is None:
            raise ValueError("`packing=True` fills rows up to `max_length`, which is None. Set it.")
        if shuffle_seed is not None:
            dataset = dataset.shuffle(seed=shuffle_seed)
        return pack_dataset(dataset, max_length, packing_strategy, describe("Packing"))
    if max_length is not None:
        kept = slice(None, max_length) if truncation_mode == "keep_start" else slice(-max_length, None)
        dataset = dataset.map(lambda row: {key: row[key][kept] for key in row}, **describe("Truncating"))
        dataset = dataset.filter(
            lambda row: any(label != IGNORED_LABEL for label in row["labels"]), **describe("Dropping empty rows of")
        )
    return dataset if shuffle_seed is None else dataset.shuffle(seed=shuffle_seed)


def count_cut_rows(dataset: Dataset, max_length: int) -> tuple[int, int]:
    """How many rows `max_length` cuts, and how many have no completion token left within it.

    Args:
        dataset (`Dataset`): With `input_ids` and `labels`.
        max_length (`int`): In tokens, prompt and completion together.
    """
    cut = lost = 0
    for batch in dataset.select_columns(["labels"]).iter(batch_size=1000):
        for labels in batch["labels"]:
            cut += len(labels) > max_length
            lost += all(label == IGNORED_LABEL for label in labels[:max_length])
    return cut, lost
