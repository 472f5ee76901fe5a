"""Columns with one entry per token: they are joined, cut, packed and batched together with the ids.

In a dataset of responses they have one entry per completion token. In training rows they are as long as `input_ids`:
entry t describes token t, and is empty for a token that the target did not write.
"""

import functools
from collections.abc import Callable

import numpy as np
import torch
from datasets import Dataset, IterableDataset

from spec_kd.data.signal_checks import check_logprobs, is_reference_score, read_signal
from spec_kd.data.teacher_signal import (
    SPARSE_FEATURE,
    TeacherInfo,
    pad_tokens,
    split_tokens,
    to_tensors,
)
from spec_kd.open_types import JsonObject, JsonValue, Record

REFERENCE_COLUMN = "reference_forward_kl"
"""KL(p‖q_ref) of a reference draft in nats, for AdaSPEC."""
LOGPROB_COLUMN = "teacher_token_logprobs"
"""log p of the written token."""
SPARSE_COLUMN = "teacher_sparse"
"""What a sparse teacher keeps, unpacked from `teacher_signal`: bytes of `SPARSE_FEATURE` records."""

TOKEN_COLUMNS: JsonObject = {REFERENCE_COLUMN: float("nan"), LOGPROB_COLUMN: float("nan"), SPARSE_COLUMN: b""}
"""Names, and the entry of a token that the target did not write."""

SPARSE_TENSORS = {"id": "teacher_sparse_ids", "log_p": "teacher_sparse_log_p", "weight": "teacher_sparse_weights"}
"""What `teacher_sparse` becomes in a batch, each `(B, T, K)`; unused places have id 0, weight 0 and log p -inf."""


def find_token_columns(dataset: Dataset | IterableDataset) -> list[str]:
    """Names of the token columns of a dataset, packed ones included."""
    names = list(dataset.column_names or next(iter(dataset)))
    if "teacher_signal" in names:
        names.append(SPARSE_COLUMN)
    return [name for name in TOKEN_COLUMNS if name in names]


def read_token_column(row: Record, name: str, where: str) -> list[JsonValue]:
    """A row's entries of a token column, one per completion token.

    Raises:
        ValueError: If there is not exactly one entry per token of the completion, an entry is not what the column
            holds, or it belongs to other ids; `where` names the row.
    """
    length = len(row["completion_ids"])
    if name == SPARSE_COLUMN:
        return split_tokens(*read_signal(row, _read_info(row["teacher_info"]), where))
    if name == LOGPROB_COLUMN:
        check_logprobs(row, where)
    elif len(row[name]) != length:
        raise ValueError(
            f"{where} has {length} completion tokens but {len(row[name])} entries in `{name}`, which must have one per "
            "token. Create the column from these completions."
        )
    if name == REFERENCE_COLUMN and not all(map(is_reference_score, row[name])):
        raise ValueError(
            f"{where}: `{name}` has a number that is no KL divergence (NaN, infinite or negative). Create the "
            "column again with `add_reference_scores`."
        )
    return list(row[name])


@functools.lru_cache(maxsize=16)
def _read_info(text: str) -> TeacherInfo:
    return TeacherInfo.from_json(text)


def check_token_columns(dataset: Dataset | IterableDataset, columns: list[str], name: str) -> None:
    """Raises `ValueError` unless the rows have the ids that the columns belong to."""
    first = next(iter(dataset))
    if columns and not ({"prompt_ids", "completion_ids"} <= first.keys() or {"input_ids", "labels"} <= first.keys()):
        raise ValueError(
            f"The {name} dataset has {' and '.join(f'`{c}`' for c in columns)} with an entry per token, but text "
            "instead of ids, which may be tokenized in another way. Keep its `prompt_ids` and "
            "`completion_ids`."
        )


class TokenColumnCollator:
    """Batches token columns, and leaves all other columns to another collator.

    Args:
        collator (`Callable`): TRL's collator, which pads rows on the right or joins them (padding-free).
    """

    def __init__(self, collator: Callable[[list[JsonObject]], JsonObject]):
        self.collator = collator

    def __call__(self, examples: list[JsonObject]) -> JsonObject:
        """The batch of the collator, with the columns of the examples' tokens `(B, T)` padded as the ids are."""
        values = {name: [row[name] for row in examples] for name in TOKEN_COLUMNS if name in examples[0]}
        batch = self.collator([{k: v for k, v in row.items() if k not in values} for row in examples])
        shape = batch["input_ids"].shape
        for name, rows in values.items():
            if shape[0] == 1:  # padding-free: one row after the other
                rows = [[entry for row in rows for entry in row]]
            batch |= _align_sparse(rows, shape) if name == SPARSE_COLUMN else {name: _align(rows, shape)}
        return batch


def _align(rows: list[list[float]], shape: torch.Size) -> torch.Tensor:
    """float32 `(B, T)`, NaN after the end of a row."""
    aligned = torch.full(shape, float("nan"))
    for target, row in zip(aligned, rows, strict=True):
        target[: len(row)] = torch.tensor(row, dtype=torch.float32)
    return aligned


def _align_sparse(rows: list[list[bytes]], shape: torch.Size) -> dict[str, torch.Tensor]:
    per_token = np.zeros(shape, np.int64)
    for counts, row in zip(per_token, rows, strict=True):
        counts[: len(row)] = np.fromiter(map(len, row), np.int64, len(row)) // SPARSE_FEATURE.itemsize
    records = np.frombuffer(b"".join(entry for row in rows for entry in row), SPARSE_FEATURE)
    padded = pad_tokens(records, per_token.reshape(-1)).reshape(*shape, -1)  # (B, T, K)
    return {SPARSE_TENSORS[name]: tensor for name, tensor in to_tensors(padded).items()}
