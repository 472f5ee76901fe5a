"""Rows of target text as the trainers take them, checked before anything expensive starts."""

from typing import Any

from datasets import Dataset, IterableDataset

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
    dataset: Dataset | IterableDataset, token_columns: dict[str, Any] | None = None
) -> Dataset | IterableDataset:
    """Turns `prompt_ids` + `completion_ids` into `input_ids` + `labels`, the loss on the completion alone.

    Where a row has both text and ids, the ids count: they are what the target saw and wrote, and text tokenised again
    need not give them back. A data set without them, or already prepared, is returned as it is.

    Args:
        dataset (`Dataset` or `IterableDataset`): Any of `ACCEPTED_COLUMNS`.
        token_columns (`dict`, *optional*):
            Columns with an entry per completion token to keep, and what to put before them at the prompt's tokens.

    Raises:
        ValueError: While mapping: a token column whose length is not the completion's.
    """
    columns = dataset.column_names or list(next(iter(dataset)))
    if "input_ids" in columns or not {"prompt_ids", "completion_ids"} <= set(columns):
        return dataset

    def join(row: dict[str, Any], index: int) -> dict[str, list[Any]]:
        prompt, completion = list(row["prompt_ids"]), list(row["completion_ids"])
        joined = {"input_ids": prompt + completion, "labels": [IGNORED_LABEL] * len(prompt) + completion}
        for name, empty in (token_columns or {}).items():
            if len(row[name]) != len(completion):
                raise ValueError(
                    f"Row {index} has {len(completion)} completion tokens but {len(row[name])} entries in `{name}`, "
                    "which must have one per token. Make the column from these completions."
                )
            joined[name] = [empty] * len(prompt) + list(row[name])
        return joined

    if isinstance(dataset, Dataset):
        return dataset.map(join, with_indices=True, remove_columns=columns, desc="Joining prompt and completion ids")
    return dataset.map(join, with_indices=True, remove_columns=columns)


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
