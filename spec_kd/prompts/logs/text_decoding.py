"""The text of log files: decompressed, decoded from UTF-8, UTF-16 or UTF-32, and read in lines of bounded length."""

import codecs
import io
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from spec_kd.open_types import Argument
from spec_kd.prompts.logs.compression import BUFFER, open_decompressed

LONGEST = 2**24  # bytes of a line, characters of an item or a cell; a longer one is malformed
BOM = codecs.BOM_UTF8
MARKS = (  # the longer ones first
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
NOT_TEXT = {
    b"PK\x03\x04": "a ZIP archive (or a spreadsheet): unpack it, or save it as CSV",
    b"7z\xbc\xaf": "a 7z archive: unpack it",
    b"Rar!\x1a\x07": "a RAR archive: unpack it",
    b"PAR1": "a Parquet file: give its name the ending .parquet",
    b"ARROW1\x00\x00": "an Arrow file: save it as Parquet (`Dataset.from_file(path).to_parquet(...)`)",
    b"Obj\x01": "an Avro file: save it as Parquet or JSON lines",
    b"SQLite format 3\x00": "a SQLite database: export the table as CSV or JSON lines",
    b"%PDF-": "a PDF file",
    b"\x89HDF": "an HDF5 file: save it as Parquet or JSON lines",
}


def open_text(path: Path) -> io.BufferedReader:
    """The bytes of a text file as UTF-8, decompressed by its first bytes, without a byte order mark.

    UTF-16 and UTF-32 are recognized by their marks, and UTF-16 also by the zero bytes of ASCII characters. Nothing else
    is guessed: lines in other encodings are not UTF-8.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file is of a kind that contains no text; says what to do about it.
    """
    stream = open_decompressed(path)
    start = stream.peek(512)[:512]
    for magic, kind in NOT_TEXT.items():
        if start.startswith(magic):
            raise ValueError(f"this is {kind}")
    if start[257:262] == b"ustar":
        raise ValueError("this is a tar archive: unpack it")
    if start.startswith(BOM):
        stream.read(len(BOM))
        return stream
    encoding = next((encoding for mark, encoding in MARKS if start.startswith(mark)), None)
    if encoding is None and len(start) >= 4 and (start[0] == 0) != (start[1] == 0):
        encoding = "utf-16-be" if start[0] == 0 and start[2] == 0 else "utf-16-le" if start[3] == 0 else None
    return stream if encoding is None else io.BufferedReader(_Transcoder(stream, encoding), BUFFER)


class _Transcoder(io.RawIOBase):
    """A stream in another encoding, as UTF-8."""

    def __init__(self, stream: BinaryIO, encoding: str):
        super().__init__()
        self._text = io.TextIOWrapper(stream, encoding=encoding, newline="")
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Argument) -> int:
        if not self._rest:
            self._rest = self._text.read(BUFFER).encode()
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size

    def close(self) -> None:
        self._text.close()
        super().close()


def read_lines(stream: io.BufferedReader) -> Iterator[tuple[int, bytes | None]]:
    """Line numbers, from 1, with the bytes of the lines; `None` for a line that is too long to be kept in memory."""
    number = 0
    readline, limit = stream.readline, LONGEST + 1
    while line := readline(limit):
        number += 1
        if len(line) == limit and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = readline(limit)
            yield number, None
        elif line.startswith(BOM):  # the start of a file that was appended to another one
            yield number, line[len(BOM) :]
        else:
            yield number, line


def describe_too_long() -> str:
    """The reason for a line that is too long."""
    return f"the line is longer than {LONGEST // 2**20} MiB"


def is_whole_text(text: str) -> bool:
    """Whether a text that was decoded with `surrogateescape` comes from bytes that are all UTF-8."""
    if text.isascii():
        return True
    try:
        text.encode()
    except ValueError:
        return False
    return True
