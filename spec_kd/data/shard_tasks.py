"""The work of one shard: what its table depends on besides the engine, and how it is made.

A task and its table can be pickled, so that an engine may do the work in another process, or on another machine.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import cast

import pyarrow as pa

from spec_kd.data.outcomes import Outcome, complete_batch
from spec_kd.data.response_options import ResponseOptions, ScoreOptions
from spec_kd.data.teacher_signal import TeacherInfo, pack_sparse
from spec_kd.engines.base import Completion, Engine
from spec_kd.losses import SignalSpec
from spec_kd.open_types import JsonObject
from spec_kd.progress import RowProgress
from spec_kd.sampling.prompts import PromptBatch

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
Batch = tuple[int, list[int]]
"""Number of a batch in its run, and its rows."""
Tell = Callable[[int, int], None]
"""Told of finished tokens and completions, as `on_progress` of `PromptBatch`."""


@dataclass(frozen=True)
class ShardTask:
    """What the table of a shard depends on, besides the engine.

    Args:
        number (`int`): Number of the shard.
        batches (`list[Batch]`): Its batches, each of which has a seed of its own.
        prompts (`Mapping[int, list[int]]`): Ids of each prompt, by row.
        completions (`Mapping[int, list[int]]`): Ids of each completion, by row, if they are scored; else empty.
        options (`ResponseOptions` or `ScoreOptions`): Options of the run.
        vocab_size (`int`): Number of real ids.
        info (`TeacherInfo`, *optional*): How the signal is packed, if there is one.
        unusable (`Mapping[int, str]`): Reasons why the target cannot take a prompt, by row, as far as they are known.
        found (`pa.Table`, *optional*): Table that the shard has already, with rows that have to be asked again.
    """

    number: int
    batches: list[Batch]
    prompts: Mapping[int, list[int]]
    completions: Mapping[int, list[int]]
    options: ResponseOptions | ScoreOptions
    vocab_size: int
    info: TeacherInfo | None
    unusable: Mapping[int, str]
    found: pa.Table | None


def complete_shard(engine: Engine, task: ShardTask, progress: RowProgress) -> pa.Table:
    """Completes or scores the rows of a shard; rows that its table has already are taken from there.

    Returns:
        `pa.Table` of `SHARD_SCHEMA`.
    """
    rows_of_table = [] if task.found is None else task.found.to_pylist()
    found: dict[int, Outcome | JsonObject] = {
        row["row"]: row for row in rows_of_table if row["unusable_prompt"] is None
    }
    written = list(found.items())
    for index, rows in task.batches:
        if open_rows := [row for row in rows if row not in found]:
            with progress.batch(len(open_rows)) as tell:
                written += zip(open_rows, _complete_batch(engine, task, open_rows, index, tell), strict=True)
    return _to_table(written, task.info)


def _complete_batch(engine: Engine, task: ShardTask, batch: list[int], index: int, tell: Tell) -> list[Outcome]:
    """An outcome for each row of a batch, some of which may be known to be unusable."""
    rows = [row for row in batch if row not in task.unusable]
    run = partial(_run_engine, engine, task, rows, f"{task.options.seed}:{index}", tell)
    outcomes = iter(complete_batch(run, rows, task.vocab_size, task.options.on_unidentified_token) if rows else ())
    return [task.unusable[row] if row in task.unusable else next(outcomes) for row in batch]


def _run_engine(engine: Engine, task: ShardTask, rows: list[int], seed: str, tell: Tell) -> list[Completion]:
    prompts, options = PromptBatch([task.prompts[row] for row in rows], rows, tell), task.options
    if isinstance(options, ResponseOptions):
        return engine.generate(prompts, options, options.signal, seed)
    signal = cast(SignalSpec, options.signal)  # `ScoreOptions` refuses None
    return engine.score(prompts, [task.completions[row] for row in rows], signal, seed)


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
