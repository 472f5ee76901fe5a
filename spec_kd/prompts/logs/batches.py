"""Batches of requests, whose responses stand in another file, joined by `custom_id`."""

import json
import sqlite3
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from spec_kd.open_types import JsonValue, Record
from spec_kd.prompts.logs.files import read_records

NUM_LOOKED_AT = 5
REQUEST_KEYS, RESPONSE_KEYS = ("body", "params"), ("response", "result")


def is_batch_request(record: JsonValue) -> bool:
    """Whether a record is a line of a batch's input file: OpenAI's (also `vllm run-batch`'s) or Anthropic's."""
    return _has(record, REQUEST_KEYS) and not _has(record, RESPONSE_KEYS)


def is_batch_output(record: JsonValue) -> bool:
    """Whether a record is a line of a batch's output file, without the request."""
    return (_has(record, RESPONSE_KEYS) or _has(record, ("error",))) and not _has(record, REQUEST_KEYS)


def _has(record: JsonValue, keys: Iterable[str]) -> bool:
    return isinstance(record, dict) and "custom_id" in record and any(record.get(key) for key in keys)


class BatchOutputs:
    """The responses of batches, kept on disk until they are joined with their requests.

    If two batches have the same id (`request-1`), it does not say which response belongs to which request: these
    requests get no response.

    Args:
        path (`Path`): Place for the database, which is removed at the end.
    """

    def __init__(self, path: Path):
        self._path = path
        path.unlink(missing_ok=True)
        self._database = sqlite3.connect(path, isolation_level=None)
        self._database.executescript(
            "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; CREATE TABLE responses "
            "(id TEXT PRIMARY KEY, text TEXT, responses INTEGER, requests INTEGER) WITHOUT ROWID; BEGIN"
        )

    @classmethod
    def collect(cls, files: Iterable[Path], path: Path) -> "BatchOutputs | None":
        """Reads the batches among files; `None` if there are none.

        Args:
            files (`Iterable[Path]`): Files of a log; the first records of each decide whether it is of a batch.
            path (`Path`): Place for the database.
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
            "INSERT INTO responses VALUES (?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET text = coalesce(text, ?),"
            " responses = responses + ?, requests = requests + ?",
            (str(name), text, *counts, text, *counts),
        )

    def join(self, record: JsonValue) -> tuple[JsonValue, str | None]:
        """A record, with its response if it is the request of a batch, and a note to count or `None`."""
        if not is_batch_request(record):
            return record, None
        row = self._database.execute(
            "SELECT text, responses, requests FROM responses WHERE id = ?", (str(record["custom_id"]),)
        ).fetchone()
        if row is None or row[0] is None:
            return record, "requests of batches without a response in the files"
        text, responses, requests = row
        if responses > 1 or requests > 1:
            return record, "completions not kept, several batches have the same `custom_id`: read each batch alone"
        return {**record, **json.loads(text)}, None

    def has_request(self, record: Record) -> bool:
        """Whether the request of a response is in the files."""
        row = self._database.execute(
            "SELECT requests FROM responses WHERE id = ?", (str(record["custom_id"]),)
        ).fetchone()
        return row is not None and row[0] > 0

    def close(self) -> None:
        """Removes the database."""
        self._database.close()
        self._path.unlink(missing_ok=True)
