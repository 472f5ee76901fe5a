"""Columns with one entry per token: ids, and what is joined, cut, packed and batched together with them.

In a dataset of responses the latter have one entry per completion token. In training rows they are as long as
`input_ids`: entry t describes token t, and is empty for a token that the target did not write.
"""

import functools
import math
from collections.abc import Callable, Iterable

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, IterableDataset

from spec_kd.data.signal_checks import LOG_P_TOLERANCE, check_logprobs, read_signal
from spec_kd.data.teacher_signal import SPARSE_FEATURE, TeacherInfo, pad_tokens, split_tokens, to_tensors
from spec_kd.open_types import JsonObject, JsonValue, Record

REFERENCE_COLUMN = "reference_forward_kl"
"""KL(p‖q_ref) of a reference draft in nats, for AdaSPEC."""
LOGPROB_COLUMN = "teacher_token_logprobs"
"""log p of the written token."""
SPARSE_COLUMN = "teacher_sparse"
"""What a sparse teacher keeps, unpacked from `teacher_signal`: bytes of `SPARSE_FEATURE` records."""

TOKEN_COLUMNS: JsonObject = {REFERENCE_COLUMN: math.nan, LOGPROB_COLUMN: math.nan, SPARSE_COLUMN: b""}
"""Names, and the entry of a token that the target did not write."""

SPARSE_TENSORS = {"id": "teacher_sparse_ids", "log_p": "teacher_sparse_log_p", "weight": "teacher_sparse_weights"}
"""What `teacher_sparse` becomes in a batch, each `(B, T, K)`; unused places have id 0, weight 0 and log p -inf."""

ID_COLUMNS = ("input_ids", "prompt_ids", "completion_ids")
ROWS_AT_A_TIME = 1000

_read_info = functools.lru_cache(maxsize=16)(TeacherInfo.from_json)


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
    if name == REFERENCE_COLUMN and not all(-LOG_P_TOLERANCE <= value < math.inf for value in row[name]):
        raise ValueError(
            f"{where}: `{name}` has a number that is no KL divergence (NaN, infinite or negative). Create the "
            "column again with `add_reference_scores`."
        )
    return list(row[name])


def check_token_columns(dataset: Dataset | IterableDataset, columns: list[str], name: str) -> None:
    """Raises `ValueError` unless the rows have the ids that the columns belong to."""
    first = next(iter(dataset))
    if columns and not ({"prompt_ids", "completion_ids"} <= first.keys() or {"input_ids", "labels"} <= first.keys()):
        raise ValueError(
            f"The {name} dataset has {' and '.join(f'`{c}`' for c in columns)} with an entry per token, but text "
            "instead of ids, which may be tokenized in another way. Keep its `prompt_ids` and "
            "`completion_ids`."
        )


def check_ids(
    dataset: Dataset | IterableDataset, vocab_size: int, name: str, columns: Iterable[str] = ID_COLUMNS
) -> Dataset | IterableDataset:
    """Raises `ValueError` for a row with an id outside of the vocabulary.

    Args:
        dataset (`Dataset` or `IterableDataset`): Rows with some of the columns, which hold lists of ids. A stream is
            checked while it is read.
        vocab_size (`int`): Number of real ids.
        name (`str`): Name of the dataset in the error.
        columns (`Iterable[str]`, *optional*): Columns to check, as far as they exist.

    Returns:
        The dataset; a stream checks itself.
    """
    names = [column for column in columns if column in (dataset.column_names or next(iter(dataset), {}))]
    if not names:
        return dataset
    if not isinstance(dataset, Dataset):

        def check_row(row: JsonObject, index: int) -> JsonObject:
            for column in names:
                _check_row(row[column], vocab_size, f"Row {index} of the {name} dataset", column)
            return row

        return dataset.map(check_row, with_indices=True, features=dataset.features)
    table = dataset.select_columns(names).with_format("arrow")
    for number, batch in enumerate(table.iter(batch_size=ROWS_AT_A_TIME)):
        for column in names:
            ids = batch[column].combine_chunks()
            is_list = pa.types.is_list(ids.type) or pa.types.is_large_list(ids.type)
            values = ids.flatten().drop_null().to_numpy(zero_copy_only=False) if is_list else np.empty(0)
            if len(values) and (values.min() < 0 or values.max() >= vocab_size):
                for i, row in enumerate(ids.to_pylist(), number * ROWS_AT_A_TIME):
                    _check_row(row, vocab_size, f"Row {i} of the {name} dataset", column)
    return dataset


def find_row_with_id(dataset: Dataset, token_id: int) -> int | None:
    """Number of the first row whose `input_ids` have an id; `None` if no row has it, or there are no `input_ids`."""
    if "input_ids" not in dataset.column_names:
        return None
    table = dataset.select_columns(["input_ids"]).with_format("arrow")
    for number, batch in enumerate(table.iter(batch_size=ROWS_AT_A_TIME)):
        ids = batch["input_ids"].combine_chunks()
        if token_id in ids.flatten().to_numpy(zero_copy_only=False):
            return number * ROWS_AT_A_TIME + next(i for i, row in enumerate(ids.to_pylist()) if token_id in row)
    return None


def _check_row(ids: list[int] | None, vocab_size: int, where: str, column: str) -> None:
    values = np.asarray(ids or [], dtype=np.int64)
    bad = np.flatnonzero((values < 0) | (values >= vocab_size))
    if len(bad):
        raise ValueError(
            f"{where} has the id {values[bad[0]]} in `{column}`, but the tokenizer has {vocab_size} ids (0 to "
            f"{vocab_size - 1}). Pass the tokenizer that created the ids as `processing_class`, or remove the row."
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
    return torch.tensor([[*row, *[math.nan] * (shape[1] - len(row))] for row in rows], dtype=torch.float32)


def _align_sparse(rows: list[list[bytes]], shape: torch.Size) -> dict[str, torch.Tensor]:
    per_token = np.zeros(shape, np.int64)
    for counts, row in zip(per_token, rows, strict=True):
        counts[: len(row)] = np.fromiter(map(len, row), np.int64, len(row)) // SPARSE_FEATURE.itemsize
    records = np.frombuffer(b"".join(entry for row in rows for entry in row), SPARSE_FEATURE)
    padded = pad_tokens(records, per_token.reshape(-1)).reshape(*shape, -1)  # (B, T, K)
    return {SPARSE_TENSORS[name]: tensor for name, tensor in to_tensors(padded).items()}
