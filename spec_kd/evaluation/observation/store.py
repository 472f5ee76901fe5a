"""Answers of a server on disk: lines of JSON, appended as they come, so that a killed run asks only what is missing."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from spec_kd.evaluation.observation.records import ObservedRequest
from spec_kd.files import alone_in, explain_full_disk, read_json_object, write_text
from spec_kd.open_types import JsonObject
from spec_kd.options import read_path
from spec_kd.serving.observer import DraftCounts

MANIFEST = ".observation.json"
LINES = "requests.jsonl"
FORMAT = 1
DRAFT, PLAIN = "draft", "plain"


class ObservationStore:
    """The requests of one observation, in a folder or in memory.

    Args:
        output_dir (`str` or `os.PathLike`, *optional*): Folder, created if needed; `None` keeps nothing on disk.
        fingerprint (`dict`): Everything that the requests depend on, as JSON values.

    Attributes:
        requests (`dict[str, dict[int, ObservedRequest]]`): By `"draft"` or `"plain"` and the number of the prompt.
        counters (`list[tuple[DraftCounts, int]]`): What counters grew by in each run, and the number of its requests.

    Raises:
        ValueError: The folder holds an observation with another fingerprint (names what differs), or is damaged.
    """

    def __init__(self, output_dir: str | os.PathLike[str] | None, fingerprint: JsonObject):
        self.requests: dict[str, dict[int, ObservedRequest]] = {DRAFT: {}, PLAIN: {}}
        self.counters: list[tuple[DraftCounts, int]] = []
        self._path: Path | None = None
        if output_dir is not None:
            folder = Path(read_path("output_dir", output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            self._path = folder / LINES
            self._open(folder / MANIFEST, json.loads(json.dumps(fingerprint)))
            self._read()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keeps other processes out of the folder; raises `BlockingIOError` if one works there."""
        if self._path is None:
            yield
        else:
            with alone_in(self._path.parent):
                yield

    def add_request(self, side: str, request: ObservedRequest) -> None:
        """Keeps a request of one side."""
        self.requests[side][request.row] = request
        self._append({"side": side, **asdict(request)})

    def add_counters(self, counts: DraftCounts, num_requests: int) -> None:
        """Keeps what the counters grew by while `num_requests` were asked."""
        self.counters.append((counts, num_requests))
        self._append({"counters": asdict(counts), "requests": num_requests})

    def forget(self, side: str) -> None:
        """Drops the requests of one side, for which the server was not the right one."""
        self.requests[side].clear()
        if self._path is not None and self._path.exists():
            lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
            write_text(self._path, "".join(line for line in lines if json.loads(line).get("side") != side))

    def _open(self, path: Path, fingerprint: JsonObject) -> None:
        if not path.exists():
            write_text(path, json.dumps({"format": FORMAT, "fingerprint": fingerprint}, indent=1) + "\n")
            return
        found = read_json_object(path, "Choose another folder.", ("format", "fingerprint"))
        if found["format"] != FORMAT:
            raise ValueError(f"`{path}` has the format {found['format']!r}, but this version reads {FORMAT}.")
        before = found["fingerprint"]
        changed = [name for name in {**before, **fingerprint} if before.get(name) != fingerprint.get(name)]
        if changed:
            listed = "; ".join(f"{name}: {before.get(name)} before, {fingerprint.get(name)} now" for name in changed)
            raise ValueError(
                f"`{path.parent}` holds an observation with other options ({listed}). Choose another folder, delete "
                "this one, or repeat the call as it was to continue it."
            )

    def _read(self) -> None:
        if self._path is None or not self._path.exists():
            return
        data = self._path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):  # the process was killed within the last line
            os.truncate(self._path, len(whole))
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                values = json.loads(line)
                if "counters" in values:
                    self.counters.append((DraftCounts(**values["counters"]), values["requests"]))
                    continue
                side, counts = values.pop("side"), values.pop("counts")
                request = ObservedRequest(**values, counts=counts and DraftCounts(**counts))
                self.requests[side][request.row] = request
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise ValueError(f"`{self._path}` is damaged in line {number} ({error!r}). Remove the line.") from error

    def _append(self, values: JsonObject) -> None:
        if self._path is not None:
            with explain_full_disk(self._path, "finished requests are kept"), self._path.open("a") as file:
                file.write(json.dumps(values) + "\n")
