"""Makes the dataset of a run, a slice of rows at a time, so that it need not fit into memory."""

from collections.abc import Callable, Iterator, Sequence

import accelerate
import pyarrow as pa
from datasets import Dataset, Features, List, Value

from spec_kd.data.sharded_runs import RunResult
from spec_kd.data.shards import IdLists, ShardStore
from spec_kd.data.signal_checks import CHECKSUM_COLUMN, compute_checksum
from spec_kd.data.teacher_signal import TeacherInfo
from spec_kd.open_types import JsonObject, Record
from spec_kd.vocabulary import ProcessingClass, get_tokenizer

ROWS_AT_A_TIME = 1024
TEACHER_FEATURES = {
    "teacher_token_logprobs": List(Value("float32")),
    "teacher_signal": Value("binary"),
    "teacher_info": Value("string"),
    CHECKSUM_COLUMN: List(Value("int64")),
}


def add_columns(
    dataset: Dataset,
    features: JsonObject,
    build: Callable[[Sequence[int], pa.Table], Record],
    result: RunResult,
    store: ShardStore | None,
) -> Dataset:
    """The rows of a dataset that have a completion, in order, with new columns made of the run's result.

    Args:
        dataset (`Dataset`): One row for each row of the run; may have no columns.
        features (`dict`): Features of the new columns.
        build (`Callable`): Makes the new columns of some rows, lists or Arrow arrays by name, from the numbers of the
            rows and their part of the result.
        result (`RunResult`): Outcomes of all rows.
        store (`ShardStore`, *optional*): Where the dataset is written.

    Returns:
        `Dataset`: In memory; with a store memory-mapped, and `ROWS_AT_A_TIME` rows are in memory while it is written.
    """
    schema = Features({**dataset.features, **features}).arrow_schema
    kept = dataset.with_format("arrow")
    rows = result.rows

    def build_parts() -> Iterator[pa.Table]:
        for start in range(0, len(rows), ROWS_AT_A_TIME):
            part = rows[start : start + ROWS_AT_A_TIME]
            columns = dict(build(part, result.read(part)))
            if dataset.column_names:
                table = kept[part]
                columns |= {name: table[name] for name in table.column_names}
            yield pa.Table.from_pydict(columns, schema=schema).combine_chunks()

    if store is None:
        return Dataset(pa.concat_tables(build_parts()))
    state = accelerate.PartialState()
    if state.is_main_process:
        store.finish(build_parts(), schema)
    state.wait_for_everyone()
    return Dataset.from_file(str(store.mapped))


def add_responses(
    dataset: Dataset,
    prompt_ids: IdLists,
    result: RunResult,
    processing_class: ProcessingClass,
    info: TeacherInfo | None,
    store: ShardStore | None,
) -> Dataset:
    """The prompts with their completions; columns of the same names and teacher columns are replaced.

    Args:
        dataset (`Dataset`): The prompts as the user gave them.
        prompt_ids (`IdLists`): The rendered prompts.
        result (`RunResult`): Outcomes of all rows.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`): The target's.
        info (`TeacherInfo`, *optional*): Description of the teacher columns, if there is a signal.
        store (`ShardStore`, *optional*): As for [`add_columns`].
    """
    tokenizer = get_tokenizer(processing_class)
    has_prompt = "prompt" in dataset.column_names
    is_chat = has_prompt and not isinstance(dataset[0]["prompt"], str)
    text, ids = Value("string"), List(Value("int32"))
    features = {
        **({} if has_prompt else {"prompt": text}),
        "completion": List({"role": text, "content": text}) if is_chat else text,
        "prompt_ids": ids,
        "completion_ids": ids,
        "finish_reason": text,
        **_list_teacher_features(info),
    }

    def build(rows: Sequence[int], found: pa.Table) -> JsonObject:
        prompts = [prompt_ids[row] for row in rows]
        completions = tokenizer.batch_decode(
            found["completion_ids"].to_pylist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return {
            **({} if has_prompt else {"prompt": tokenizer.batch_decode(prompts, clean_up_tokenization_spaces=False)}),
            "completion": [[{"role": "assistant", "content": c}] for c in completions] if is_chat else completions,
            "prompt_ids": prompts,
            "completion_ids": found["completion_ids"],
            "finish_reason": found["finish_reason"],
            **_build_teacher_columns(found, info, prompts, found["completion_ids"].to_pylist()),
        }

    replaced = {*features, *TEACHER_FEATURES} & {*dataset.column_names}
    return add_columns(dataset.remove_columns(list(replaced)), features, build, result, store)


def add_signal(dataset: Dataset, result: RunResult, info: TeacherInfo, store: ShardStore | None) -> Dataset:
    """The rows with teacher columns, which replace any that they had."""
    kept = dataset.remove_columns([name for name in TEACHER_FEATURES if name in dataset.column_names])
    id_rows = dataset.select_columns(["prompt_ids", "completion_ids"]).with_format(None)

    def build(rows: Sequence[int], found: pa.Table) -> JsonObject:
        ids = id_rows[rows]
        return _build_teacher_columns(found, info, ids["prompt_ids"], ids["completion_ids"])

    return add_columns(kept, _list_teacher_features(info), build, result, store)


def _list_teacher_features(info: TeacherInfo | None) -> JsonObject:
    if info is None:
        return {}
    keeps_ids = info.sparse_method.keeps_ids
    return {name: feature for name, feature in TEACHER_FEATURES.items() if keeps_ids or name != "teacher_signal"}


def _build_teacher_columns(
    found: pa.Table,
    info: TeacherInfo | None,
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
) -> JsonObject:
    if info is None:
        return {}
    columns = {name: found[name] for name in _list_teacher_features(info) if name in found.column_names}
    no_value = pa.nulls(len(found))
    parts = [columns.get(name, no_value).to_pylist() for name in ("teacher_token_logprobs", "teacher_signal")]
    checksums = map(compute_checksum, prompt_ids, completion_ids, *parts)
    return columns | {"teacher_info": [info.to_json()] * len(found), CHECKSUM_COLUMN: list(checksums)}
