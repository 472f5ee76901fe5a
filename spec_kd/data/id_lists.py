"""The ids of many prompts without a Python object for each id."""

import io
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np


class IdLists(Sequence[list[int]]):
    """Lists of ids, stored as int32 one after the other: 4 bytes per id, in memory or in a memory-mapped file.

    Args:
        lists (`Iterable[list[int]]`): The lists, read once.
        folder (`Path`, *optional*): Folder of the file, which is deleted with this object; in memory by default.

    Attributes:
        lengths (`np.ndarray`): Length of every list, int64 `(N,)`.

    Raises:
        `OSError`: The file cannot be written.
    """

    def __init__(self, lists: Iterable[list[int]], folder: Path | None = None):
        file = io.BytesIO() if folder is None else tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        lengths = []
        for ids in lists:
            file.write(np.asarray(ids, dtype=np.int32).tobytes())
            lengths.append(len(ids))
        file.flush()
        self.lengths = np.array(lengths, dtype=np.int64)
        self._ends = np.cumsum(self.lengths)
        file.seek(0)
        self._ids = np.frombuffer(file.read(), np.int32) if folder is None else np.memmap(file, np.int32, "r")

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> list[int]:  # type: ignore[override]  # nobody wants a slice of it
        end = int(self._ends[index])
        return self._ids[end - int(self.lengths[index]) : end].tolist()
