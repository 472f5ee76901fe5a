"""The exact Jaccard similarity of texts, by their sets of character windows.

Windows need no word boundaries, so they are the same measure for English, Chinese and code. Texts wait in a file, and
those that were compared last are remembered with their windows.
"""

import os
import tempfile
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np

from spec_kd.open_types import Array

WINDOW = 5  # characters
# The end of a text is padded, so that short texts have windows too and no window reaches into the next text.
PADDING = "\0" * (WINDOW - 1)
# Windows are polynomials of their characters modulo 2**64; an odd multiplier loses none of them.
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
# Texts longer than this are compared at their ends as well, where the question about a document stands.
LONG = 150  # characters
END = 100
MOST_WINDOWS = 2**20  # that are remembered, 8 bytes each


class ComparedText:
    """A text as it is compared.

    Args:
        text (`str`): The text, see [`normalize_text`].
        compare_ends (`bool`): Whether a long text must be nearly the same in its first and last 100 characters as well.

    Attributes:
        num_windows (`int`): Most windows that this object holds.
    """

    def __init__(self, text: str, compare_ends: bool):
        self._text = text
        self._ends = (text[:END], text[-END:]) if compare_ends and len(text) > LONG else ()
        self.num_windows = len(text) + sum(map(len, self._ends))

    @cached_property
    def _parts(self) -> list[Array]:
        return [_list_windows(part) for part in (self._text, *self._ends)]

    def is_like(self, other: "ComparedText", threshold: float) -> bool:
        """Whether the similarity is at least `threshold`, and that of the ends as well if both texts are long."""
        if self._text == other._text:
            return True
        return all(compute_jaccard(*pair) >= threshold for pair in zip(self._parts, other._parts, strict=False))


def _list_windows(text: str) -> Array:
    """Hashes of the windows of a text, each once, uint64; a single one for an empty text."""
    return np.unique(_hash_padded(text + PADDING)) if text else np.zeros(1, dtype=np.uint64)


def compute_jaccard(one: Array, other: Array) -> float:
    """Jaccard similarity of two sets, arrays in which no number is twice, `(N,)` and `(M,)`."""
    num_common = len(np.intersect1d(one, other, assume_unique=True))
    return num_common / (len(one) + len(other) - num_common)


def hash_windows(texts: Sequence[str]) -> tuple[Array, Array]:
    """Hashes of the windows of texts: as many as the text has characters, the last ones padded.

    Args:
        texts (`Sequence[str]`): Texts.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: The hashes of all texts one after the other, uint64, and where each text begins
        and the last one ends, `(N + 1,)`, uint64.
    """
    windows = _hash_padded("".join(text + PADDING for text in texts))
    lengths = np.array([len(text) for text in texts])
    ends = np.cumsum(lengths + len(PADDING))
    is_padding = np.zeros(len(windows) + len(PADDING), dtype=bool)
    is_padding[ends[:, None] - np.arange(1, WINDOW)] = True
    return windows[~is_padding[: len(windows)]], np.concatenate([[0], np.cumsum(lengths)]).astype(np.uint64)


def _hash_padded(text: str) -> Array:
    """Hashes of the windows that begin at each character but the last ones, uint64."""
    characters = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    num_windows = len(characters) - len(PADDING)
    windows = np.zeros(num_windows, dtype=np.uint64)
    for shift in range(WINDOW):
        windows *= MULTIPLIER
        windows += characters[shift : shift + num_windows]
    windows ^= windows >> np.uint64(32)  # high bits depend on all characters, low ones on few
    return windows


class TextFile:
    """Texts one after the other in a file, of which single ones can be read.

    Args:
        file (`BinaryIO`): The file, open for reading, for writing at its end, or for both.
    """

    def __init__(self, file: BinaryIO):
        self._file, self._end = file, 0

    def write(self, text: str) -> tuple[int, int]:
        """Writes a text, and returns where it begins and its bytes."""
        data = text.encode("utf-8", "surrogatepass")
        self._file.write(data)
        place = self._end, len(data)
        self._end += len(data)
        return place

    def read(self, start: int, size: int) -> str:
        """The text that begins there."""
        if self._end:
            self._file.flush()
        return os.pread(self._file.fileno(), size, start).decode("utf-8", "surrogatepass")

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __del__(self) -> None:
        self.close()


class TextList:
    """Texts that are remembered in a file without a name, with 8 bytes of memory for each.

    Args:
        folder (`Path`, *optional*):
            Folder of the file, which is made with the first text; by default the system's for temporary files.
    """

    def __init__(self, folder: Path | None):
        self._folder = folder
        self._texts: TextFile | None = None
        self._starts = array("Q", [0])

    def append(self, text: str) -> None:
        """Adds a text."""
        if self._texts is None:
            self._texts = TextFile(tempfile.TemporaryFile(dir=self._folder))  # noqa: SIM115  # open as long as the list
        start, size = self._texts.write(text)
        self._starts.append(start + size)

    def __getitem__(self, number: int) -> str:
        if self._texts is None:
            raise IndexError(f"no text has the number {number}: there are none")
        start, end = self._starts[number : number + 2]
        return self._texts.read(start, end - start)


class RecentTexts:
    """Remembers the texts that were compared last, up to a number of windows.

    Args:
        read (`Callable`): Reads the text with a number, ready to be compared.
    """

    def __init__(self, read: Callable[[int], ComparedText]):
        self._read, self._num_windows = read, 0
        self._texts: OrderedDict[int, ComparedText] = OrderedDict()

    def __getitem__(self, number: int) -> ComparedText:
        if number in self._texts:
            self._texts.move_to_end(number)
            return self._texts[number]
        text = self._texts[number] = self._read(number)
        self._num_windows += text.num_windows
        while self._num_windows > MOST_WINDOWS and len(self._texts) > 1:
            self._num_windows -= self._texts.popitem(last=False)[1].num_windows
        return text
