"""Exact duplicates among all shares of a log: of equal prompts the first one stays."""

import numpy as np

from spec_kd.open_types import Array
from spec_kd.prompts.logs.scale.reading import load_rows
from spec_kd.prompts.logs.scale.step import LogStep
from spec_kd.prompts.logs.scale.work_folder import WorkFolder, find_bounds, mark_repeats, split_orders


class FindExactDuplicates(LogStep):
    """Finds the duplicates whose hashes are in the range of a task."""

    name = "exact duplicates"

    def do(self, task: int, num_tasks: int) -> None:
        """Compares one range of hashes."""
        found = [np.zeros(0, dtype=np.uint64)]
        for low, high in self.work.list_ranges("identities", task, num_tasks):
            hashes, orders, _ = self.work.read_range("identities", low, high)
            found.append(orders[mark_repeats(hashes)])
        self.work.save("exact", task, np.sort(np.concatenate(found)))


def find_candidates(work: WorkFolder, part: int) -> tuple[Array, Array]:
    """Rows of a share that are neither exact duplicates nor of a length that is not wanted, and whether each is one.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: int64, `(M,)`, the rows that may stay, and bool, `(N,)`, whether each row of
        the share is an exact duplicate.
    """
    rows = load_rows(work, part)
    is_exact = np.zeros(len(rows), dtype=bool)
    for task in work.list_parts("exact"):
        is_exact[load_rows_of(work, "exact", task, part)] = True
    return np.flatnonzero(~is_exact & (rows["reason"] == 0)), is_exact


def load_rows_of(work: WorkFolder, name: str, task: int, part: int) -> Array:
    """The rows of one share in a sorted array of orders."""
    orders = work.load(name, task, mapped=True)
    return split_orders(np.array(orders[slice(*find_bounds(orders, part << 32, (part + 1) << 32))]))[1]
