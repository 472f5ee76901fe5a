"""Files of logs: finds them, and reads their records one at a time."""

import codecs
import csv
import glob
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path, PurePath
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from spec_kd.addresses import AddressError, RemoteFile, is_address, is_pattern, list_remote, name_place
from spec_kd.open_types import JsonValue
from spec_kd.options import read_path
from spec_kd.prompts.logs.streams import EVENT_FIELDS, StreamLine, attach_streams
from spec_kd.prompts.logs.text_decoding import (
    BOM,
    LONGEST,
    LogPath,
    find_compression,
    is_whole_text,
    open_text,
    read_lines,
)
from spec_kd.prompts.logs.vllm import is_request_line

KINDS = (".jsonl", ".ndjson", ".log", ".json", ".txt", ".csv", ".tsv", ".parquet")
COMPRESSIONS = (".gz", ".zst", ".zstd", ".bz2", ".xz", ".lz4")
CHUNK = 2**20  # characters of a JSON array read at a time
# Endings that log rotation appends: `.1`, `-20260131`, `.2026-01-31_12`.
ROTATION = re.compile(r"[.-](?:\d{1,3}|\d{4}-?\d{2}(?:-?\d{2})?(?:[-_T]?\d{2}(?:[-_:]?\d{2}){0,2})?)(?=\.|$)")
EVENT_STARTS = tuple(name.encode() for name in EVENT_FIELDS)
DELIMITERS = ",;\t|"  # spreadsheets write semicolons in languages with a decimal comma
SPACE = " \t\r\n,\x00\ufeff"
# Keys of conversations and requests: a line of plain text that is JSON with one of these is a record, any other line a
# prompt as it stands.
RECORD_KEYS = {"messages", "conversations", "request", "body", "choices"}

Paths = str | Path | Sequence[str | Path]


def find_files(paths: Paths, output_dir: Path) -> tuple[list[LogPath], list[LogPath]]:
    """The files that `paths` stand for, each once.

    Args:
        paths (`str`, `Path` or a list of them): Files, glob patterns (`**` for all levels), and folders, whose
            subfolders are included; each may be an address.
        output_dir (`Path`): Folder of the result, whose files are not logs.

    Returns:
        `tuple[list[LogPath], list[LogPath]]`: The files, in the order given and sorted within a pattern or folder, and
        the files of folders that are left out: hidden ones, and those whose name has none of the endings [`KINDS`]
        (before the number of a rotated log and the ending of a compression). Files in hidden folders are in neither
        list.

    Raises:
        FileNotFoundError: No log file is found for a path or pattern; names it.
        ValueError: There is no path, or one is empty, which would mean the working directory.
        OSError: An address cannot be reached.
    """
    listed = [paths] if isinstance(paths, str | os.PathLike) else paths
    if not isinstance(listed, Sequence) or not len(listed):
        raise ValueError(f"`paths` must be a path or a list of them, got {paths!r}.")
    files: dict[LogPath, None] = {}
    ignored: dict[LogPath, None] = {}
    for path in [read_path("paths", path, takes_address=True) for path in listed]:
        found: list[LogPath] = list(list_remote(path)) if is_address(path) else []
        is_remote_folder = any(str(file) != path for file in found) and not is_pattern(path)
        if is_remote_folder or Path(path).is_dir():
            local = [] if found else [p for p in sorted(Path(path).rglob("*")) if p.is_file()]
            inside = [p for p in [*found, *local] if not _is_inside(p, output_dir)]
            inside = [p for p in inside if not _is_hidden(p.relative_to(path).parent)]
            found = [p for p in inside if find_kind(p) in KINDS and not _is_hidden(p.relative_to(path))]
            ignored |= dict.fromkeys(inside)
        elif Path(path).is_file():
            found = [Path(path)]
        elif not is_address(path):
            found = [*sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())]
        if not found:
            raise FileNotFoundError(
                f"`{path}` is no file, and no folder or pattern with a file that ends in {', '.join(KINDS)} (each also "
                f"with {', '.join(COMPRESSIONS)}, and numbered)."
            )
        files |= dict.fromkeys(found)
    by_place = {_resolve(path): path for path in reversed(files)}
    return list(reversed(by_place.values())), [path for path in ignored if _resolve(path) not in by_place]


