"""Writes the prompts of a log in batches, and puts them in their place when all are written."""

import json
import logging
import os
import shutil
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, Json, List, Value

from spec_kd.addresses import check_writable, name_place
from spec_kd.copies import open_folder
from spec_kd.files import compute_sum, explain_full_disk, is_intact, move, remove, sweep, write_text
from spec_kd.open_types import Array, JsonObject
from spec_kd.prompts.logs.conversations import ConversationLinks
from spec_kd.prompts.logs.prompt_filter import LoggedPrompt
from spec_kd.stored_sets import find_own_sum

# Messages are JSON items: each keeps its own keys, in the order in which chat templates print them.
FEATURES = Features(
    {
        "prompt": List(Json()),
        "tools": Value("string"),
        "completion": List(Json()),
        "scenario": Value("string"),
        "source": Value("string"),
        "conversation_id": Value("string"),
    }
)
ROWS_AT_A_TIME = 1024
# Of a batch in a file of the result. Each batch that is mapped takes a hundred kilobytes, so there must not be many.
ROWS_OF_BATCH, BYTES_OF_BATCH = 16 * ROWS_AT_A_TIME, 2**25
PARTIAL_FOLDER = ".partial"
KEPT, REPORT = "kept.arrow", "report.json"
SPLIT_FILES = ("train.arrow", "test.arrow")

logger = logging.getLogger(__name__)


