"""Running an engine over many rows so that nothing is lost: planned batches, shards on disk, several processes."""

from collections.abc import Callable, Sequence

import accelerate
import pyarrow as pa
from tqdm.auto import tqdm

from spec_kd.data.shards import ShardStore
from spec_kd.data.teacher_signal import TeacherInfo, pack_slots
from spec_kd.engines.base import Completion

SHARD_SCHEMA = pa.schema(
    {
        "row": pa.int64(),
        "completion_ids": pa.list_(pa.int32()),
        "finish_reason": pa.string(),
        "teacher_token_logprobs": pa.list_(pa.float32()),
        "teacher_signal": pa.binary(),
    }
)
Plan = list[list[tuple[int, list[int]]]]


def plan_batches(lengths: Sequence[int], batch_size: int, shard_size: int) -> Plan:
    """Shards of numbered batches of row numbers, longest rows first: running out of memory then shows at once."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    per_shard = max(1, shard_size // batch_size)
    return [list(enumerate(batches))[i : i + per_shard] for i in range(0, len(batches), per_shard)]


def run_plan(
    plan: Plan,
    answer: Callable[[list[int], int], list[Completion]],
    store: ShardStore | None,
    info: TeacherInfo | None,
    description: str,
    show_progress: bool,
) -> list[dict]:
    """The completion of every row of a plan, those of shards on disk read from there.

    With a store and several processes (`accelerate launch`) each does every n-th shard; which one does a shard changes
    nothing in it. Without a store each process does all the work.

    Args:
        plan (`Plan`): From [`plan_batches`].
        answer (`Callable`): From row numbers and the number of their batch to their completions.
        store (`ShardStore`, *optional*): An opened run.
        info (`TeacherInfo`, *optional*): How slots are packed, where there are any.
        description (`str`): For the progress bar.
        show_progress (`bool`): Whether to show one.

    Returns:
        `list[dict]`: Rows of `SHARD_SCHEMA`, in the order of `row`.
    """
    state = accelerate.PartialState()
    rank, world = (state.process_index, state.num_processes) if store is not None else (0, 1)
    total = sum(len(rows) for shard in plan for _, rows in shard)
    tables: list[pa.Table | None] = []
    with tqdm(total=total, desc=description, disable=not (show_progress and rank == 0)) as progress:
        for number, shard in enumerate(plan):
            table = store.read(number) if store is not None else None
            if table is None and number % world == rank:
                written = []
                for index, rows in shard:
                    written += zip(rows, answer(rows, index), strict=True)
                    progress.update(len(rows))
                table = _to_table(written, info)
                if store is not None:
                    store.write(number, table)
            else:
                progress.update(sum(len(rows) for _, rows in shard))
            tables.append(table)
    if world > 1:
        state.wait_for_everyone()
    for number, table in enumerate(tables):
        if table is None:
            tables[number] = store.read(number)
            if tables[number] is None:
                raise RuntimeError(
                    f"Shard {number} in `{store.output_dir}` was another process's and is not there: it failed, or the "
                    "processes do not share this folder. Repeat the call; finished shards are kept."
                )
    return sorted((row for table in tables for row in table.to_pylist()), key=lambda row: row["row"])


def _to_table(written: list[tuple[int, Completion]], info: TeacherInfo | None) -> pa.Table:
    rows, completions = [row for row, _ in written], [completion for _, completion in written]
    columns = [
        rows,
        [c.ids for c in completions],
        [c.finish_reason for c in completions],
        [c.token_logprobs for c in completions],
        [None if c.slots is None else pack_slots(c.slots, info) for c in completions],
    ]
    arrays = [pa.array(values, type=field.type) for values, field in zip(columns, SHARD_SCHEMA, strict=True)]
    return pa.table(arrays, schema=SHARD_SCHEMA)
