"""Checks token ids from outside against the vocabulary before a model reads them."""

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
from datasets import Dataset, IterableDataset

from spec_kd.open_types import JsonObject

ID_COLUMNS = ("input_ids", "prompt_ids", "completion_ids")
ROWS_AT_A_TIME = 1000


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
            if not pa.types.is_list(ids.type) and not pa.types.is_large_list(ids.type):
                continue
            values = ids.flatten().drop_null().to_numpy(zero_copy_only=False)
            if len(values) and (values.min() < 0 or values.max() >= vocab_size):
                for i, row in enumerate(ids.to_pylist()):
                    where = f"Row {number * ROWS_AT_A_TIME + i} of the {name} dataset"
                    _check_row(row, vocab_size, where, column)
    return dataset


def _check_row(ids: list[int] | None, vocab_size: int, where: str, column: str) -> None:
    values = np.asarray(ids or [], dtype=np.int64)
    bad = np.flatnonzero((values < 0) | (values >= vocab_size))
    if len(bad):
        raise ValueError(
            f"{where} has the id {values[bad[0]]} in `{column}`, but the tokenizer has {vocab_size} ids (0 to "
            f"{vocab_size - 1}). Pass the tokenizer that created the ids as `processing_class`, or remove the row."
        )
