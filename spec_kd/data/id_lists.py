"""The ids of many texts without a Python object for each."""

import io
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np


class IdLists(Sequence[list[int]]):
    """Lists of ids, kept as int32 one after the other: 4 bytes an id, in memory or in a file that is memory-mapped.

    Args:
        lists (`Iterable[list[int]]`): Read once.
        folder (`Path`, *optional*): Where to put the file, which vanishes with this object; in memory by default.

    Attributes:
        lengths (`np.ndarray`): int64 `(N,)`, of every list.

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
