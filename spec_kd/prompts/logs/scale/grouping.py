"""Conversations among all shares of a log: prompts that belong together are linked, by ranges of hashes."""

from array import array

import numpy as np

from spec_kd.open_types import Array
from spec_kd.prompts.logs.conversations import find_continued
from spec_kd.prompts.logs.scale.exact_duplicates import find_candidates
from spec_kd.prompts.logs.scale.reading import load_rows
from spec_kd.prompts.logs.scale.step import LogStep
from spec_kd.prompts.logs.scale.work_folder import MOST_AT_ONCE, WorkFolder, mark_repeats, split_orders


class SortKept(LogStep):
    """Saves the rows of a share that stay, and sorts the hashes by which they are grouped.

    Args:
        work (`WorkFolder`): Folder of the run.
        has_near (`bool`): Whether near-duplicates were dropped.
    """

    name = "kept prompts"

    def __init__(self, work: WorkFolder, has_near: bool):
        super().__init__(work)
        self.has_near = has_near

    def do(self, task: int, num_tasks: int) -> None:
        """Sorts the hashes of a share. Rows are counted among those that stay from here on."""
        kept, is_exact = find_candidates(self.work, task)
        num_candidates = len(kept)
        if self.has_near:
            kept = np.delete(kept, self.work.load("dropped", task))
        every = load_rows(self.work, task)
        rows = every[kept]
        reasons = np.bincount(every["reason"][~is_exact], minlength=4).tolist()
        self.work.save("kept", task, kept.astype(np.uint32))
        counts = {"exact": int(is_exact.sum()), "near": num_candidates - len(kept), "reasons": reasons}
        self.work.save_json("counts", task, counts)
        numbers, places = rows["conversation"].copy(), np.arange(len(kept))
        self.work.save_hashes("conversations", task, numbers, places)
        self.work.save_hashes("wholes", task, rows["whole"].copy(), places, numbers)
        new_places = np.full(len(every), -1, dtype=np.int64)
        new_places[kept] = places
        beginning_places = new_places[self.work.load("beginning_rows", task)]
        is_kept = beginning_places >= 0
        beginnings, beginning_places = self.work.load("beginnings", task)[is_kept], beginning_places[is_kept]
        self.work.save_hashes("beginning", task, beginnings, beginning_places, numbers[beginning_places])


class LinkConversations(LogStep):
    """Links the prompts whose hashes are in the range of a task."""

    name = "conversations"

    def do(self, task: int, num_tasks: int) -> None:
        """Saves pairs of a prompt and an earlier or equal one, by conversation and by text."""
        of_conversation = [np.zeros((0, 2), dtype=np.uint64)]
        of_text = [np.zeros((0, 2), dtype=np.uint64)]
        for low, high in self.work.list_ranges("conversations", task, num_tasks):
            hashes, orders, _ = self.work.read_range("conversations", low, high)
            of_conversation.append(_link_repeats(hashes, orders))
        for low, high in self.work.list_ranges("wholes", task, num_tasks):
            hashes, orders, numbers = self.work.read_range("wholes", low, high, has_numbers=True)
            of_text.append(_link_repeats(hashes, orders))
            beginnings, rows, row_numbers = self.work.read_range("beginning", low, high, has_numbers=True)
            is_wanted, places = find_continued(hashes, numbers, beginnings, row_numbers)
            of_conversation.append(np.stack([rows[is_wanted], orders[places[is_wanted]]], axis=1))
        self.work.save("links", task, np.concatenate(of_conversation))
        self.work.save("text_links", task, np.concatenate(of_text))


def _link_repeats(hashes: Array, orders: Array) -> Array:
    """Each row whose hash is not new, with the first one of this hash, `(M, 2)`."""
    is_repeat = mark_repeats(hashes)
    firsts = np.maximum.accumulate(np.where(is_repeat, 0, np.arange(len(hashes))))
    return np.stack([orders[is_repeat], orders[firsts[is_repeat]]], axis=1)


class Groups:
    """Groups of rows that are linked, with 4 bytes of memory for each row, or 8 from 4 billion rows on.

    Args:
        work (`WorkFolder`): Folder of the run.
        counts (`list[int]`): Number of rows of each share.
    """

    def __init__(self, work: WorkFolder, counts: list[int]):
        self._work = work
        self._starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        num_rows = int(self._starts[-1])
        self._parents = array("I" if num_rows < 2**32 else "Q")
        for start in range(0, num_rows, MOST_AT_ONCE):
            rows = np.arange(start, min(start + MOST_AT_ONCE, num_rows))
            self._parents.frombytes(rows.astype(self._parents.typecode).tobytes())

    def link(self, name: str) -> Array:
        """Adds the links that tasks saved; returns for each row the first one of its group, `(N,)`, unsigned."""
        parents = self._parents

        def find(row: int) -> int:
            while parents[row] != row:
                parents[row] = row = parents[parents[row]]
            return row

        for task in self._work.list_parts(name):
            links = self._work.load(name, task)
            rows, others = (self._count_rows(links[:, side]).tolist() for side in (0, 1))
            for row, other in zip(rows, others, strict=True):
                early, late = sorted((find(row), find(other)))
                parents[late] = early
        firsts = np.array(parents)
        while True:  # parents are never later, so each pass halves the ways
            further = firsts[firsts]
            if np.array_equal(further, firsts):
                return firsts
            firsts = further

    def _count_rows(self, orders: Array) -> Array:
        """Rows counted over all shares."""
        parts, rows = split_orders(orders)
        return self._starts[parts] + rows
