"""Writes the result of a large log: the split, the prompts in the order of the log, and the report."""

import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from spec_kd.open_types import Array, JsonObject
from spec_kd.prompts.logs.log_reader import NUM_NOTES, OTHER_NOTES, build_report, number_name
from spec_kd.prompts.logs.options import LogOptions
from spec_kd.prompts.logs.prompt_filter import REASONS
from spec_kd.prompts.logs.prompt_store import ROWS_AT_A_TIME, PromptStore
from spec_kd.prompts.logs.report import LogLedger, QueryLogsReport, describe_nothing
from spec_kd.prompts.logs.scale.grouping import Groups
from spec_kd.prompts.logs.scale.ledgers import merge_ledgers
from spec_kd.prompts.logs.scale.reading import ROW, load_rows
from spec_kd.prompts.logs.scale.step import LogStep
from spec_kd.prompts.logs.scale.work_folder import WorkFolder
from spec_kd.prompts.splitting import choose_test_rows, warn_of_empty_side


class WriteResult(LogStep):
    """Splits and writes the prompts that stay; one task.

    Args:
        work (`WorkFolder`): Folder of the run.
        output_dir (`str`): Folder of the result.
        options (`LogOptions`): Options of the reading.
        fingerprint (`dict`): Of the call, for the result.
        facts (`dict`): Fields of the report that are known before: `files`, `ignored_files`, and `started`, the time
            at which the call began.
    """

    name = "result"

    def __init__(
        self, work: WorkFolder, output_dir: str, options: LogOptions, fingerprint: JsonObject, facts: JsonObject
    ):
        super().__init__(work)
        self.output_dir, self.options = output_dir, options
        self.fingerprint, self.facts = fingerprint, facts

    def do(self, task: int, num_tasks: int) -> None:
        """Writes the result, unless a killed task has written it."""
        store = PromptStore(self.output_dir)
        if store.read_finished(self.fingerprint) is not None:
            return
        parts = range(self.work.num_shares)
        ledgers = [self.work.load_json("ledgers", part) for part in parts]
        ledger, notes = merge_ledgers(ledgers, NUM_NOTES, OTHER_NOTES)
        dropped = self._count_dropped()
        counts = [len(self.work.load("kept", part, mapped=True)) for part in parts]
        if not sum(counts):
            raise ValueError(describe_nothing(ledger, dropped))
        groups = Groups(self.work, counts)
        joined = groups.link("links")
        firsts = groups.link("text_links")
        del groups
        options = self.options
        # Only what is needed at a time: these arrays have as many values as prompts stay in the whole log.
        numbers = self._load_column("conversation", counts)
        timestamps = self._load_column("timestamp", counts) if options.split_by == "time" else np.zeros(0)
        store.num_completions = self._count_kept("has_completion")
        has_tools = self._count_kept("has_tools") > 0
        is_test = choose_test_rows(numbers[firsts], timestamps, options.test_fraction, options.split_by, options.seed)
        warn_of_empty_side(is_test, firsts, options.test_fraction)
        del firsts, timestamps
        store.clear()
        store.write_splits(self._read_prompts(), is_test, joined, numbers, has_tools)
        report = self._report(ledger, notes, ledgers, dropped, is_test, joined, store.num_completions)
        store.finish(self.fingerprint, report.to_dict())

    def _report(
        self,
        ledger: LogLedger,
        notes: Counter[str],
        ledgers: list[JsonObject],
        dropped: dict[str, int],
        is_test: Array,
        joined: Array,
        num_completions: int,
    ) -> QueryLogsReport:
        return build_report(
            ledger,
            notes,
            files=self.facts["files"],
            prompts=sum(share["prompts"] for share in ledgers),
            dropped=dropped,
            kept=len(is_test),
            redacted=sum(share["redacted"] for share in ledgers),
            ignored_files=tuple(self.facts["ignored_files"]),
            train=int((~is_test).sum()),
            test=int(is_test.sum()),
            conversations=int((joined == np.arange(len(joined))).sum()),
            with_completion=num_completions,
            seconds=time.time() - self.facts["started"],
        )

    def _count_dropped(self) -> dict[str, int]:
        counts = [self.work.load_json("counts", part) for part in range(self.work.num_shares)]
        dropped = {"exact_duplicate": sum(one["exact"] for one in counts)}
        dropped["near_duplicate"] = sum(one["near"] for one in counts)
        for place, reason in enumerate(REASONS, start=1):
            if number := sum(one["reasons"][place] for one in counts if place < len(one["reasons"])):
                dropped[reason] = number
        return dropped

    def _load_kept(self, part: int, column: str) -> Array:
        return load_rows(self.work, part)[column][self.work.load("kept", part)]

    def _load_column(self, column: str, counts: list[int]) -> Array:
        """What is known of all prompts that stay, `(N,)`; `counts` says how many they are in each share."""
        values = np.empty(sum(counts), dtype=ROW[column])
        for part, end in enumerate(np.cumsum(counts).tolist()):
            values[end - counts[part] : end] = self._load_kept(part, column)
        return values

    def _count_kept(self, column: str) -> int:
        return sum(int(self._load_kept(part, column).sum()) for part in range(self.work.num_shares))

    def _read_prompts(self) -> Iterator[pa.RecordBatch]:
        """The prompts that stay, in order and in batches as of one process."""
        originals, numbers = self._number_renamed()
        waiting: list[pa.RecordBatch] = []
        for part in range(self.work.num_shares):
            rows, kept = load_rows(self.work, part), self.work.load("kept", part)
            start = 0
            with pa.OSFile(str(self.work.place("prompts", part))) as file:
                for batch in pa.ipc.open_stream(file):
                    end = start + len(batch)
                    chosen = kept[slice(*np.searchsorted(kept, [start, end]))]
                    batch = batch.take(pa.array(chosen - start))
                    waiting.append(_number_names(batch, rows[chosen], originals, numbers))
                    start = end
                    if sum(map(len, waiting)) >= ROWS_AT_A_TIME:
                        *whole, rest = _rebatch(waiting)
                        yield from whole
                        waiting = [rest]
        yield from _rebatch(waiting)

    def _number_renamed(self) -> tuple[Array, Array]:
        """Hashes of the names that were redacted, sorted, and the number of each by its first appearance."""
        names = [self.work.load("renamed", part) for part in range(self.work.num_shares)]
        originals, firsts = np.unique(np.concatenate(names), return_index=True)
        numbers = np.empty(len(firsts), dtype=np.int64)
        numbers[np.argsort(firsts)] = np.arange(1, len(firsts) + 1)
        return originals, numbers


