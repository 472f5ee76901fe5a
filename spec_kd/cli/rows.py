"""Rows that the commands read and write.

They are read from files, folders and the Hub. A prompt set is `train.arrow` and `test.arrow` in one folder, which are
memory-mapped when they are read.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError

from spec_kd.addresses import exists, is_address
from spec_kd.cli.paths import check_exists, list_files
from spec_kd.copies import fetch, open_folder
from spec_kd.files import BUILDERS, replacing
from spec_kd.open_types import JsonObject
from spec_kd.options import read_path, refuse
from spec_kd.prompts.curated_files import load_file
from spec_kd.prompts.splitting import find_leaks
from spec_kd.stored_sets import check_stored_file, find_own_sum

COMPRESSIONS = (".gz", ".zst")
SPLITS = ("train", "test")
PROMPT_FILES = ("train.arrow", "test.arrow")
ROWS_AT_A_TIME = 1024

logger = logging.getLogger(__name__)


def load_rows(source: str, split: str = "train", *, option: str = "dataset", allow_empty: bool = False) -> Dataset:
    """Loads the rows of a file, of a folder, or of a dataset on the Hub.

    Args:
        source (`str`):
            A file (Arrow stream, Parquet, JSON lines, CSV or text); a folder that `Dataset.save_to_disk` wrote, or with
            a file per split (`train.jsonl`, `test.parquet`, ...); the address of either, which is copied here;
            otherwise a name on the Hub.
        split (`str`, *optional*, defaults to `"train"`): Split of a folder or a dataset on the Hub.
        option (`str`, *optional*, defaults to `"dataset"`): Name of the option that names the dataset, for messages.
        allow_empty (`bool`, *optional*, defaults to `False`): Whether a dataset without rows is accepted.

    Raises:
        ValueError: The file is of another kind, cannot be read or has changed since it was written, the split is
            missing, or there are no rows.
        OSError: The source does not exist or cannot be reached.
    """
    check_exists(option, source)
    path = fetch(read_path(option, source, takes_address=True))
    is_saved = path.is_dir() and any((path / name).exists() for name in ("state.json", "dataset_dict.json"))
    with naming_source(option, source):
        for file in list_files(path) if path.exists() else ():
            check_stored_file(file)
        suffix = next((s for s in reversed(path.suffixes) if s not in COMPRESSIONS), "")
        is_file, is_known = path.is_file(), suffix in (*BUILDERS, ".arrow")
        refuse(
            (is_file and not is_known, f"`{source}` has none of the endings that can be read: {', '.join(BUILDERS)}."),
            (is_file and not path.stat().st_size, f"`{source}` is empty."),
        )
        if is_file and suffix == ".arrow":
            data = Dataset.from_file(str(path))
        elif is_file and path.suffix == suffix:
            data = load_file(str(path), "train")
        elif is_file:
            data = load_dataset(BUILDERS[suffix], data_files=str(path), split="train")
        else:
            data = load_from_disk(str(path)) if is_saved else load_dataset(str(path) if is_address(source) else source)
        if isinstance(data, DatasetDict):
            if split not in data:
                raise ValueError(f"`{source}` has the splits {', '.join(data)}, but not {split!r}. Set `split`.")
            data = data[split]
        if not len(data) and not allow_empty:
            raise ValueError(f"`{source}` has no rows.")
    return data


@contextmanager
def naming_source(option: str, source: str) -> Iterator[None]:
    """Names the option and the dataset in errors of what reads it.

    Args:
        option (`str`): Name of the option, such as `"prompts"`.
        source (`str`): File, folder or name on the Hub.

    Raises:
        ValueError: Any error of `datasets`, Arrow or pandas, with its cause.
        OSError: The source does not exist or cannot be reached.
    """
    try:
        yield
    except (DatasetsError, ValueError) as error:  # those of Arrow and of pandas are ValueErrors
        cause = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        text = " ".join(str(cause).split())
        if f"`{source}`" in str(error):
            raise ValueError(f"{option}: {error}") from error
        raise ValueError(
            f"{option}: `{source}` cannot be read: {text or type(cause).__name__}. Repair or replace it."
        ) from error


def take_first(rows: Dataset, count: int | None) -> Dataset:
    """The first `count` rows of a dataset; all of them for `None`."""
    return rows if count is None else rows.select(range(min(count, len(rows))))


def save_prompts(folder: str, train: Dataset, test: Dataset) -> JsonObject:
    """Writes both splits; returns the folder and their numbers of rows."""
    for name, rows in zip(PROMPT_FILES, (train, test), strict=True):
        path, schema = open_folder(folder) / name, rows.features.arrow_schema
        with replacing(path, find_own_sum(path)) as file, pa.ipc.new_stream(file, schema) as writer:
            for batch in rows.with_format("arrow").iter(ROWS_AT_A_TIME):
                writer.write_table(batch.cast(schema))
    return describe_saved(folder, train, test)


def describe_saved(folder: str, train: Dataset, test: Dataset) -> JsonObject:
    """The folder of a prompt set and its numbers of rows, as a command prints them."""
    return {"path": folder, "num_train": len(train), "num_test": len(test)}


def load_prompts(source: str, split: str) -> Dataset:
    """Loads a split of what `save_prompts` wrote, or of any other source with splits."""
    path = f"{source}/{split}.arrow"
    is_there = exists(path) if is_address(path) else os.path.isfile(path)
    return load_rows(path if is_there else source, split, option="parts", allow_empty=True)


def leave_out_leaks(train: Dataset, test: Dataset, name: str = "train") -> Dataset:
    """Removes training rows whose text or conversation is among the test rows; a warning counts them.

    Args:
        train (`Dataset`), test (`Dataset`): Rows with `prompt`.
        name (`str`, *optional*, defaults to `"train"`): Name of the training rows in messages.

    Raises:
        ValueError: No row remains to train on.
    """
    leaks = find_leaks(train, test)
    if not leaks.any():
        return train
    if leaks.all():
        raise ValueError(f"All {len(train)} training prompts of `{name}` are test prompts too: nothing is left of it.")
    logger.warning("%d of %d prompts of `%s` are test prompts too, and are left out.", leaks.sum(), len(train), name)
    return train.select(np.flatnonzero(~leaks))
