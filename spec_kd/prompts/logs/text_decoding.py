"""The text of log files: decompressed, decoded from UTF-8, UTF-16 or UTF-32, and read in lines of bounded length.

All that can be read is returned before an error is reported. When a compressed file breaks off, the readers of Python
and Arrow lose what is in their buffer, and Python's reader of xz ignores what follows the compressed data.
"""

import bz2
import codecs
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pyarrow as pa

from spec_kd.addresses import RemoteFile
from spec_kd.open_types import Argument, JsonValue

LogPath = Path | RemoteFile

BUFFER = 2**16
LONGEST = 2**24  # bytes of a line, characters of an item or a cell; a longer one is malformed
BOM = codecs.BOM_UTF8
MARKS = (  # the longer ones first
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
LONGEST_MAGIC = 10
COMPRESSIONS = {
    b"\x1f\x8b": "gzip",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    **{b"BZh%d1AY&SY" % level: "bz2" for level in range(1, 10)},
    **{b"BZh%d\x17rE8P\x90" % level: "bz2" for level in range(1, 10)},  # of empty data
}
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
ESCAPED = re.compile("[\udc80-\udcff]")  # what `surrogateescape` makes of bytes that are not UTF-8


def open_text(path: LogPath) -> io.BufferedReader:
    """The bytes of a text file as UTF-8, decompressed by its first bytes, without a byte order mark.

    UTF-16 and UTF-32 are recognized by their marks, and UTF-16 also by the zero bytes of ASCII characters. Nothing else
    is guessed: lines in other encodings are not UTF-8.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file is of a kind that contains no text; says what to do about it.
    """
    stream = open_decompressed(path)
    start = stream.peek(512)[:512]
    kinds = (kind for magic, kind in NOT_TEXT.items() if start.startswith(magic))
    if kind := next(kinds, "a tar archive: unpack it" if start[257:262] == b"ustar" else None):
        raise ValueError(f"this is {kind}")
    if start.startswith(BOM):
        stream.read(len(BOM))
    encoding = next((encoding for mark, encoding in MARKS if start.startswith(mark)), None)
    if encoding is None and len(start) >= 4 and (start[0] == 0) != (start[1] == 0):
        encoding = "utf-16-be" if start[0] == 0 and start[2] == 0 else "utf-16-le" if start[3] == 0 else None
    if encoding is None:
        return stream
    text = io.TextIOWrapper(stream, encoding=encoding, newline="")
    return io.BufferedReader(_Pieces(text, (piece.encode() for piece in iter(lambda: text.read(BUFFER), ""))), BUFFER)


def open_decompressed(path: LogPath) -> io.BufferedReader:
    """The bytes of a file, decompressed by its first bytes (gzip, bzip2, xz, zstd, LZ4) and not by its name.

    Reading raises `OSError` for a file that was cut or damaged, and for other data after the compressed data.
    """
    file = path.open("rb")
    kind = find_compression(file.peek(LONGEST_MAGIC))
    if kind in DECOMPRESSORS:
        return io.BufferedReader(_Pieces(file, _decompress(file, kind)), BUFFER)
    if isinstance(path, Path):
        file.close()
    return io.BufferedReader(pa.input_stream(str(path) if isinstance(path, Path) else file, compression=kind), BUFFER)


def find_compression(start: bytes) -> str | None:
    """The compression of data, by its first 10 bytes; `None` for data that is not compressed."""
    return next((kind for magic, kind in COMPRESSIONS.items() if start.startswith(magic)), None)


class _Gzip:
    """A decompressor of gzip with the interface of those in `bz2` and `lzma`."""

    def __init__(self) -> None:
        self._inflate = zlib.decompressobj(zlib.MAX_WBITS + 16)
        self.eof, self.needs_input, self.unused_data = False, True, b""

    def decompress(self, data: bytes, max_length: int) -> bytes:
        output = self._inflate.decompress(self._inflate.unconsumed_tail + data, max_length)
        self.eof, self.unused_data = self._inflate.eof, self._inflate.unused_data
        self.needs_input = not self._inflate.unconsumed_tail
        return output


DECOMPRESSORS: dict[str | None, Callable[[], JsonValue]] = {
    "gzip": _Gzip,
    "bz2": bz2.BZ2Decompressor,
    "xz": lzma.LZMADecompressor,
}


def _decompress(file: IO[bytes], kind: str | None) -> Iterator[bytes]:
    """The data of all compressed streams in a file, one after the other: log rotation appends them."""
    stream, data = DECOMPRESSORS[kind](), file.read(BUFFER)
    try:
        while True:
            output = stream.decompress(data, BUFFER)
            yield output
            data = b""
            if stream.eof:
                data = stream.unused_data  # the start of the next stream, after the zeros that pad files
                while len(data := data.lstrip(b"\0")) < LONGEST_MAGIC and (more := file.read(BUFFER)):
                    data += more
                if not data:
                    return
                if find_compression(data) != kind:
                    raise OSError("something else follows the compressed data")
                stream = DECOMPRESSORS[kind]()
            elif stream.needs_input and not (data := file.read(BUFFER)) and not output:
                raise OSError("the compressed file was cut: it ends too early")
    except (zlib.error, lzma.LZMAError, EOFError) as error:
        raise OSError(f"the compressed data is damaged from here on ({error})") from error


class _Pieces(io.RawIOBase):
    """The pieces of data that are made of another stream, as one stream."""

    def __init__(self, source: IO[bytes] | IO[str], pieces: Iterator[bytes]):
        self._source, self._pieces, self._rest = source, pieces, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Argument) -> int:
        while not self._rest and (piece := next(self._pieces, None)) is not None:
            self._rest = piece
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size

    def close(self) -> None:
        self._source.close()
        super().close()


def read_lines(stream: io.BufferedReader) -> Iterator[tuple[int, bytes | ValueError | OSError]]:
    """Line numbers, from 1, with the bytes of the lines; an error for a line that is too long, or cannot be read."""
    number = 0
    try:
        for number, line in enumerate(iter(lambda: stream.readline(LONGEST + 1), b""), start=1):
            if len(line) > LONGEST and not line.endswith(b"\n"):
                while line and not line.endswith(b"\n"):
                    line = stream.readline(LONGEST + 1)
                yield number, ValueError(f"the line is longer than {LONGEST // 2**20} MiB")
            else:
                yield number, line.removeprefix(BOM)  # of a file that was appended to another one
    except (OSError, ValueError) as error:
        yield number + 1, error


def is_whole_text(text: str) -> bool:
    """Whether a text that was decoded with `surrogateescape` comes from bytes that are all UTF-8."""
    return text.isascii() or not ESCAPED.search(text)