def _rebatch(batches: list[pa.RecordBatch]) -> list[pa.RecordBatch]:
    return pa.Table.from_batches(batches).combine_chunks().to_batches(ROWS_AT_A_TIME)


def _number_names(batch: pa.RecordBatch, rows: Array, originals: Array, numbers: Array) -> pa.RecordBatch:
    """A batch in which names of conversations that were redacted have their numbers."""
    if not rows["is_renamed"].any():
        return batch
    ids = batch.column("conversation_id").to_pylist()
    for row in np.flatnonzero(rows["is_renamed"]).tolist():
        number = numbers[np.searchsorted(originals, rows["conversation"][row])]
        ids[row] = number_name(ids[row], int(number))
    place = batch.schema.get_field_index("conversation_id")
    return batch.set_column(place, batch.schema.field(place), pa.array(ids, pa.string()))


class RemoveTexts(LogStep):
    """Removes what only near-duplicates were found by, when these are known; one task."""

    name = "clean-up"

    def __init__(self, work: WorkFolder, folder: str):
        super().__init__(work)
        self.folder = folder

    def do(self, task: int, num_tasks: int) -> None:
        """Removes texts, signatures and pairs."""
        for name in ("texts", "contexts", "places", "pairs"):
            shutil.rmtree(Path(self.work.path, name), ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)
