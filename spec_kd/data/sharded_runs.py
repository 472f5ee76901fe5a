"""Runs an engine over many rows so that nothing is lost: planned batches, shards on disk, several processes."""

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import accelerate
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from spec_kd.data.outcomes import Outcome, describe_unidentified, raise_unusable
from spec_kd.data.response_options import SignalOptions
from spec_kd.data.shards import ShardStore
from spec_kd.data.teacher_signal import TeacherInfo, pack_sparse
from spec_kd.engines.base import Completion
from spec_kd.files import alone_in
from spec_kd.open_types import JsonObject, JsonValue
from spec_kd.progress import PartProgress, RowProgress

SHARD_SCHEMA = pa.schema(
    {
        "row": pa.int64(),
        "completion_ids": pa.list_(pa.int32()),
        "finish_reason": pa.string(),
        "teacher_token_logprobs": pa.list_(pa.float32()),
        "teacher_signal": pa.binary(),
        # A row without a completion has one of these two, and nulls in the columns above.
        "unmapped_tokens": pa.list_(pa.string()),
        "unusable_prompt": pa.string(),
    }
)
Plan = list[list[tuple[int, list[int]]]]
Tell = Callable[[int, int], None]
"""Told of finished tokens and completions, as `on_progress` of `PromptBatch`."""


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
    complete: Callable[[list[int], int, Tell], list[Outcome]],
    store: ShardStore | None,
    info: TeacherInfo | None,
    options: SignalOptions,
    description: str,
    is_reproducible: bool,
    show_progress: bool | RowProgress,
) -> RunResult:
    """The completions of every row of a plan; those of finished shards are read from disk.

    With a store and several processes (`accelerate launch`) each of the n processes completes every n-th shard; which
    process does it changes nothing in the shard. Without a store each process does all the work. With a store only one
    shard is in memory.

    Args:
        plan (`Plan`): From [`plan_batches`].
        complete (`Callable`): From the rows of a batch, its number and a function to tell of progress, to an outcome of
            each row.
        store (`ShardStore`, *optional*): An opened run.
        info (`TeacherInfo`, *optional*): How the signal is packed, if there is one.
        options (`ResponseOptions` or `ScoreOptions`):
            Say whether rows without a completion that are found on disk are an error, and whether rows whose prompt
            the target did not take are left out, or asked again and then an error.
        description (`str`): Text of the progress bar.
        is_reproducible (`bool`):
            Whether two processes would write the same; if not, only one may work in the store.
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
    if store is not None and not is_reproducible and world < int(os.environ.get("WORLD_SIZE", "1")):
        raise ValueError(
            "These processes were launched together and do not know of each other, so each would do all the work, with "
            "other results. Call `accelerate.PartialState(cpu=True)` first, or start one process."
        )
    with nullcontext() if store is None or is_reproducible else alone_in(store.folder):
        tables = _read_tables(store, len(plan))  # another process may have finished in between
        num_done = sum(_count_done(table, ask_again) for table in tables)
        with (
            PartProgress(show_progress)
            if isinstance(show_progress, RowProgress)
            else RowProgress(num_rows, description, show_progress and rank == 0, num_done)
        ) as progress:
            for number, shard in enumerate(plan):
                if not _is_open(tables[number], ask_again):
                    continue
                if number % world != rank:
                    progress.advance(num_rows=sum(len(rows) for _, rows in shard))
                    continue
                tables[number] = _to_table(_complete_shard(shard, tables[number], complete, progress), info)
                if store is not None:
                    store.write(number, tables[number])
                    tables[number] = store.read(number)  # memory-mapped
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


def _complete_shard(
    shard: list[tuple[int, list[int]]],
    table: pa.Table | None,
    complete: Callable[[list[int], int, Tell], list[Outcome]],
    progress: RowProgress,
) -> list[tuple[int, Outcome | JsonObject]]:
    """The rows of a shard with their outcomes; rows that its table has already are taken from there."""
    rows_of_table = [] if table is None else table.to_pylist()
    found: dict[int, Outcome | JsonObject] = {
        row["row"]: row for row in rows_of_table if row["unusable_prompt"] is None
    }
    written = list(found.items())
    for index, rows in shard:
        if open_rows := [row for row in rows if row not in found]:
            with progress.batch(len(open_rows)) as tell:
                written += zip(open_rows, complete(open_rows, index, tell), strict=True)
    return written


def _to_table(written: list[tuple[int, Outcome | JsonObject]], info: TeacherInfo | None) -> pa.Table:
    found = [outcome for _, outcome in written if isinstance(outcome, dict)]
    rows, outcomes = zip(*(pair for pair in written if not isinstance(pair[1], dict)), strict=True)
    completions = [outcome if isinstance(outcome, Completion) else None for outcome in outcomes]
    columns = [
        rows,
        [c and c.ids for c in completions],
        [c and c.finish_reason for c in completions],
        [c and c.token_logprobs for c in completions],
        [c and c.sparse and info and pack_sparse(c.sparse, info) for c in completions],
        [outcome if isinstance(outcome, list) else None for outcome in outcomes],
        [outcome if isinstance(outcome, str) else None for outcome in outcomes],
    ]
    table = pa.Table.from_pydict(dict(zip(SHARD_SCHEMA.names, columns, strict=True)), schema=SHARD_SCHEMA)
    return pa.concat_tables([pa.Table.from_pylist(found, SHARD_SCHEMA), table]) if found else table
