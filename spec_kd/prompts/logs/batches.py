"""Batches of requests, whose responses stand in another file, joined by `custom_id`."""

import json
import sqlite3
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from spec_kd.open_types import JsonValue, Record
from spec_kd.prompts.logs.files import read_records
from spec_kd.prompts.logs.text_decoding import LogPath

NUM_LOOKED_AT = 5
REQUEST_KEYS, RESPONSE_KEYS = ("body", "params"), ("response", "result")


def is_batch_request(record: JsonValue) -> bool:
    """Whether a record is a line of a batch's input file: OpenAI's (also `vllm run-batch`'s) or Anthropic's."""
    return _has(record, REQUEST_KEYS) and not _has(record, RESPONSE_KEYS)


def is_batch_output(record: JsonValue) -> bool:
    """Whether a record is a line of a batch's output file, without the request."""
    return (_has(record, RESPONSE_KEYS) or _has(record, ("error",))) and not _has(record, REQUEST_KEYS)


def holds_batch(file: LogPath) -> bool:
    """Whether a file is of a batch, by its first records."""
    first = [record for _, record in islice(read_records(file), NUM_LOOKED_AT)]
    return any(is_batch_output(record) or is_batch_request(record) for record in first)


def _has(record: JsonValue, keys: Iterable[str]) -> bool:
    return isinstance(record, dict) and "custom_id" in record and any(record.get(key) for key in keys)


class BatchOutputs:
    """The responses of batches, kept on disk until they are joined with their requests.

    If two batches have the same id (`request-1`), it does not say which response belongs to which request: these
    requests get no response.

    Args:
        folder (`Path`): Folder for the database, which is removed at the end.
    """

    def __init__(self, folder: Path):
        self._path = folder / "batches.sqlite"
        self._path.unlink(missing_ok=True)
        self._database = sqlite3.connect(self._path, isolation_level=None)
        self._database.executescript(
            "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; CREATE TABLE responses "
            "(id TEXT PRIMARY KEY, text TEXT, responses INTEGER, requests INTEGER) WITHOUT ROWID; BEGIN"
        )

    @classmethod
    def collect(cls, files: Iterable[LogPath], folder: Path) -> "BatchOutputs | None":
        """Reads the batches among files; `None` if there are none.

        Args:
            files (`Iterable[Path]`): Files of a log; the first records of each decide whether it is of a batch.
            folder (`Path`): Folder for the database.
        """
        batches = None
        for file in files:
            if not holds_batch(file):
                continue
            batches = batches or cls(folder)
            for _, record in read_records(file):
                if is_batch_output(record) or is_batch_request(record):
                    batches._add(record)
        return batches

    def _add(self, record: Record) -> None:
        is_output = is_batch_output(record)
        text = json.dumps({k: v for k, v in record.items() if k not in ("id", "custom_id")}) if is_output else None
        self._database.execute(
            "INSERT INTO responses VALUES (?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET"
            " text = coalesce(text, excluded.text), responses = responses + excluded.responses,"
            " requests = requests + excluded.requests",
            (str(record["custom_id"]), text, int(is_output), int(not is_output)),
        )

    def _find(self, record: Record) -> tuple[str | None, int, int]:
        """The first response with the id of a record, and the numbers of responses and of requests with it."""
        query = "SELECT text, responses, requests FROM responses WHERE id = ?"
        return self._database.execute(query, (str(record["custom_id"]),)).fetchone() or (None, 0, 0)

    def join(self, record: JsonValue) -> tuple[JsonValue, str | None]:
        """A record, with its response if it is the request of a batch, and a note to count or `None`."""
        if not is_batch_request(record):
            return record, None
        text, responses, requests = self._find(record)
        if text is None:
            return record, "requests of batches without a response in the files"
        if responses > 1 or requests > 1:
            return record, "completions not kept, several batches have the same `custom_id`: read each batch alone"
        return {**record, **json.loads(text)}, None

    def has_request(self, record: Record) -> bool:
        """Whether the request of a response is in the files."""
        return self._find(record)[2] > 0

    def close(self) -> None:
        """Removes the database."""
        self._database.close()
        self._path.unlink(missing_ok=True)
