"""Columns with one entry per token, kept in step with their ids: joined, cut, packed and batched with them.

In a dataset of responses they have one entry per completion token. In training rows they are as long as `input_ids`;
the entry at t speaks of token t, and is empty where the target did not write it.
"""

import functools
from collections.abc import Callable

import numpy as np
import torch
from datasets import Dataset, IterableDataset

from spec_kd.data.signal_checks import check_logprobs, check_sparse, is_reference_score
from spec_kd.data.teacher_signal import SPARSE_FEATURE, TeacherInfo, split_tokens, unpack_sparse
from spec_kd.open_types import JsonObject, JsonValue, Record

REFERENCE_COLUMN = "reference_forward_kl"
"""KL(p‖q_ref) in nats of a reference draft, for AdaSPEC."""
LOGPROB_COLUMN = "teacher_token_logprobs"
"""log p of the written token."""
SPARSE_COLUMN = "teacher_sparse"
"""The slots of a sparse teacher, unpacked from `teacher_signal`: bytes of `SPARSE_FEATURE` records."""

TOKEN_COLUMNS: JsonObject = {REFERENCE_COLUMN: float("nan"), LOGPROB_COLUMN: float("nan"), SPARSE_COLUMN: b""}
"""Names, and what stands at a token that the target did not write."""

SPARSE_TENSORS = {"id": "teacher_slot_ids", "log_p": "teacher_slot_log_p", "weight": "teacher_slot_weights"}
"""What `teacher_sparse` becomes in a batch, each `(B, T, K)`; unused slots have id 0, weight 0 and log p -inf."""


def find_token_columns(dataset: Dataset | IterableDataset) -> list[str]:
    """The token columns that a dataset has, packed ones among them."""
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
        info = _read_info(row["teacher_info"])
        try:
            slots, per_token = unpack_sparse(row["teacher_signal"], length, info)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        check_sparse(row, slots, per_token, info, where)
        return split_tokens(slots, per_token)
    if name == LOGPROB_COLUMN:
        check_logprobs(row, where)
    elif len(row[name]) != length:
        raise ValueError(
            f"{where} has {length} completion tokens but {len(row[name])} entries in `{name}`, which must have one per "
            "token. Make the column from these completions."
        )
    if name == REFERENCE_COLUMN and not all(map(is_reference_score, row[name])):
        raise ValueError(
            f"{where}: `{name}` has a number that is no KL divergence (NaN, infinite or negative). Make the column "
            "anew with `add_reference_scores`."
        )
    return list(row[name])


@functools.lru_cache(maxsize=16)
def _read_info(text: str) -> TeacherInfo:
    return TeacherInfo.from_json(text)


def check_token_columns(dataset: Dataset | IterableDataset, columns: list[str], name: str) -> None:
    """Raises `ValueError` unless the rows say in ids which tokens the columns speak of."""
    first = next(iter(dataset))
    if columns and not ({"prompt_ids", "completion_ids"} <= first.keys() or {"input_ids", "labels"} <= first.keys()):
        raise ValueError(
            f"The {name} dataset has {' and '.join(f'`{c}`' for c in columns)} with an entry per token, but text "
            "instead of ids: tokenized again it need not fall into the same tokens. Keep its `prompt_ids` and "
            "`completion_ids`."
        )


class TokenColumnCollator:
    """A collator that batches token columns beside what another collator makes of the rest.

    Args:
        collator (`Callable`): TRL's, which right-pads rows or strings them together (padding-free).
    """

    def __init__(self, collator: Callable[[list[JsonObject]], JsonObject]):
        self.collator = collator

    def __call__(self, examples: list[JsonObject]) -> JsonObject:
        """The batch of the collator, with the columns of the examples' tokens `(B, T)` padded as the ids are."""
        values = {name: [row[name] for row in examples] for name in TOKEN_COLUMNS if name in examples[0]}
        batch = self.collator([{k: v for k, v in row.items() if k not in values} for row in examples])
        shape = batch["input_ids"].shape
        for name, rows in values.items():
            if shape[0] == 1:  # one row after the other, where they were strung together
                rows = [[entry for row in rows for entry in row]]
            batch |= _align_sparse(rows, shape) if name == SPARSE_COLUMN else {name: _align(rows, shape)}
        return batch


def _align(rows: list[list[float]], shape: torch.Size) -> torch.Tensor:
    """float32 `(B, T)`, NaN behind the rows."""
    aligned = torch.full(shape, float("nan"))
    for target, row in zip(aligned, rows, strict=True):
        target[: len(row)] = torch.tensor(row, dtype=torch.float32)
    return aligned


def _align_sparse(rows: list[list[bytes]], shape: torch.Size) -> dict[str, torch.Tensor]:
    counts = [np.fromiter(map(len, row), np.int64, len(row)) // SPARSE_FEATURE.itemsize for row in rows]
    width = max(1, max(int(count.max(initial=0)) for count in counts))
    aligned = np.zeros((*shape, width), SPARSE_FEATURE)  # (B, T, K)
    aligned["log_p"] = -np.inf
    for target, row, count in zip(aligned, rows, counts, strict=True):
        token = np.repeat(np.arange(len(row)), count)
        slot = np.arange(len(token)) - np.repeat(np.cumsum(count) - count, count)
        target[token, slot] = np.frombuffer(b"".join(row), SPARSE_FEATURE)
    return {name: torch.from_numpy(np.ascontiguousarray(aligned[field])) for field, name in SPARSE_TENSORS.items()}
