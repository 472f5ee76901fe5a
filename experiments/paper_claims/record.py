"""The record of an experiment: JSON lines, appended as soon as something is known."""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, BinaryIO

from .profile import Profile


class Record:
    """Lines of `kind`, `key` and what belongs to them.

    What was found with models has a `build`: the same models built anew, on another machine, are other models. Of
    several lines with the same key and build the last one counts.

    Several processes may append to one file: each reads what the others wrote before it writes. A line that a killed
    process left unfinished is cut off when the next one is appended.

    Args:
        path (`Path`): The file; made when the first line is appended.
    """

    def __init__(self, path: Path):
        self.path = path
        self._lines: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
        self._read_bytes = 0
        if path.exists():
            with path.open("rb") as file:
                self._read_new(file)

    def _read_new(self, file: BinaryIO) -> None:
        """Reads the whole lines after those that were read before."""
        file.seek(self._read_bytes)
        content = file.read()
        content = content[: content.rfind(b"\n") + 1]
        for line in content.decode("utf-8").splitlines():
            entry = json.loads(line)
            self._lines.setdefault((entry["kind"], entry["key"]), {})[entry.get("build", "")] = entry
        self._read_bytes += len(content)

    def find(self, kind: str, key: str, build: str = "") -> dict[str, Any] | None:
        """The line of a key and build, or `None`."""
        return self.find_builds(kind, key).get(build)

    def find_builds(self, kind: str, key: str) -> dict[str, dict[str, Any]]:
        """The lines of a key by build, the first one first."""
        return self._lines.get((kind, key), {})

    def list(self, kind: str) -> Iterator[dict[str, Any]]:
        """All lines of a kind."""
        return (line for (own, _), lines in self._lines.items() if own == kind for line in lines.values())

    def append(self, kind: str, key: str, **content: Any) -> dict[str, Any]:
        """Writes a line to the disk and returns it as it will be read."""
        text = json.dumps({"kind": kind, "key": key, **content}, ensure_ascii=False)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            self._read_new(file)
            file.truncate(self._read_bytes)
            file.write(text.encode("utf-8") + b"\n")
            file.flush()
            os.fsync(file.fileno())
            self._read_new(file)
        return self._lines[kind, key][content.get("build", "")]


@dataclass(frozen=True)
class Workspace:
    """Where an experiment is made.

    Args:
        profile (`Profile`): What is done.
        folder (`Path`): Models, queries and answers, which are not part of the record.
        record (`Record`): What is known.
    """

    profile: Profile
    folder: Path
    record: Record


def compute_hash(*parts: Any) -> str:
    """16 hexadecimal digits of dataclasses and JSON values."""
    plain = [asdict(part) if is_dataclass(part) else part for part in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]
