"""Columns with one entry per token, kept in step with their ids: joined, cut, packed and batched with them.

In a data set of responses they have one entry per completion token. In training rows they are as long as `input_ids`;
the entry at t speaks of token t, and is empty where the target did not write it.
"""

from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from trl import pack_dataset

from spec_kd.data.training_rows import IGNORED_LABEL

REFERENCE_COLUMN = "reference_forward_kl"
"""KL(p‖q_ref) in nats of a reference draft, for AdaSPEC."""

TOKEN_COLUMNS: dict[str, Any] = {REFERENCE_COLUMN: float("nan")}
"""Names, and what stands at a token that the target did not write."""


def find_token_columns(dataset: Dataset | IterableDataset) -> list[str]:
    """The token columns that a data set has."""
    names = dataset.column_names or list(next(iter(dataset)))
    return [name for name in TOKEN_COLUMNS if name in names]


def check_token_columns(dataset: Dataset | IterableDataset, columns: list[str], name: str) -> None:
    """Raises `ValueError` unless the rows say in ids which tokens the columns speak of."""
    first = next(iter(dataset))
    if columns and not ({"prompt_ids", "completion_ids"} <= first.keys() or {"input_ids", "labels"} <= first.keys()):
        raise ValueError(
            f"The {name} data set has {' and '.join(f'`{c}`' for c in columns)} with an entry per token, but text "
            "instead of ids: tokenised again it need not fall into the same tokens. Keep its `prompt_ids` and "
            "`completion_ids`."
        )


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
    """What `SFTTrainer` does to `input_ids` and `labels`, done to the token columns as well.

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


class TokenColumnCollator:
    """A collator that batches token columns beside what another collator makes of the rest.

    Args:
        collator (`Callable`): TRL's, which right-pads rows or strings them together (padding-free).
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]]):
        self.collator = collator

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        values = {name: [row[name] for row in examples] for name in TOKEN_COLUMNS if name in examples[0]}
        batch = self.collator([{k: v for k, v in row.items() if k not in values} for row in examples])
        for name, rows in values.items():
            batch[name] = self._align(rows, batch["input_ids"].shape)
        return batch

    @staticmethod
    def _align(rows: list[list[float]], shape: torch.Size) -> torch.Tensor:
        """float32 `(B, T)`, NaN behind the rows; one row after the other where the batch is a single one."""
        if shape[0] == 1:
            rows = [[value for row in rows for value in row]]
        aligned = torch.full(shape, float("nan"))
        for target, row in zip(aligned, rows, strict=True):
            target[: len(row)] = torch.tensor(row, dtype=torch.float32)
        return aligned
