"""The record of an experiment: JSON lines, appended as soon as something is known."""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

from .profile import Profile


class Record:
    """Lines of `kind`, `key` and what belongs to them; of several with the same key the last one counts.

    A line that a killed process left unfinished is cut off when the next one is appended.

    Args:
        path (`Path`): The file; made when the first line is appended.
    """

    def __init__(self, path: Path):
        self.path = path
        self._lines: dict[tuple[str, str], dict[str, Any]] = {}
        content = path.read_bytes() if path.exists() else b""
        self._whole_bytes = content.rfind(b"\n") + 1
        for line in content[: self._whole_bytes].decode("utf-8").splitlines():
            self._keep(json.loads(line))

    def _keep(self, line: dict[str, Any]) -> None:
        self._lines[line["kind"], line["key"]] = line

    def find(self, kind: str, key: str) -> dict[str, Any] | None:
        """The line of a key, or `None`."""
        return self._lines.get((kind, key))

    def list(self, kind: str) -> Iterator[dict[str, Any]]:
        """All lines of a kind."""
        return (line for (own, _), line in self._lines.items() if own == kind)

    def append(self, kind: str, key: str, **content: Any) -> dict[str, Any]:
        """Writes a line to the disk and returns it as it will be read."""
        text = json.dumps({"kind": kind, "key": key, **content}, ensure_ascii=False)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.truncate(self._whole_bytes)
            file.write(text.encode("utf-8") + b"\n")
            file.flush()
            os.fsync(file.fileno())
            self._whole_bytes = file.tell()
        self._keep(json.loads(text))
        return self._lines[kind, key]


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
