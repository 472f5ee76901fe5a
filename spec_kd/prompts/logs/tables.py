"""Reads the rows of tables: CSV, TSV and Parquet."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq

from spec_kd.open_types import JsonValue
from spec_kd.prompts.logs.text_decoding import LONGEST, describe_too_long, is_whole_text, read_lines

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
    if delimiter is None:
        delimiter = max(DELIMITERS, key=first.count)
    lines.put_back(first)
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    names: list[str] | None = None
    while True:
        start = lines.number + 1
        try:
            cells = next(rows)
            if not all(is_whole_text(cell) for cell in cells):
                raise ValueError("not UTF-8: save the table as UTF-8")
        except StopIteration:
            return
        except (csv.Error, ValueError) as error:
            yield start, error if isinstance(error, ValueError) else ValueError(f"no row of a table ({error})")
            continue
        if not any(cells):
            continue
        if names is None:
            names = [name.strip() for name in cells]
            if len(set(names)) < len(names):
                yield start, ValueError(f"two columns have the same name: {names}")
                return
        elif len(cells) != len(names):
            yield start, ValueError(f"{len(cells)} cells, but the first row names {len(names)} columns")
        else:
            yield start, {name: cell for name, cell in zip(names, cells, strict=True) if cell != ""}


class _Lines:
    """Lines of text for `csv.reader`, which can go on after an error in one of them."""

    def __init__(self, stream: io.BufferedReader):
        self._lines = read_lines(stream)
        self._waiting: list[str] = []
        self.number = 0

    def put_back(self, line: str) -> None:
        """Returns a line once more."""
        if line:
            self._waiting.append(line)
            self.number -= 1

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        if self._waiting:
            self.number += 1
            return self._waiting.pop()
        self.number, line = next(self._lines)
        if line is None:
            raise ValueError(describe_too_long())
        return line.decode(errors="surrogateescape")


def read_parquet(path: Path) -> Iterator[tuple[int, JsonValue]]:
    """The rows without the `None` that Arrow adds; a `ValueError` in place of the first row that cannot be read."""
    from datasets import Features

    from spec_kd.data.arrow_padding import remove_row_padding  # imports torch, which other logs do not need

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            features = Features.from_arrow_schema(file.schema_arrow)
            for batch in file.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield number, remove_row_padding(row, features)
    except GeneratorExit:
        raise
    except Exception as error:
        yield number + 1, ValueError(f"the Parquet file cannot be read from here on ({error})")
