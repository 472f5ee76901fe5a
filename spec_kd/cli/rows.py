"""Rows of the datasets that commands read: of files, folders, and names on the Hub."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from spec_kd.checks import read_path

if TYPE_CHECKING:
    from datasets import Dataset

BUILDERS = {
    ".parquet": "parquet", ".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "csv",
    ".txt": "text",
}  # fmt: skip
COMPRESSIONS = (".gz", ".zst")


def load_rows(source: str, split: str = "train", *, option: str = "dataset", allow_empty: bool = False) -> "Dataset":
    """Loads the rows of a file, of a folder, or of a dataset on the Hub.

    Args:
        source (`str`):
            A file (Arrow stream, Parquet, JSON lines, CSV or text); a folder that `Dataset.save_to_disk` wrote, or with
            a file per split (`train.jsonl`, `test.parquet`, ...); otherwise a name on the Hub.
        split (`str`, *optional*, defaults to `"train"`): Split of a folder or a dataset on the Hub.
        option (`str`, *optional*, defaults to `"dataset"`): Name of the option that names the dataset, for messages.
        allow_empty (`bool`, *optional*, defaults to `False`): Whether a dataset without rows is accepted.

    Raises:
        ValueError: The file is of another kind, cannot be read or has changed since it was written, the split is
            missing, or there are no rows.
        OSError: The source does not exist or cannot be reached.
    """
    from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

    from spec_kd.prompts.curated_files import load_file
    from spec_kd.stored_sets import check_stored_file

    check_exists(option, source)
    path = Path(read_path(option, source))
    is_saved = path.is_dir() and any((path / name).exists() for name in ("state.json", "dataset_dict.json"))
    with naming_source(option, source):
        for file in list_files(path) if path.exists() else ():
            check_stored_file(file)
        suffix = next((s for s in reversed(path.suffixes) if s not in COMPRESSIONS), "")
        if path.is_file() and suffix not in (*BUILDERS, ".arrow"):
            raise ValueError(f"`{source}` is none of the kinds of file that are read here: {', '.join(BUILDERS)}.")
        if path.is_file() and not path.stat().st_size:
            raise ValueError(f"`{source}` is empty.")
        if path.is_file() and suffix == ".arrow":
            data = Dataset.from_file(str(path))
        elif path.is_file() and path.suffix == suffix:
            data = load_file(str(path), "train")
        elif path.is_file():
            data = load_dataset(BUILDERS[suffix], data_files=str(path), split="train")
        else:
            data = load_from_disk(str(path)) if is_saved else load_dataset(source)
        if isinstance(data, DatasetDict):
            if split not in data:
                raise ValueError(f"`{source}` has the splits {', '.join(data)}, but not {split!r}. Set `split`.")
            data = data[split]
        if not len(data) and not allow_empty:
            raise ValueError(f"`{source}` has no rows.")
    return data


@contextlib.contextmanager
def naming_source(option: str, source: str) -> Iterator[None]:
    """Names the option and the dataset in errors of what reads it.

    Args:
        option (`str`): Name of the option, such as `"prompts"`.
        source (`str`): File, folder or name on the Hub.

    Raises:
        ValueError: Any error of `datasets`, Arrow or pandas, with its cause.
        OSError: The source does not exist or cannot be reached.
    """
    from datasets.exceptions import DatasetsError

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


def check_exists(option: str, source: str | None) -> None:
    """Raises `FileNotFoundError` for a path to nothing; a name that may be one on the Hub, and `None`, are accepted."""
    if source is not None and looks_like_path(source) and not os.path.exists(source):
        raise FileNotFoundError(f"{option}: `{source}` does not exist.")


def looks_like_path(source: str) -> bool:
    """Whether it cannot be a name on the Hub, which has at most one slash and none at its ends."""
    return source.startswith((".", "/", "~")) or source.count("/") > 1 or Path(source).suffix in (*BUILDERS, ".arrow")


def list_files(path: Path) -> list[Path]:
    """A file itself, or all visible ones below a folder, sorted."""
    if path.is_file():
        return [path]
    files = (file for file in path.rglob("*") if file.is_file())
    return sorted(f for f in files if not any(part.startswith(".") for part in f.relative_to(path).parts))


def take_first(rows: "Dataset", count: int | None) -> "Dataset":
    """The first `count` rows of a dataset; all of them for `None`."""
    return rows if count is None else rows.select(range(min(count, len(rows))))
