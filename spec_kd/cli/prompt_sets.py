"""Prompt sets as the commands store them: `train.arrow` and `test.arrow` in one folder, memory-mapped when read."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from spec_kd.cli.rows import load_rows
from spec_kd.open_types import JsonObject
from spec_kd.options import option
from spec_kd.prompts.splitting import check_test_fraction

if TYPE_CHECKING:
    from datasets import Dataset

SPLITS = ("train", "test")
PRODUCTS = ("train.arrow", "test.arrow")
ROWS_AT_A_TIME = 1024

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PromptSetFiles:
    """The folder of a prompt set, and the share of its test prompts."""

    output_dir: str = option("Folder for train.arrow and test.arrow.")
    test_fraction: float = option("Share of the prompts held out for testing, chosen by their text and `seed`.", 0.05)

    def __post_init__(self) -> None:
        check_test_fraction(self.test_fraction)


def save_prompts(folder: str, train: "Dataset", test: "Dataset") -> JsonObject:
    """Writes both splits; returns the folder and their numbers of rows."""
    for name, rows in zip(PRODUCTS, (train, test), strict=True):
        _write(rows, Path(folder, name))
    return describe_saved(folder, train, test)


def describe_saved(folder: str, train: "Dataset", test: "Dataset") -> JsonObject:
    """The folder of a prompt set and its numbers of rows, as a command prints them."""
    return {"path": folder, "num_train": len(train), "num_test": len(test)}


def load_prompts(source: str, split: str) -> "Dataset":
    """Loads a split of what `save_prompts` wrote, or of any other source with splits."""
    path = Path(source, f"{split}.arrow")
    return load_rows(str(path) if path.is_file() else source, split, option="parts", allow_empty=True)


def leave_out_leaks(train: "Dataset", test: "Dataset", name: str = "train") -> "Dataset":
    """Removes training rows whose text or conversation is among the test rows; a warning counts them.

    Args:
        train (`Dataset`), test (`Dataset`): Rows with `prompt`.
        name (`str`, *optional*, defaults to `"train"`): Name of the training rows in messages.

    Raises:
        ValueError: No row remains to train on.
    """
    import numpy as np

    from spec_kd.prompts.splitting import find_leaks

    leaks = find_leaks(train, test)
    if not leaks.any():
        return train
    if leaks.all():
        raise ValueError(f"All {len(train)} training prompts of `{name}` are test prompts too: nothing is left of it.")
    logger.warning("%d of %d prompts of `%s` are test prompts too, and are left out.", leaks.sum(), len(train), name)
    return train.select(np.flatnonzero(~leaks))


def _write(rows: "Dataset", path: Path) -> None:
    import pyarrow as pa

    from spec_kd.files import replacing
    from spec_kd.stored_sets import find_own_sum

    schema = rows.features.arrow_schema
    with replacing(path, find_own_sum(path)) as file, pa.ipc.new_stream(file, schema) as writer:
        for batch in rows.with_format("arrow").iter(ROWS_AT_A_TIME):
            writer.write_table(batch.cast(schema))
