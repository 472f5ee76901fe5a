"""Batches of requests, whose answers are in a file of their own, joined by `custom_id`."""

import json
import sqlite3
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from spec_kd.open_types import JsonValue, Record
from spec_kd.prompts.logs.files import read_records

NUM_LOOKED_AT = 5
REQUEST_KEYS, ANSWER_KEYS = ("body", "params"), ("response", "result")


def is_batch_request(record: JsonValue) -> bool:
    """Whether a record is a line of the input of a batch: OpenAI's (also `vllm run-batch`'s) or Anthropic's."""
    return _has(record, REQUEST_KEYS) and not _has(record, ANSWER_KEYS)


def is_batch_output(record: JsonValue) -> bool:
    """Whether a record is a line of what a batch came back with, without the request."""
    return (_has(record, ANSWER_KEYS) or _has(record, ("error",))) and not _has(record, REQUEST_KEYS)


def _has(record: JsonValue, keys: Iterable[str]) -> bool:
    return isinstance(record, dict) and "custom_id" in record and any(record.get(key) for key in keys)


class BatchOutputs:
    """The answers of batches, on disk, to be given to their requests.

    An id that two batches have (`request-1`) does not say which answer belongs to which request: its requests keep
    none.

    Args:
        path (`Path`): For the database, which is removed at the end.
    """

    def __init__(self, path: Path):
        self._path = path
        path.unlink(missing_ok=True)
        self._database = sqlite3.connect(path, isolation_level=None)
        self._database.executescript(
            "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; CREATE TABLE answers "
            "(id TEXT PRIMARY KEY, text TEXT, answers INTEGER, requests INTEGER) WITHOUT ROWID; BEGIN"
        )

    @classmethod
    def collect(cls, files: Iterable[Path], path: Path) -> "BatchOutputs | None":
        """Reads the batches among files; `None` if there are none.

        Args:
            files (`Iterable[Path]`): The first records of each are looked at.
            path (`Path`): As of the class.
        """
        batches = None
        for file in files:
            first = [record for _, record in islice(read_records(file), NUM_LOOKED_AT)]
            if not any(is_batch_output(record) or is_batch_request(record) for record in first):
                continue
            batches = batches or cls(path)
            for _, record in read_records(file):
                if is_batch_output(record):
                    batches._add(record["custom_id"], record)
                elif is_batch_request(record):
                    batches._add(record["custom_id"], None)
        return batches

    def _add(self, name: JsonValue, record: Record | None) -> None:
        text = None if record is None else json.dumps({k: v for k, v in record.items() if k not in ("id", "custom_id")})
        counts = (int(record is not None), int(record is None))
        self._database.execute(
            "INSERT INTO answers VALUES (?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET text = coalesce(text, ?),"
            " answers = answers + ?, requests = requests + ?",
            (str(name), text, *counts, text, *counts),
        )

    def join(self, record: JsonValue) -> tuple[JsonValue, str | None]:
        """A record with its answer if it is the request of a batch, and what to count of it."""
        if not is_batch_request(record):
            return record, None
        row = self._database.execute(
            "SELECT text, answers, requests FROM answers WHERE id = ?", (str(record["custom_id"]),)
        ).fetchone()
        if row is None or row[0] is None:
            return record, "requests of batches without an answer in the files"
        text, answers, requests = row
        if answers > 1 or requests > 1:
            return record, "answers not kept, a `custom_id` that several batches have: read each batch alone"
        return {**record, **json.loads(text)}, None

    def has_request(self, record: Record) -> bool:
        """Whether the request of an answer is in the files."""
        row = self._database.execute(
            "SELECT requests FROM answers WHERE id = ?", (str(record["custom_id"]),)
        ).fetchone()
        return row is not None and row[0] > 0

    def close(self) -> None:
        """Removes the database."""
        self._database.close()
        self._path.unlink(missing_ok=True)
