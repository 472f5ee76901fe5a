"""Reads local files with a curated dataset: cells stay text, and byte order marks are removed."""

import tempfile
from pathlib import Path

import pandas
from datasets import Dataset, Features, Value, load_dataset
from datasets.exceptions import DatasetGenerationError

from spec_kd.files import BUILDERS
from spec_kd.open_types import Argument
from spec_kd.prompts.logs.text_decoding import BOM, MARKS


def load_file(path: str, split: str) -> Dataset:
    """A dataset of one file.

    Cells of CSV and TSV files are text, and only an empty cell is `None`: no cell becomes a number or a date, and `NA`
    and `null` are text too.

    Args:
        path (`str`): File with an ending of [`BUILDERS`].
        split (`str`): Name of the split.

    Raises:
        ValueError: The file has another ending or cannot be read; names it.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in BUILDERS:
        raise ValueError(f"`{path}` must be one of {', '.join(BUILDERS)}, or load it and pass the `Dataset`.")
    with open(path, "rb") as file:
        start = file.read(4)
    if not start:
        raise ValueError(f"`{path}` is empty.")
    # Windows programs write byte order marks; a file without one is UTF-8, or binary.
    encoding = next((name for mark, name in ((BOM, "utf-8-sig"), *MARKS) if start.startswith(mark)), None)
    try:
        if encoding is None:
            return _load(path, suffix, split)
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder, f"data{suffix}")
            copy.write_text(Path(path).read_text(encoding=encoding), encoding="utf-8")
            return _load(str(copy), suffix, split, keep_in_memory=True, cache_dir=folder)
    except (DatasetGenerationError, ValueError) as error:  # pandas and Arrow raise subclasses of it
        cause = error.__cause__ or error
        advice = " Save it as UTF-8." if isinstance(cause, UnicodeError) else ""
        raise ValueError(f"`{path}` cannot be read as {suffix} ({type(cause).__name__}: {cause}).{advice}") from error


def _load(path: str, suffix: str, split: str, **options: Argument) -> Dataset:
    if BUILDERS[suffix] == "csv":
        separator = "\t" if suffix == ".tsv" else ","
        header = pandas.read_csv(path, sep=separator, nrows=0).columns
        options |= {
            "sep": separator,
            "features": Features({str(name): Value("string") for name in header}),
            "keep_default_na": False,
            "na_values": [""],
        }
    return load_dataset(BUILDERS[suffix], data_files={split: path}, split=split, **options)
