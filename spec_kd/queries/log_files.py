"""Files of logs, read one record at a time."""

import glob
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from spec_kd.checks import read_path

KINDS = (".jsonl", ".ndjson", ".log", ".json", ".txt", ".parquet")
COMPRESSIONS = (".gz", ".zst", ".bz2", ".lz4")
CHUNK = 2**20  # characters of a JSON array read at a time
LONGEST_VALUE = 2**26  # characters of one item in a JSON array

Paths = str | Path | Sequence[str | Path]


def find_files(paths: Paths, output_dir: Path) -> tuple[list[Path], list[Path]]:
    """The files that `paths` mean, each once.

    Args:
        paths (`str`, `Path` or a list of them): Files, glob patterns (`**` for all levels) and folders, which are gone
            through at all levels.
        output_dir (`Path`): What lies there is not a log.

    Returns:
        The files, in the order given and sorted within a pattern or folder, and the files of folders that are left out
        because their name has none of the endings [`KINDS`] (hidden ones are not even listed).

    Raises:
        `FileNotFoundError`: Names a path or pattern that no log file is found for.
    """
    files: dict[Path, None] = {}
    ignored: dict[Path, None] = {}
    for path in read_paths(paths):
        if Path(path).is_dir():
            inside = sorted(p for p in Path(path).rglob("*") if p.is_file() and not _is_hidden(p.relative_to(path)))
            inside = [p for p in inside if not p.resolve().is_relative_to(output_dir.resolve())]
            found = [p for p in inside if _find_kind(p) in KINDS]
            ignored |= dict.fromkeys(p for p in inside if _find_kind(p) not in KINDS)
        elif Path(path).is_file():
            found = [Path(path)]
        else:
            found = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
        if not found:
            raise FileNotFoundError(
                f"`{path}` is no file, or a folder or pattern without a file of the kinds {', '.join(KINDS)} "
                f"(each also with {', '.join(COMPRESSIONS)})."
            )
        files |= dict.fromkeys(found)
    by_place = {path.resolve(): path for path in reversed(files)}
    return list(reversed(by_place.values())), list(ignored)


def read_paths(paths: Paths) -> list[str]:
    """One path or several as a list; raises `ValueError` for none at all, and for an empty one."""
    listed = [paths] if isinstance(paths, str | os.PathLike) else paths
    if not isinstance(listed, Sequence) or not len(listed):
        raise ValueError(f"`paths` must be a path or a list of them, got {paths!r}.")
    return [read_path("paths", path) for path in listed]


def read_records(path: Path, keeps_text: bool = False) -> Iterator[tuple[int, Any]]:
    """The records of a file with their line numbers (rows of Parquet, items of a JSON array), from 1.

    In place of a record that cannot be read comes the error, a `ValueError` (or an `OSError`, such as for a compressed
    file that was cut, after which nothing of the file is read). Empty lines are no records.

    Args:
        path (`Path`): Parquet; text, of which each line is a record; a JSON array, or one object over several lines;
            anything else is JSON lines.
        keeps_text (`bool`): Whether a line that is no JSON is a record as text, in place of an error.
    """
    kind = _find_kind(path)
    number = 0
    try:
        if kind == ".parquet":
            yield from _read_parquet(path)
            return
        # What is in the buffer when a compressed file breaks off is lost, so it is small.
        with io.BufferedReader(pa.input_stream(str(path), compression="detect"), 2**16) as stream:
            lines: Iterable[bytes] = stream
            if kind == ".json":
                if stream.peek().lstrip().startswith(b"["):
                    yield from _read_array(stream)
                    return
                first = stream.readline()
                if _is_broken(first):
                    text = first + stream.read()
                    if not _is_broken(text):
                        yield 1, _parse(text)
                        return
                    first, stream = b"", io.BytesIO(text)
                lines = chain([first] if first else [], stream)
            for number, line in enumerate(lines, start=1):
                if line := line.strip():
                    record = _decode(line) if kind == ".txt" else _parse(line)
                    yield number, _decode(line) if keeps_text and isinstance(record, ValueError) else record
    except (OSError, pa.ArrowException) as error:
        yield number + 1, error


def _find_kind(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _read_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    from datasets import Features

    from spec_kd.data.arrow_padding import remove_row_padding  # imports torch, which other logs do not need

    number = 0
    with pq.ParquetFile(path) as file:
        features = Features.from_arrow_schema(file.schema_arrow)
        for batch in file.iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield number, remove_row_padding(row, features)


def _read_array(stream: BinaryIO) -> Iterator[tuple[int, Any]]:
    text = io.TextIOWrapper(stream, encoding="utf-8")
    buffer, position, number = text.read(CHUNK), 0, 0
    position = buffer.index("[") + 1
    decoder = json.JSONDecoder()
    while True:
        while position < len(buffer) and buffer[position] in " \t\r\n,":
            position += 1
        try:
            if buffer[position] == "]":
                return
            value, position = decoder.raw_decode(buffer, position)
        except (ValueError, IndexError) as error:  # broken, or not there as a whole yet
            more = text.read(max(CHUNK, len(buffer))) if len(buffer) - position <= LONGEST_VALUE else ""
            if not more:
                yield number + 1, ValueError(f"the JSON array cannot be read from here on ({error})")
                return
            buffer, position = buffer[position:] + more, 0
            continue
        number += 1
        yield number, value


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        return ValueError(f"not JSON ({error})")


def _decode(line: bytes) -> Any:
    try:
        return line.decode()
    except ValueError as error:
        return ValueError(f"not UTF-8 ({error})")


def _is_broken(text: bytes) -> bool:
    return isinstance(_parse(text), ValueError)
