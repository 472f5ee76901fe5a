"""Reads the rows of tables: CSV, TSV and Parquet."""

import csv
import io
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pyarrow.parquet as pq

from spec_kd.open_types import JsonValue
from spec_kd.prompts.logs.text_decoding import LONGEST, is_whole_text, read_lines

DELIMITERS = ",;\t|"  # spreadsheets write semicolons in languages with a decimal comma


def read_csv(stream: io.BufferedReader, delimiter: str | None) -> Iterator[tuple[int, JsonValue]]:
    """The rows as dictionaries by the names in the first row, with their line numbers; empty cells are left out.

    Args:
        stream (`io.BufferedReader`): The file in UTF-8.
        delimiter (`str`, *optional*): Character between cells; by default the one of [`DELIMITERS`] that the first row
            has most often.

    Returns:
        `Iterator[tuple[int, Any]]`: Line numbers and rows. A row that cannot be read is replaced by a `ValueError`.
    """
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST))
    lines = _Lines(stream)
    first = next(lines, "")
    if first.lower().startswith("sep=") and len(first.strip()) == 5:  # Excel writes such a line
        delimiter, first = first.strip()[-1], next(lines, "")
    rows = csv.reader(chain([first], lines), delimiter=delimiter or max(DELIMITERS, key=first.count), strict=True)
    names: list[str] = []
    start = lines.number
    while True:
        try:
            cells = next(rows)
            if not is_whole_text("".join(cells)):
                raise ValueError("not UTF-8: save the table as UTF-8")
        except StopIteration:
            return
        except (csv.Error, ValueError) as error:
            yield start, error if isinstance(error, ValueError) else ValueError(f"no row of a table ({error})")
        else:
            if any(cells) and not names:
                names = [name.strip() for name in cells]
                if len(set(names)) < len(names):
                    yield start, ValueError(f"two columns have the same name: {names}")
                    return
            elif any(cells) and len(cells) != len(names):
                yield start, ValueError(f"{len(cells)} cells, but the first row names {len(names)} columns")
            elif any(cells):
                yield start, {name: cell for name, cell in zip(names, cells, strict=True) if cell != ""}
        start = lines.number + 1


class _Lines:
    """Lines of text for `csv.reader`, which can go on after an error in one of them."""

    def __init__(self, stream: io.BufferedReader):
        self._lines, self.number = read_lines(stream), 0

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        self.number, line = next(self._lines)
        if isinstance(line, Exception):
            raise line
        return line.decode(errors="surrogateescape")


def read_parquet(path: Path) -> Iterator[tuple[int, JsonValue]]:
    """The rows without the `None` that Arrow adds; a `ValueError` in place of the first row that cannot be read."""
    from datasets import Features

    from spec_kd.data.arrow_padding import remove_row_padding  # imports torch, which other logs do not need

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            features = Features.from_arrow_schema(file.schema_arrow)
            rows = (row for batch in file.iter_batches(batch_size=256) for row in batch.to_pylist())
            for number, row in enumerate(rows, start=1):
                yield number, remove_row_padding(row, features)
    except Exception as error:
        yield number + 1, ValueError(f"the Parquet file cannot be read from here on ({error})")
