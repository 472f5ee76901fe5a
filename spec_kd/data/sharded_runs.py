"""Running an engine over many rows so that nothing is lost: planned batches, shards on disk, several processes."""

from collections.abc import Callable, Sequence

import accelerate
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm.auto import tqdm

from spec_kd.data.shards import ShardStore
from spec_kd.data.teacher_signal import TeacherInfo, pack_slots
from spec_kd.data.unmapped import Answer, describe_unmapped
from spec_kd.engines.base import Completion

SHARD_SCHEMA = pa.schema(
    {
        "row": pa.int64(),
        "completion_ids": pa.list_(pa.int32()),
        "finish_reason": pa.string(),
        "teacher_token_logprobs": pa.list_(pa.float32()),
        "teacher_signal": pa.binary(),
        "unmapped_tokens": pa.list_(pa.string()),  # of a row without completion, whose other columns are null
    }
)
Plan = list[list[tuple[int, list[int]]]]


def plan_batches(lengths: Sequence[int], batch_size: int, shard_size: int) -> Plan:
    """Shards of numbered batches of row numbers, longest rows first: running out of memory then shows at once."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches = list(enumerate(order[i : i + batch_size] for i in range(0, len(order), batch_size)))
    per_shard = max(1, shard_size // batch_size)
    return [batches[i : i + per_shard] for i in range(0, len(batches), per_shard)]


class Answers:
    """The answers to all rows of a plan, in any order, wherever their shards are.

    Args:
        tables (`Sequence[pa.Table]`): Of `SHARD_SCHEMA`, in memory or memory-mapped; together each row once.

    Attributes:
        num_rows (`int`): Of the plan.
        unmapped (`dict[int, list[str]]`): Names of tokens without an id by row, of the rows without a completion.
    """

    def __init__(self, tables: Sequence[pa.Table]):
        self._tables = tables
        self.num_rows = sum(map(len, tables))
        self.unmapped = find_unmapped(tables)
        self._places = np.empty((self.num_rows, 2), dtype=np.int64)  # number of the shard, position in it
        for number, table in enumerate(tables):
            rows = table["row"].to_numpy()
            self._places[rows, 0], self._places[rows, 1] = number, np.arange(len(rows))

    def read(self, rows: Sequence[int]) -> pa.Table:
        """A copy of these rows, in their order, of `SHARD_SCHEMA`."""
        places = self._places[np.asarray(rows)].tolist()
        return pa.concat_tables(self._tables[number].slice(position, 1) for number, position in places).combine_chunks()


def find_unmapped(tables: Sequence[pa.Table | None]) -> dict[int, list[str]]:
    """Rows without a completion, in order, and the tokens that are to blame."""
    found = {}
    for table in tables:
        if table is not None and table["unmapped_tokens"].null_count < len(table):
            lost = table.filter(pc.is_valid(table["unmapped_tokens"]))
            found.update(zip(lost["row"].to_pylist(), lost["unmapped_tokens"].to_pylist(), strict=True))
    return dict(sorted(found.items()))


def run_plan(
    plan: Plan,
    answer: Callable[[list[int], int], list[Answer]],
    store: ShardStore | None,
    info: TeacherInfo | None,
    description: str,
    *,
    on_unmapped: str,
    show_progress: bool,
) -> Answers:
    """The answers to every row of a plan, those of shards on disk read from there.

    With a store and several processes (`accelerate launch`) each does every n-th shard; which one does a shard changes
    nothing in it. Without a store each process does all the work. No more than one shard is in memory, with a store.

    Args:
        plan (`Plan`): From [`plan_batches`].
        answer (`Callable`): From row numbers and the number of their batch to their answers.
        store (`ShardStore`, *optional*): An opened run.
        info (`TeacherInfo`, *optional*): How slots are packed, where there are any.
        description (`str`): For the progress bar.
        on_unmapped (`str`): Whether rows without a completion, found on disk, are an error (`"raise"`).
        show_progress (`bool`): Whether to show the bar.

    Raises:
        `ValueError`: Before any work, for rows on disk that an earlier call left out and this one does not want to.
        `RuntimeError`: Another process did not write its shards.
    """
    state = accelerate.PartialState()
    rank, world = (state.process_index, state.num_processes) if store is not None else (0, 1)
    tables = [store.read(number) if store is not None else None for number in range(len(plan))]
    unmapped = find_unmapped(tables)
    if unmapped and on_unmapped == "raise":
        raise ValueError(
            f"`{store.output_dir}` was begun with `on_unmapped='drop'`: {describe_unmapped(unmapped)}. Repeat the call "
            "with that to leave them out, or choose another folder."
        )
    total = sum(len(rows) for shard in plan for _, rows in shard)
    with tqdm(total=total, desc=description, disable=not (show_progress and rank == 0)) as progress:
        for number, shard in enumerate(plan):
            if tables[number] is not None or number % world != rank:
                progress.update(sum(len(rows) for _, rows in shard))
                continue
            written = []
            for index, rows in shard:
                written += zip(rows, answer(rows, index), strict=True)
                progress.update(len(rows))
            tables[number] = _to_table(written, info)
            if store is not None:
                store.write(number, tables[number])
                tables[number] = store.read(number)  # memory-mapped
    if world > 1:
        state.wait_for_everyone()
    for number, table in enumerate(tables):
        if table is None:
            tables[number] = store.read(number)
            if tables[number] is None:
                raise RuntimeError(
                    f"Shard {number} is not whole in `{store.output_dir}`: the process that was to write it failed, or "
                    "the processes do not share this folder. Repeat the call; finished shards are kept."
                )
    return Answers(tables)


def _to_table(written: list[tuple[int, Answer]], info: TeacherInfo | None) -> pa.Table:
    rows, answers = zip(*written, strict=True)
    completions = [answer if isinstance(answer, Completion) else None for answer in answers]
    columns = [
        rows,
        [c and c.ids for c in completions],
        [c and c.finish_reason for c in completions],
        [c and c.token_logprobs for c in completions],
        [c and c.slots and pack_slots(c.slots, info) for c in completions],
        [None if isinstance(answer, Completion) else answer for answer in answers],
    ]
    arrays = [pa.array(values, type=field.type) for values, field in zip(columns, SHARD_SCHEMA, strict=True)]
    return pa.table(arrays, schema=SHARD_SCHEMA)
