"""Prompt sets as the commands keep them: `train.arrow` and `test.arrow` in one folder, memory-mapped when read."""

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spec_kd.cli.sources import load_rows

if TYPE_CHECKING:
    from datasets import Dataset

SPLITS = ("train", "test")
PRODUCTS = ("train.arrow", "test.arrow")
ROWS_AT_A_TIME = 1024


def save_prompts(folder: str, train: "Dataset", test: "Dataset") -> dict[str, Any]:
    """Writes both splits; returns the folder and their numbers of rows."""
    for name, rows in zip(PRODUCTS, (train, test), strict=True):
        _write(rows, Path(folder, name))
    return describe_saved(folder, train, test)


def describe_saved(folder: str, train: "Dataset", test: "Dataset") -> dict[str, Any]:
    """What a command says of the prompt set in a folder."""
    return {"path": folder, "num_train": len(train), "num_test": len(test)}


def load_prompts(source: str, split: str) -> "Dataset":
    """A split of what `save_prompts` wrote, or of any other source with splits."""
    path = Path(source, f"{split}.arrow")
    return load_rows(str(path) if path.is_file() else source, split)


def hold_out(rows: "Dataset", test_fraction: float, seed: int) -> "tuple[Dataset, Dataset]":
    """Training and test rows, the same text always on the same side, whatever else is in the set.

    Args:
        rows (`Dataset`): With `prompt`.
        test_fraction (`float`): Share of test rows, met on average.
        seed (`int`): Of the choice.

    Raises:
        ValueError: For a fraction below 0, or of 1 and more.
    """
    import numpy as np

    from spec_kd.queries.deduplication import normalize_text
    from spec_kd.queries.splitting import choose_test_rows

    check_test_fraction(test_fraction)
    digests = (hashlib.blake2b(normalize_text(prompt).encode(), digest_size=8).digest() for prompt in rows["prompt"])
    texts = np.fromiter((int.from_bytes(digest) for digest in digests), np.uint64, len(rows))
    is_test = choose_test_rows(texts, np.zeros(len(rows)), test_fraction, "hash", seed)
    return rows.select(np.flatnonzero(~is_test)), rows.select(np.flatnonzero(is_test))


def check_test_fraction(test_fraction: float) -> None:
    """Raises `ValueError` for a share that is none, or leaves nothing to train on."""
    if not 0 <= test_fraction < 1:
        raise ValueError(f"`test_fraction` must be at least 0 and below 1, got {test_fraction}.")


def _write(rows: "Dataset", path: Path) -> None:
    import pyarrow as pa

    part = path.with_name(f".{path.name}.part")
    schema = rows.features.arrow_schema
    with pa.OSFile(str(part), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for batch in rows.with_format("arrow").iter(ROWS_AT_A_TIME):
            writer.write_table(batch.cast(schema))
    os.replace(part, path)
