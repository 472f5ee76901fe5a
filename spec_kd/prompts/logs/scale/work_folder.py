"""What is known of the prompts of a large log, as arrays on disk that tasks hand on to each other.

A prompt is known by its share and its row in the share. Both make one number, its order in the log.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from spec_kd.open_types import Array, JsonObject

ROW_BITS = np.uint64(32)
ROW_MASK = np.uint64(2**32 - 1)
MOST_AT_ONCE = 2**20  # hashes that a task has in memory at a time, on average


@dataclass(frozen=True)
class WorkFolder:
    """The folder of a run.

    Args:
        path (`str`): The folder, which every machine of the run sees under this name.
        num_shares (`int`): Number of shares of the log.
    """

    path: str
    num_shares: int

    def place(self, name: str, part: int | None = None) -> Path:
        """The place of a file, of one share or task."""
        path = Path(self.path, name) if part is None else Path(self.path, name, f"{part:06d}")
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def save(self, name: str, part: int, values: Array) -> None:
        """Saves an array of a share or task."""
        with self.place(name, part).open("wb") as file:
            np.save(file, values)

    def load(self, name: str, part: int, mapped: bool = False) -> Array:
        """The array that was saved."""
        return np.load(self.place(name, part), mmap_mode="r" if mapped else None)

    def save_json(self, name: str, part: int, value: JsonObject) -> None:
        """Saves a JSON object of a share."""
        self.place(name, part).write_text(json.dumps(value), encoding="utf-8")

    def load_json(self, name: str, part: int) -> JsonObject:
        """The JSON object that was saved."""
        return json.loads(self.place(name, part).read_text(encoding="utf-8"))

    def list_parts(self, name: str) -> list[int]:
        """Shares or tasks that saved something under a name."""
        folder = Path(self.path, name)
        return sorted(int(path.name) for path in folder.iterdir()) if folder.is_dir() else []

    def save_hashes(self, name: str, part: int, hashes: Array, rows: Array, numbers: Array | None = None) -> None:
        """Saves hashes of rows of a share, sorted, for [`read_range`].

        Args:
            name (`str`), part (`int`): Name, and number of the share.
            hashes (`np.ndarray`): uint64, `(N,)`.
            rows (`np.ndarray`): `(N,)`, ascending.
            numbers (`np.ndarray`, *optional*): uint64, `(N,)`, further values of the rows.
        """
        order = np.argsort(hashes, kind="stable")
        self.save(f"{name}.hashes", part, hashes[order])
        self.save(f"{name}.rows", part, rows[order].astype(np.uint32))
        if numbers is not None:
            self.save(f"{name}.numbers", part, numbers[order])

    def list_ranges(self, name: str, task: int, num_tasks: int) -> Iterator[tuple[int, int]]:
        """Ranges of the hashes of a task, each of about as many as memory may hold."""
        total = sum(len(self.load(f"{name}.hashes", part, mapped=True)) for part in range(self.num_shares))
        num_ranges = max(1, -(-total // (num_tasks * MOST_AT_ONCE)))
        bounds = [2**64 * (task * num_ranges + i) // (num_tasks * num_ranges) for i in range(num_ranges + 1)]
        yield from pairwise(bounds)

    def read_range(self, name: str, low: int, high: int, has_numbers: bool = False) -> tuple[Array, Array, Array]:
        """Hashes of a range with the orders of their rows, sorted by both, and their further values."""
        hashes, orders, numbers = [], [], []
        for part in range(self.num_shares):
            saved = self.load(f"{name}.hashes", part, mapped=True)
            cut = slice(*find_bounds(saved, low, high))
            hashes.append(np.array(saved[cut]))
            orders.append(make_orders(part, self.load(f"{name}.rows", part, mapped=True)[cut]))
            if has_numbers:
                numbers.append(np.array(self.load(f"{name}.numbers", part, mapped=True)[cut]))
        joined = np.concatenate(hashes)
        by_hash = np.argsort(joined, kind="stable")  # shares are in order, and so are the rows of each
        further = np.concatenate(numbers)[by_hash] if has_numbers else by_hash
        return joined[by_hash], np.concatenate(orders)[by_hash], further


def find_bounds(ascending: Array, low: int, high: int) -> tuple[int, int]:
    """Where the values from `low` to below `high`, at most 2**64, are in an ascending array of uint64."""
    start = int(np.searchsorted(ascending, np.uint64(low)))
    return start, len(ascending) if high >= 2**64 else int(np.searchsorted(ascending, np.uint64(high)))


def make_orders(part: int, rows: Array) -> Array:
    """Orders in the log of rows of a share."""
    return (np.uint64(part) << ROW_BITS) | rows.astype(np.uint64)


def split_orders(orders: Array) -> tuple[Array, Array]:
    """Shares and rows, int64, of orders in the log."""
    return (orders >> ROW_BITS).astype(np.int64), (orders & ROW_MASK).astype(np.int64)


def mark_repeats(ascending: Array) -> Array:
    """Whether each value is equal to the one before it."""
    return np.concatenate([[False], ascending[1:] == ascending[:-1]]) if len(ascending) else np.zeros(0, dtype=bool)
