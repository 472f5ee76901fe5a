"""Compressed files as streams that return all that can be read before they report an error.

When a file breaks off, the readers of Python and Arrow lose what is in their buffer, and Python's reader of xz ignores
what follows the compressed data.
"""

import bz2
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from spec_kd.open_types import Argument, JsonValue

BUFFER = 2**16
LONGEST_MAGIC = 10
MAGIC = {
    b"\x1f\x8b": "gzip",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    **{b"BZh%d1AY&SY" % level: "bz2" for level in range(1, 10)},
    **{b"BZh%d\x17rE8P\x90" % level: "bz2" for level in range(1, 10)},  # of empty data
}


def open_decompressed(path: Path) -> io.BufferedReader:
    """The bytes of a file, decompressed by its first bytes (gzip, bzip2, xz, zstd, LZ4) and not by its name.

    Reading raises `OSError` for a file that was cut or damaged, and for other data after the compressed data.
    """
    with path.open("rb") as file:
        kind = find_compression(file.read(LONGEST_MAGIC))
    if kind in DECOMPRESSORS:
        return io.BufferedReader(_Decompressed(path, kind), BUFFER)
    return io.BufferedReader(pa.input_stream(str(path), compression=kind), BUFFER)


def find_compression(start: bytes) -> str | None:
    """The compression of data, by its first 10 bytes; `None` for data that is not compressed."""
    return next((kind for magic, kind in MAGIC.items() if start.startswith(magic)), None)


class _Gzip:
    """A decompressor of gzip with the interface of those in `bz2` and `lzma`."""

    def __init__(self) -> None:
        self._inflate = zlib.decompressobj(zlib.MAX_WBITS + 16)
        self._tail = b""

    @property
    def eof(self) -> bool:
        return self._inflate.eof

    @property
    def unused_data(self) -> bytes:
        return self._inflate.unused_data

    @property
    def needs_input(self) -> bool:
        return not self._tail

    def decompress(self, data: bytes, max_length: int) -> bytes:
        output = self._inflate.decompress(self._tail + data, max_length)
        self._tail = self._inflate.unconsumed_tail
        return output


DECOMPRESSORS: dict[str, Callable[[], JsonValue]] = {
    "gzip": _Gzip,
    "bz2": bz2.BZ2Decompressor,
    "xz": lzma.LZMADecompressor,
}


class _Decompressed(io.RawIOBase):
    """All compressed streams of a file, one after the other: log rotation appends them."""

    def __init__(self, path: Path, kind: str):
        super().__init__()
        self._file = path.open("rb")
        self._kind, self._stream = kind, DECOMPRESSORS[kind]()

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Argument) -> int:
        try:
            output = self._read(len(buffer))
        except (zlib.error, lzma.LZMAError, EOFError) as error:
            raise OSError(f"the compressed data is damaged from here on ({error})") from error
        buffer[: len(output)] = output
        return len(output)

    def _read(self, size: int) -> bytes:
        while True:
            if self._stream.eof:
                data = self._read_next_start()
                if not data:
                    return b""
                self._stream = DECOMPRESSORS[self._kind]()
            else:
                data = self._file.read(BUFFER) if self._stream.needs_input else b""
            is_end = self._stream.needs_input and not data
            output = self._stream.decompress(data, size)
            if output:
                return output
            if is_end and not self._stream.eof:
                raise OSError("the compressed file was cut: it ends too early")

    def _read_next_start(self) -> bytes:
        """The start of the next stream, without the zeros that pad files; empty at the end of the file."""
        data = self._stream.unused_data
        while len(data := data.lstrip(b"\0")) < LONGEST_MAGIC and (more := self._file.read(BUFFER)):
            data += more
        if data and find_compression(data) != self._kind:
            raise OSError("something else follows the compressed data")
        return data
