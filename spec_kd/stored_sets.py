"""Whether a stored set is still what was written: sums are checked wherever it is read.

A disk that loses a bit changes an id or a log-probability, which nothing else would notice.
"""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, IterableDataset

from spec_kd.addresses import name_place
from spec_kd.copies import SUM_SUFFIX, list_sums
from spec_kd.files import compute_sum, read_sum

# Of files whose sums were right, for this process: path, size, time of modification, number on the disk.
_intact: set[tuple[str, int, int, int]] = set()


def find_sum(path: Path) -> Path | None:
    """The file with the SHA-256 of a stored set, or `None` where there is none."""
    return next((place for place in list_sums(path) if place.is_file()), None)


def find_own_sum(path: Path) -> Path:
    """Where the sum of a prompt set is kept: hidden, so that `load_dataset` takes it for no data."""
    return path.with_name(f".{path.name}{SUM_SUFFIX}")


def check_stored_file(path: str | os.PathLike[str]) -> None:
    """Checks a file by its sum, a Parquet file without one by the checksums of its pages, where it has them.

    Raises:
        `ValueError`: It is damaged; names it and what to do.
    """
    path = Path(path)
    try:
        state = path.stat()
    except OSError:
        return  # reading it says what is wrong
    key = (str(path.resolve()), state.st_size, state.st_mtime_ns, state.st_ino)
    if key in _intact or not path.is_file():
        return
    sum_path = find_sum(path)
    if sum_path is not None:
        if read_sum(sum_path) != compute_sum(path):
            raise ValueError(
                f"`{name_place(path)}` is not what was written: its SHA-256 is another one than in "
                f"`{name_place(sum_path)}`. Repeat the call "
                "that wrote it, which puts it right; if you changed the file on purpose, delete the file with the sum."
            )
    elif path.suffix == ".parquet":
        _check_pages(path)
    _intact.add(key)


def check_stored_set(dataset: object) -> None:
    """Checks the files that a dataset was read from, as far as it knows them; anything else passes.

    Args:
        dataset: A `Dataset`, `DatasetDict`, mapping or list of them; other objects have no files.

    Raises:
        `ValueError`: One of the files is damaged; names it and what to do.
    """
    if isinstance(dataset, dict | DatasetDict):
        for part in dataset.values():
            check_stored_set(part)
    elif isinstance(dataset, Dataset | IterableDataset):
        cached = [file["filename"] for file in getattr(dataset, "cache_files", ())]
        for path in (*cached, *filter(os.path.isfile, dataset.info.download_checksums or ())):
            check_stored_file(path)


def _check_pages(path: Path) -> None:
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            if "completion_ids" not in file.schema_arrow.names:
                return  # none of ours
            for number in range(file.num_row_groups):
                file.read_row_group(number)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"`{path}` is damaged ({error}). Copy it again from where it was written.") from error