def describe_version(path: LogPath) -> list[JsonValue]:
    """What changes when a file does: its size, and its time of modification or what its store says."""
    if isinstance(path, RemoteFile):
        return [path.size, path.tag]
    return [path.stat().st_size, path.stat().st_mtime_ns]


def find_kind(path: LogPath) -> str:
    """The ending of a file's name before those of compressions and rotations; empty if there is none."""
    name = path.name.lower()
    while True:
        short = ROTATION.sub("", name) if ROTATION.search(name) and not name.endswith(KINDS) else name
        short = next((short.removesuffix(ending) for ending in COMPRESSIONS if short.endswith(ending)), short)
        if short == name:
            return Path(name).suffix
        name = short


def read_records(path: LogPath, keep_text: bool = False) -> Iterator[tuple[int, JsonValue]]:
    """The records of a file with their line numbers (row of Parquet, item of a JSON array), from 1.

    A record that cannot be read is replaced by an exception, such as for a compressed file that was cut; after that one
    nothing more of the file is read. Empty lines are no records. Lines and items of more than 16 MiB are errors. Lines
    of a stream of events (`data: {...}`) become the response of the record on the line before.

    Args:
        path (`Path`): Parquet; CSV or TSV with names in the first row; plain text, of which each line is a record; JSON
            values one after the other, where the items of arrays are records; JSON lines otherwise.
        keep_text (`bool`, *optional*, defaults to `False`): Whether a line that is no JSON is a record as text, and not
            an error.

    Raises:
        AddressError: The store of a remote file gives no more of it; the rest of the file is unknown.
    """
    kind, number = find_kind(path), 0
    try:
        if kind == ".parquet":
            yield from _read_parquet(path)
            return
        with open_text(path) as stream:
            if kind in (".csv", ".tsv"):
                records = _read_csv(stream, "\t" if kind == ".tsv" else None)
            elif kind != ".txt" and _holds_values(path, kind, stream.peek(512)):
                records = _read_values(stream)
            else:
                records = attach_streams(_read_lines(stream, kind == ".txt", keep_text), LONGEST)
            for number, record in records:
                yield number, record
    except (OSError, ValueError, pa.ArrowException) as error:
        yield number + 1, error
    except AddressError:
        raise
    except Exception as error:  # whatever a decompressor or a decoder may raise
        yield number + 1, ValueError(f"the file cannot be read from here on ({type(error).__name__}: {error})")


def can_be_cut(path: LogPath) -> bool:
    """Whether a file can be read from the start of any line: text in lines on this machine, UTF-8, not compressed."""
    kind = find_kind(path)
    if not isinstance(path, Path) or kind in (".parquet", ".csv", ".tsv"):
        return False
    with path.open("rb") as file:
        start = file.peek(512)[:512]
    if find_compression(start) or b"\0" in start or start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return False
    return kind == ".txt" or not _holds_values(path, kind, start)


def is_event_line(line: bytes) -> bool:
    """Whether a line is empty or of a stream of events, and so belongs to the record before it."""
    return not line.strip() or line.strip().startswith(EVENT_STARTS)


def _is_hidden(path: PurePath) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _is_inside(path: LogPath, folder: Path) -> bool:
    if isinstance(path, RemoteFile):
        return path.address.startswith(f"{name_place(folder)}/")
    return path.resolve().is_relative_to(folder.resolve())


def _resolve(path: LogPath) -> Path | str:
    """Where a file lies, the same for two names of it."""
    return path.resolve() if isinstance(path, Path) else path.address


def _holds_values(path: LogPath, kind: str, start: bytes) -> bool:
    """Whether a file is JSON but not JSON lines: an array, or objects over several lines."""
    start = start.lstrip(b" \t\r\n" + BOM)
    if not start.startswith((b"[", b"{")):
        return False
    if kind == ".json" and start.startswith(b"["):
        return True
    with open_text(path) as stream:
        line = next((line for _, line in read_lines(stream) if isinstance(line, Exception) or line.strip()), None)
    if not isinstance(line, bytes) or not isinstance(_parse(line), ValueError):
        return False
    with open_text(path) as stream:
        _, first = next(_read_values(stream), (0, None))
    return isinstance(first, dict | list)


