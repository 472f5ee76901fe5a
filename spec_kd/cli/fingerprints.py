"""Datasets and models as the command line names them: files, folders, names on the Hub."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spec_kd.checks import read_path
from spec_kd.files import compute_sum, read_json_object, write_text
from spec_kd.open_types import Record

if TYPE_CHECKING:
    from datasets import Dataset

BUILDERS = {
    ".parquet": "parquet", ".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "csv",
    ".txt": "text",
}  # fmt: skip
COMPRESSIONS = (".gz", ".zst")
# In a model's folder: what loading it does not read, and what a trainer writes anew each time.
NOT_OF_MODEL = (".md", "training_args.bin")


def load_rows(source: str, split: str = "train", allow_empty: bool = False) -> "Dataset":
    """Rows of a file, of a folder, or of a dataset on the Hub.

    Args:
        source (`str`):
            A file (Arrow stream, Parquet, JSON lines, CSV or text); a folder that `Dataset.save_to_disk` wrote, or with
            a file per split (`train.jsonl`, `test.parquet`, ...); otherwise a name on the Hub.
        split (`str`): Which split; of no meaning for a file.
        allow_empty (`bool`, *optional*, defaults to `False`): Whether a set without rows is right.

    Raises:
        ValueError: For a file of another kind, one that cannot be read or is not what was written, a split that is not
            there, or no rows.
        OSError: For what does not exist.
    """
    from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

    from spec_kd.prompts.curated_files import load_file
    from spec_kd.stored_sets import check_stored_file

    path = Path(read_path("source", source))
    for file in list_files(path) if path.exists() else ():
        check_stored_file(file)
    suffix = next((s for s in reversed(path.suffixes) if s not in COMPRESSIONS), "")
    if path.is_file() and suffix not in (*BUILDERS, ".arrow"):
        raise ValueError(f"`{source}` is none of the kinds of file that are read here: {', '.join(BUILDERS)}.")
    check_exists(source)
    if path.is_file() and not path.stat().st_size:
        raise ValueError(f"`{source}` is empty.")
    is_saved = path.is_dir() and any((path / name).exists() for name in ("state.json", "dataset_dict.json"))
    with naming_source(source):
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
def naming_source(source: str) -> Iterator[None]:
    """Names a dataset in what goes wrong while it is read.

    Raises:
        ValueError: For any error of `datasets`, Arrow or pandas, with its cause.
        OSError: For what does not exist or cannot be reached.
    """
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (DatasetsError, ValueError) as error:  # those of Arrow and of pandas are ValueErrors
        if f"`{source}`" in str(error):
            raise
        cause = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        text = " ".join(str(cause).split())
        raise ValueError(f"`{source}` cannot be read: {text or type(cause).__name__}. Repair or replace it.") from error


def check_exists(source: str) -> None:
    """Raises `FileNotFoundError` for a path to nothing. A name that might be one on the Hub is taken at its word."""
    if not os.path.exists(source) and looks_like_path(source):
        raise FileNotFoundError(f"`{source}` does not exist.")


def looks_like_path(source: str) -> bool:
    """Whether it cannot be a name on the Hub, which has one slash at most and none at its ends."""
    return source.startswith((".", "/", "~")) or source.count("/") > 1 or Path(source).suffix in (*BUILDERS, ".arrow")


def list_files(path: Path) -> list[Path]:
    """A file itself, or all visible ones below a folder, sorted."""
    if path.is_file():
        return [path]
    files = (file for file in path.rglob("*") if file.is_file())
    return sorted(f for f in files if not any(part.startswith(".") for part in f.relative_to(path).parts))


class Fingerprints:
    """What data and models are, as short hashes: of the content of files, and of names on the Hub.

    A file counts by its content (SHA-256), so that it may be moved, copied or touched. The hash of a file is computed
    once and remembered, by its path, size and time of modification. A name on the Hub counts as such, with the revision
    that the options name: what is behind it is not looked at, so pin a revision where it may change.

    Args:
        memory (`Path`, *optional*): Where to remember hashes between runs.
    """

    def __init__(self, memory: Path | None = None):
        self._memory = memory
        self._known: dict[str, list[Any]] = {}
        if memory is not None and memory.exists():
            with contextlib.suppress(ValueError):  # damaged: what it remembers can be computed again
                self._known = read_json_object(memory, "")

    def of_data(self, source: str) -> str:
        """Of a file, of all files of a folder with their names in it, or of a name on the Hub."""
        path = Path(source)
        if path.is_file():
            return self._of_file(path)
        return self._of_folder(path, list_files(path)) if path.is_dir() else source

    def of_files(self, paths: Iterable[Path]) -> dict[str, str]:
        """Of files with their paths, which count too."""
        return {str(path): self._of_file(path) for path in paths}

    def of_model(self, source: str | None) -> str | None:
        """Of the files directly in a model's folder (weights, config, tokenizer), or of a name on the Hub."""
        if source is None or not Path(source).is_dir():
            return source
        files = [f for f in sorted(Path(source).iterdir()) if f.is_file() and not f.name.startswith(".")]
        return self._of_folder(Path(source), [f for f in files if not f.name.endswith(NOT_OF_MODEL)])

    def _of_folder(self, folder: Path, files: Iterable[Path]) -> str:
        return hash_json({str(file.relative_to(folder)): self._of_file(file) for file in files})

    def _of_file(self, path: Path) -> str:
        state, name = path.stat(), str(path.resolve())
        known = self._known.get(name)
        is_known = isinstance(known, list) and len(known) == 3 and isinstance(known[2], str)
        if is_known and known[:2] == [state.st_size, state.st_mtime_ns]:
            return known[2]
        digest = compute_sum(path)
        self._known[name] = [state.st_size, state.st_mtime_ns, digest]
        if self._memory is not None:
            write_text(self._memory, json.dumps(self._known, indent=1))
        return digest


def hash_json(value: Record) -> str:
    """A hash of JSON values, and of the text of anything else."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
