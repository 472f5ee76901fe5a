"""Runs an engine over many rows so that nothing is lost: planned batches, shards on disk, several processes.

Only this process writes the shards that it asks an engine for, wherever the engine computes them.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext

import accelerate
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from spec_kd.data.outcomes import describe_unidentified, raise_unusable
from spec_kd.data.response_options import SignalOptions
from spec_kd.data.shard_tasks import Batch, ShardTask, complete_shard
from spec_kd.data.shards import ShardStore
from spec_kd.engines.base import Engine
from spec_kd.files import alone_in
from spec_kd.open_types import JsonValue
from spec_kd.progress import PartProgress, RowProgress

Plan = list[list[Batch]]


def plan_batches(lengths: Sequence[int], batch_size: int, shard_size: int) -> Plan:
    """Divides rows into shards of numbered batches, longest rows first: running out of memory then shows at once."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches = list(enumerate(order[i : i + batch_size] for i in range(0, len(order), batch_size)))
    per_shard = max(1, shard_size // batch_size)
    return [batches[i : i + per_shard] for i in range(0, len(batches), per_shard)]


class RunResult:
    """The outcomes of all rows of a plan, in memory or on disk.

    Args:
        tables (`Sequence[pa.Table]`): Tables of `SHARD_SCHEMA`, in memory or memory-mapped, with each row once.

    Attributes:
        num_rows (`int`): Number of rows of the plan.
        unidentified (`dict[int, list[str]]`): Names of tokens without an id, by row.
        unusable (`dict[int, str]`): Reasons why the target cannot take the prompt, by row.
    """

    def __init__(self, tables: Sequence[pa.Table]):
        self._tables, self.num_rows = tables, sum(map(len, tables))
        self.unidentified = _find_left_out(tables, "unmapped_tokens")
        self.unusable = _find_left_out(tables, "unusable_prompt")
        self._places = np.empty((self.num_rows, 2), dtype=np.int64)  # number of the shard, position in it
        for number, table in enumerate(tables):
            rows = table["row"].to_numpy()
            self._places[rows, 0], self._places[rows, 1] = number, np.arange(len(rows))

    @property
    def rows(self) -> list[int]:
        """Rows with a completion, in order."""
        return [row for row in range(self.num_rows) if row not in self.unidentified and row not in self.unusable]

    def read(self, rows: Sequence[int]) -> pa.Table:
        """A copy of these rows in their order, a table of `SHARD_SCHEMA`."""
        places = self._places[np.asarray(rows)].tolist()
        return pa.concat_tables(self._tables[number].slice(position, 1) for number, position in places).combine_chunks()


def _find_left_out(tables: Sequence[pa.Table | None], column: str) -> dict[int, JsonValue]:
    """Rows that have a value in a column which explains a missing completion, in order, with the value."""
    parts = [table.select(["row", column]).filter(pc.is_valid(table[column])) for table in tables if table is not None]
    return dict(sorted((row["row"], row[column]) for part in parts for row in part.to_pylist()))


def run_plan(
    plan: Plan,
    engine: Engine,
    make_task: Callable[[int, list[Batch], pa.Table | None], ShardTask],
    store: ShardStore | None,
    options: SignalOptions,
    description: str,
    show_progress: bool | RowProgress,
) -> RunResult:
    """The completions of every row of a plan; those of finished shards are read from disk.

    With a store and several processes (`accelerate launch`) each of the n processes completes every n-th shard; which
    process does it changes nothing in the shard. Without a store each process does all the work. With a store only one
    shard is in memory.

    Args:
        plan (`Plan`): From [`plan_batches`].
        engine (`Engine`): Runs the target. If two processes would not write the same with it, only one may work in the
            store.
        make_task (`Callable`): From the number of a shard, its batches and what was found of it to the shard's task.
        store (`ShardStore`, *optional*): An opened run.
        options (`ResponseOptions` or `ScoreOptions`):
            Say whether rows without a completion that are found on disk are an error, and whether rows whose prompt
            the target did not take are left out, or asked again and then an error.
        description (`str`): Text of the progress bar.
        show_progress (`bool` or `RowProgress`): Whether to show a bar; or the bar of the work that this is part of.

    Raises:
        `ValueError`: Before any work: an earlier call left out rows, and this one may not.
        `UnusablePromptError`: Once all other rows are completed.
        `BlockingIOError`: Before any work: another process is doing it.
        `RuntimeError`: Another process did not write its shards.
    """
    state = accelerate.PartialState()
    rank, world = (state.process_index, state.num_processes) if store is not None else (0, 1)
    folder = None if store is None else store.name
    num_rows = sum(len(rows) for shard in plan for _, rows in shard)
    tables = _read_tables(store, len(plan))
    unidentified = _find_left_out(tables, "unmapped_tokens")
    if unidentified and options.on_unidentified_token == "raise":
        raise ValueError(
            f"`{folder}` was begun with `on_unidentified_token='drop'`: "
            f"{describe_unidentified(unidentified)}. Repeat the call "
            "with that to leave them out, or choose another folder."
        )
    ask_again = options.on_unusable_prompt == "raise"
    if all(not _is_open(table, ask_again) for table in tables):
        return RunResult(tables)
    if store is not None and not engine.is_reproducible and world < int(os.environ.get("WORLD_SIZE", "1")):
        raise ValueError(
            "These processes were launched together and do not know of each other, so each would do all the work, with "
            "other results. Call `accelerate.PartialState(cpu=True)` first, or start one process."
        )
    with nullcontext() if store is None or engine.is_reproducible else alone_in(store.folder):
        tables = _read_tables(store, len(plan))  # another process may have finished in between
        num_done = sum(_count_done(table, ask_again) for table in tables)
        with (
            PartProgress(show_progress)
            if isinstance(show_progress, RowProgress)
            else RowProgress(num_rows, description, show_progress and rank == 0, num_done)
        ) as progress:

            def list_tasks() -> Iterator[ShardTask]:
                for number, shard in enumerate(plan):
                    if not _is_open(tables[number], ask_again):
                        continue
                    if number % world == rank:
                        yield make_task(number, shard, tables[number])
                    else:
                        progress.advance(num_rows=sum(len(rows) for _, rows in shard))

            for task, table in engine.run_tasks(complete_shard, list_tasks(), progress):
                tables[task.number] = table
                if store is not None:
                    store.write(task.number, table)
                    tables[task.number] = store.read(task.number)  # memory-mapped
                elif ask_again:
                    raise_unusable(_find_left_out(tables, "unusable_prompt"), num_rows, None)
        if store is not None and world > 1:
            state.wait_for_everyone()
            store.refresh()
            tables = [table if table is not None else store.read(number) for number, table in enumerate(tables)]
    if missing := [number for number, table in enumerate(tables) if table is None]:
        raise RuntimeError(
            f"Shard {missing[0]} is not whole in `{folder}`: the process that was to write it failed, or "
            "the processes do not share this folder. Repeat the call; finished shards are kept."
        )
    if ask_again:
        raise_unusable(_find_left_out(tables, "unusable_prompt"), num_rows, folder)
    return RunResult(tables)


def _read_tables(store: ShardStore | None, count: int) -> list[pa.Table | None]:
    return [store.read(number) if store is not None else None for number in range(count)]


def _count_done(table: pa.Table | None, ask_again: bool) -> int:
    """Counts the rows of a shard that are done."""
    if table is None:
        return 0
    return table["unusable_prompt"].null_count if ask_again else len(table)


def _is_open(table: pa.Table | None, ask_again: bool) -> bool:
    """Whether a shard has rows left to complete."""
    return table is None or _count_done(table, ask_again) < len(table)