def _read_lines(stream: io.BufferedReader, is_text: bool, keep_text: bool) -> Iterator[tuple[int, JsonValue]]:
    for number, line in read_lines(stream):
        if isinstance(line, Exception):
            yield number, line
        elif line := line.strip():
            record = _read_text(line) if is_text else _parse(line)
            if isinstance(record, ValueError) and keep_text:
                record = _parse(line, bytes.decode)
            elif isinstance(record, ValueError) and not is_text:
                if line.startswith(EVENT_STARTS):
                    record = StreamLine(text) if isinstance(text := _parse(line, bytes.decode), str) else text
                elif is_request_line(line.decode(errors="replace")):
                    record = ValueError(
                        "a line of a vLLM server's log: pass `format=\"vllm\"` and the target's tokenizer"
                    )
            yield number, record


def _read_values(stream: BinaryIO) -> Iterator[tuple[int, JsonValue]]:
    """JSON values one after the other; an array counts as its items."""
    text = io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape")
    decoder = json.JSONDecoder()
    buffer, position, number, is_inside = text.read(CHUNK), 0, 0, False
    while True:
        while position < len(buffer) and buffer[position] in SPACE:
            position += 1
        if position == len(buffer):
            buffer, position = text.read(CHUNK), 0
            if not buffer:
                if is_inside:
                    yield number + 1, ValueError("the JSON array is not closed: the file was cut")
                return
            continue
        if buffer[position] == ("]" if is_inside else "["):
            is_inside, position = not is_inside, position + 1
            continue
        try:
            value, end = decoder.raw_decode(buffer, position)
        except (ValueError, RecursionError) as error:  # broken, or not read as a whole yet
            rest = len(buffer) - position
            more = text.read(max(CHUNK, rest)) if rest <= LONGEST and not isinstance(error, RecursionError) else ""
            if not more:
                yield number + 1, ValueError(f"the JSON cannot be read from here on ({error})")
                return
            buffer, position = buffer[position:] + more, 0
            continue
        number += 1
        yield number, value if is_whole_text(buffer[position:end]) else ValueError("not UTF-8: save the file as UTF-8")
        position = end


def _read_text(line: bytes) -> JsonValue:
    """A line of plain text: a record if it is one, otherwise a prompt."""
    if line.startswith(b"{") and isinstance(record := _parse(line), dict) and RECORD_KEYS & set(record):
        return record
    return _parse(line, bytes.decode)


def _parse(line: bytes, read: Callable[[bytes], JsonValue] = json.loads) -> JsonValue:
    """What `read` makes of a line, or a `ValueError` that says why it cannot."""
    try:
        return read(line)
    except UnicodeDecodeError as error:
        return ValueError(f"not UTF-8 ({error}): save the file as UTF-8")
    except ValueError as error:
        return ValueError(f"not JSON ({error})")
    except RecursionError:
        return ValueError("JSON with too many nested brackets")


def _read_csv(stream: io.BufferedReader, delimiter: str | None) -> Iterator[tuple[int, JsonValue]]:
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


def _read_parquet(path: LogPath) -> Iterator[tuple[int, JsonValue]]:
    """The rows without the `None` that Arrow adds; a `ValueError` in place of the first row that cannot be read."""
    from datasets import Features

    from spec_kd.data.arrow_padding import remove_row_padding  # imports torch, which other logs do not need

    number = 0
    try:
        with pq.ParquetFile(path if isinstance(path, Path) else path.open()) as file:
            features = Features.from_arrow_schema(file.schema_arrow)
            rows = (row for batch in file.iter_batches(batch_size=256) for row in batch.to_pylist())
            for number, row in enumerate(rows, start=1):
                yield number, remove_row_padding(row, features)
    except AddressError:
        raise
    except Exception as error:
        yield number + 1, ValueError(f"the Parquet file cannot be read from here on ({error})")