class PromptStore:
    """`train.arrow`, `test.arrow` and `report.json` in a folder; unfinished files are in `.partial` there.

    Args:
        output_dir (`str`): The folder or its address; created when something is written.

    Attributes:
        output_dir (`Path`): The folder; of an address its copy on this machine.
        partial (`Path`): Folder for unfinished files.
        links (`ConversationLinks`): The conversations of the prompts written.
        timestamps (`array` of `"d"`): Times of the prompts written, in seconds since 1970; NaN if unknown.
        num_completions (`int`): Number of prompts written with a completion.
    """

    def __init__(self, output_dir: str):
        self.output_dir = open_folder(output_dir, *SPLIT_FILES, ".*", REPORT)
        self.partial = self.output_dir / PARTIAL_FOLDER
        self.links, self.timestamps = ConversationLinks(), array("d")
        self.num_completions = self._num_tools = 0

    def check_place(self) -> None:
        """Raises `ValueError` if a file of something else is in the way, `OSError` if its address takes no files."""
        check_writable(self.output_dir)
        if self.output_dir.exists() and not self.output_dir.is_dir():
            raise ValueError(f"`output_dir` is `{self.output_dir}`, which is a file. Give a folder.")
        # If a run was killed while it moved its files to their place, its report is still in `.partial`.
        if self._read_manifest() is not None or (self.partial / REPORT).exists():
            return
        for name in (*SPLIT_FILES, REPORT):
            path = self.output_dir / name
            if path.exists() and not find_own_sum(path).exists():
                raise ValueError(
                    f"`{name_place(path)}` is there already, and `load_query_logs` did not write it. Give another "
                    "`output_dir`, or move the file away."
                )

    def read_finished(self, fingerprint: JsonObject) -> JsonObject | None:
        """The report, if the folder has the complete result of this fingerprint; otherwise `None`."""
        manifest = self._read_manifest()
        if manifest is None or manifest["fingerprint"] != fingerprint:
            return None
        paths = [self.output_dir / name for name in SPLIT_FILES]
        if any(find_own_sum(path).exists() and not is_intact(path, find_own_sum(path)) for path in paths):
            name = name_place(self.output_dir)
            logger.warning("The prompts in `%s` are not as they were written; they are read again.", name)
            return None
        shutil.rmtree(self.partial, ignore_errors=True)  # left by a run that was killed between its last two steps
        return manifest["report"]

    def open_splits(self) -> tuple[Dataset, Dataset]:
        """The prompts for training and for testing, memory-mapped."""
        train, test = (Dataset.from_file(str(self.output_dir / name)) for name in SPLIT_FILES)
        return train, test

    def _read_manifest(self) -> JsonObject | None:
        try:
            manifest = json.loads((self.output_dir / REPORT).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return manifest if isinstance(manifest, dict) and {"fingerprint", "report"} <= set(manifest) else None

    def clear(self) -> None:
        """Removes what a killed run left, and makes a place for unfinished files."""
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        sweep(self.output_dir)

    def write(self, prompts: Iterator[LoggedPrompt]) -> None:
        """Writes all prompts to one file, and removes what a killed run left. Without a prompt nothing is left."""
        self.clear()
        with open_writer(self.partial / KEPT, FEATURES.arrow_schema) as writer:
            while rows := list(islice(prompts, ROWS_AT_A_TIME)):
                for row in rows:
                    self.links.add(row.conversation, row.call.prompt)
                self.timestamps.extend(np.nan if row.call.timestamp is None else row.call.timestamp for row in rows)
                self.num_completions += sum(row.completion is not None for row in rows)
                self._num_tools += sum(row.tools is not None for row in rows)
                writer.write_batch(to_batch(rows))

        if not self.timestamps:
            shutil.rmtree(self.partial)

    def split(self, is_test: Array, joined: Array) -> None:
        """Writes the prompts to the two files of the split. Optional columns that no prompt has are left out.

        Prompts of conversations that were joined get the `conversation_id` of the first prompt.

        Args:
            is_test (`np.ndarray`): bool, `(N,)`, whether each prompt is for testing.
            joined (`np.ndarray`): int64, `(N,)`, for each prompt the first one of its conversation.
        """
        # Not memory-mapped: the pages of the whole file would count as memory of this process.
        with pa.OSFile(str(self.partial / KEPT)) as file:
            self.write_splits(pa.ipc.open_stream(file), is_test, joined, self.links.numbers, self._num_tools > 0)
        (self.partial / KEPT).unlink()

    def write_splits(
        self, batches: Iterable[pa.RecordBatch], is_test: Array, joined: Array, numbers: Array, has_tools: bool
    ) -> None:
        """Writes batches of prompts as [`split`] does.

        Args:
            batches (`Iterable[pa.RecordBatch]`): All prompts, in order.
            is_test (`np.ndarray`), joined (`np.ndarray`): As for [`split`].
            numbers (`np.ndarray`): uint64, `(N,)`, the numbers of their conversations before these were joined.
            has_tools (`bool`): Whether any prompt has tools.
        """
        has = {"tools": has_tools, "completion": self.num_completions}
        columns = [name for name in FEATURES if has.get(name, True)]
        schema = Features({name: FEATURES[name] for name in columns}).arrow_schema
        train_path, test_path = (self.partial / name for name in SPLIT_FILES)
        names: dict[int, str] = {}
        is_first_of_several = np.zeros(len(joined), dtype=bool)
        is_first_of_several[joined[numbers != numbers[joined]]] = True
        start = 0
        with _SplitWriter(train_path, schema) as train, _SplitWriter(test_path, schema) as test:
            for batch in batches:
                end = start + len(batch)
                chosen = is_test[start:end]
                values = {name: batch.column(name) for name in columns}
                ids = values["conversation_id"].to_pylist()
                for row in np.flatnonzero(is_first_of_several[joined[start:end]]):
                    ids[row] = names.setdefault(int(joined[start + row]), ids[row])
                values["conversation_id"] = pa.array(ids, pa.string())
                start = end
                batch = pa.RecordBatch.from_arrays(list(values.values()), schema=schema)
                train.write(batch.filter(pa.array(~chosen)))
                test.write(batch.filter(pa.array(chosen)))

    def finish(self, fingerprint: JsonObject, report: JsonObject) -> None:
        """Moves the files to their place; the report comes last and shows that the others are complete."""
        manifest = json.dumps({"fingerprint": fingerprint, "report": report}, indent=2, ensure_ascii=False)
        (self.partial / REPORT).write_text(manifest, encoding="utf-8")
        for path in self.partial.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        sums = {name: compute_sum(self.partial / name) for name in SPLIT_FILES}
        # From here on the files are this class's, and not complete, also for a machine without `.partial`.
        write_text(self.output_dir / REPORT, json.dumps({"fingerprint": None, "report": None}))
        for name, digest in sums.items():
            remove(find_own_sum(self.output_dir / name))
            move(self.partial / name, self.output_dir / name)
            write_text(find_own_sum(self.output_dir / name), digest)
        move(self.partial / REPORT, self.output_dir / REPORT)
        shutil.rmtree(self.partial)


class _SplitWriter:
    """Writes a file of the result in large batches.

    Args:
        path (`Path`): The file.
        schema (`pa.Schema`): Schema of all batches.
    """

    def __init__(self, path: Path, schema: pa.Schema):
        self._path, self._schema = path, schema
        self._waiting: list[pa.RecordBatch] = []

    def __enter__(self) -> "_SplitWriter":
        self._stream = open_writer(self._path, self._schema)
        self._writer = self._stream.__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:  # type: ignore[explicit-any]  # Python calls it
        if kind is None:
            self._flush()
        self._stream.__exit__(kind, error, trace)

    def write(self, batch: pa.RecordBatch) -> None:
        """Takes a batch, which may be empty."""
        self._waiting += [batch] if len(batch) else []
        rows, size = sum(map(len, self._waiting)), sum(one.nbytes for one in self._waiting)
        if rows >= ROWS_OF_BATCH or size >= BYTES_OF_BATCH:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            table = pa.Table.from_batches(self._waiting).combine_chunks()
            self._writer.write_table(table)
        self._waiting = []


def to_batch(rows: list[LoggedPrompt]) -> pa.RecordBatch:
    """Prompts with all columns, also those that no prompt has."""
    columns = {
        "prompt": _to_json_lists([row.messages for row in rows]),
        "tools": pa.array([row.tools for row in rows], pa.string()),
        "completion": _to_json_lists([None if row.completion is None else [row.completion] for row in rows]),
        "scenario": pa.array(["historical"] * len(rows)),
        "source": pa.array([row.source for row in rows]),
        "conversation_id": pa.array([row.call.conversation_id or f"{row.conversation:016x}" for row in rows]),
    }
    return pa.RecordBatch.from_arrays(list(columns.values()), schema=FEATURES.arrow_schema)


def _to_json_lists(texts: list[list[str] | None]) -> pa.Array:
    lists = pa.array(texts, pa.list_(pa.string()))
    type = FEATURES.arrow_schema.field("prompt").type
    items = pa.ExtensionArray.from_storage(type.value_type, lists.values)
    return pa.ListArray.from_arrays(lists.offsets, items, type=type, mask=lists.is_null())


@contextmanager
def open_writer(path: Path, schema: pa.Schema, compression: str | None = None) -> Iterator[pa.RecordBatchStreamWriter]:
    """A new Arrow stream in a file."""
    with (
        explain_full_disk(path),
        pa.OSFile(str(path), "wb") as file,
        pa.ipc.new_stream(file, schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer,
    ):
        yield writer
