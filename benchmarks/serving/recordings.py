"""Recordings of serving engines: one JSON line for a request, appended as it comes."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from threading import Lock
from typing import Any

FOLDER = Path(__file__).parent / "recordings"


class Recording:
    """A file of JSON lines that a killed run continues.

    Args:
        path (`Path`): The file; a last line that was cut off is removed from it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        if not text.endswith("\n"):
            text = text[: text.rfind("\n") + 1]
            path.write_text(text, encoding="utf-8")
        self.keys = {get_key(json.loads(line)) for line in text.splitlines()}

    def has(self, setting: str, prompt: dict[str, Any]) -> bool:
        """Whether the request with this prompt in this setting is recorded."""
        return get_key({"setting": setting, "prompt": prompt}) in self.keys

    def append(self, record: dict[str, Any]) -> None:
        """Writes one request."""
        with self.lock, self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self.keys.add(get_key(record))


def get_key(record: dict[str, Any]) -> tuple[str, str]:
    return record["setting"], record["prompt"]["sha256"]


def read_recording(path: Path) -> Iterator[dict[str, Any]]:
    """The requests of a recording, plain or compressed."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def pack(path: Path, folder: Path = FOLDER) -> Path:
    """Writes the recording compressed into `folder`, the same bytes for the same requests."""
    folder.mkdir(parents=True, exist_ok=True)
    packed = folder / f"{path.name}.gz"
    with packed.open("wb") as file, gzip.GzipFile("", "wb", fileobj=file, mtime=0) as compressed:
        compressed.write(path.read_bytes())
    return packed


def summarize(path: Path) -> dict[str, dict[str, int]]:
    """Requests, tokens, drafted and accepted tokens of each setting."""
    totals: dict[str, dict[str, int]] = {}
    for record in read_recording(path):
        total = totals.setdefault(record["setting"], dict.fromkeys(("requests", "tokens", "drafted", "accepted"), 0))
        total["requests"] += 1
        total["tokens"] += len(record["completion_ids"])
        total["drafted"] += record["drafted"]
        total["accepted"] += record["accepted"]
    return totals
