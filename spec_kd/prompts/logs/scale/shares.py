"""Cuts a log into shares of about the same size, in the order of the log."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from spec_kd.addresses import RemoteFile
from spec_kd.open_types import Argument
from spec_kd.prompts.logs.files import can_be_cut, is_event_line
from spec_kd.prompts.logs.text_decoding import LONGEST, LogPath

BUFFER = 2**20


@dataclass(frozen=True)
class FilePart:
    """Some lines of a file, with what of `Path` the reading of logs needs.

    Args:
        path (`Path` or `RemoteFile`): The file.
        start (`int`), end (`int`, *optional*): Where the lines begin and end, in bytes; the end of the file by default.
    """

    path: LogPath
    start: int = 0
    end: int | None = None

    def __str__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        """The name of the file."""
        return self.path.name

    def open(self, mode: str = "rb") -> io.BufferedReader:
        """Opens the lines for reading."""
        return io.BufferedReader(_Piece(self.path.open("rb"), self.start, self.end), BUFFER)

    def count_lines_before(self) -> int:
        """Number of lines of the file before this part."""
        return _count_lines(self.path, 0, self.start)

    def count_lines(self) -> int:
        """Number of lines of this part, or 0 if it goes to the end of its file."""
        return 0 if self.end is None else _count_lines(self.path, self.start, self.end)


class _Piece(io.RawIOBase):
    """The bytes of a file between two places."""

    def __init__(self, file: Argument, start: int, end: int | None):
        self._file, self._left = file, None if end is None else end - start
        file.seek(start)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Argument) -> int:
        size = len(buffer) if self._left is None else min(len(buffer), self._left)
        data = self._file.read(size)
        buffer[: len(data)] = data
        if self._left is not None:
            self._left -= len(data)
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def cut_into_shares(files: Sequence[LogPath], num_shares: int) -> list[list[FilePart]]:
    """Cuts files into shares of about the same number of bytes.

    JSON lines and plain text are cut at the beginnings of lines, if they are on this machine and not compressed. Any
    other file is in one share as a whole.

    Args:
        files (`Sequence[Path]`): Files of a log, in order.
        num_shares (`int`): Most shares.

    Returns:
        `list[list[FilePart]]`: The shares; those at the end may be empty.
    """
    sizes = [path.size if isinstance(path, RemoteFile) else path.stat().st_size for path in files]
    goal = max(1, -(-sum(max(size, 0) for size in sizes) // num_shares))
    shares: list[list[FilePart]] = [[]]
    left = goal
    for path, size in zip(files, sizes, strict=True):
        start = 0
        while isinstance(path, Path) and size - start > left and can_be_cut(path):
            cut = _find_record(path, start + left)
            if cut is None:
                break
            shares[-1].append(FilePart(path, start, cut))
            start, left = cut, goal
            shares.append([])
        shares[-1].append(FilePart(path, start))
        left -= max(size, 0) - start
        if left <= 0:
            left = goal
            shares.append([])
    # Cuts come after the bytes that were meant, so that there are never too many shares but for an empty last one.
    shares = [share for share in shares if share]
    return shares + [[] for _ in range(num_shares - len(shares))]


def _find_record(path: Path, offset: int) -> int | None:
    """The start of the first record after a place: of a line that belongs to no record before it."""
    with path.open("rb") as file:
        file.seek(offset - 1)
        line = file.readline(LONGEST)
        while line and not line.endswith(b"\n"):
            line = file.readline(LONGEST)
        while True:
            place = file.tell()
            line = file.readline(LONGEST)
            if not line:
                return None
            if not is_event_line(line):
                return place


def _count_lines(path: LogPath, start: int, end: int) -> int:
    with FilePart(path, start, end).open() as file:
        return sum(data.count(b"\n") for data in iter(lambda: file.read(BUFFER), b""))
