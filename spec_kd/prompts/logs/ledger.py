"""Counts for each file what became of its records, and lists the lines that were not read."""

from collections import Counter
from contextlib import suppress

from spec_kd.open_types import JsonObject

READ, LEFT_OUT, MALFORMED = "read", "left_out", "malformed"
NUM_REASONS = 30  # counted separately in one file; later ones count as `OTHER`
NUM_RUNS = 20_000  # listed; a log of a million lines has some thousands that are malformed
OTHER = "other reasons"


class LogLedger:
    """Keeps account of the records of log files, in bounded memory.

    Attributes:
        files (`list[dict]`): For each file its `path`, the number of its `records`, how many of them were `read`,
            `left_out` and `malformed`, and the number for each of the `reasons`.
        runs (`list[dict]`): Neighboring records that were not read for the same reason: the `file`, the `first` and the
            `last` line (row, item), the `outcome` (`"left_out"` or `"malformed"`) and the `reason`; the first 20,000.
        num_unlisted (`int`): Number of runs after these.
    """

    def __init__(self) -> None:
        self.files: list[JsonObject] = []
        self.runs: list[JsonObject] = []
        self.num_unlisted = 0
        self._reasons: Counter[str] = Counter()
        self._run: JsonObject | None = None

    def start_file(self, name: str) -> None:
        """Begins a file, to which the next records belong."""
        self._reasons, self._run = Counter(), None
        self.files.append({"path": name, "records": 0, READ: 0, LEFT_OUT: 0, MALFORMED: 0, "reasons": self._reasons})

    def note(self, number: int, outcome: str, reason: str | None = None) -> None:
        """Counts the record on this line."""
        counts = self.files[-1]
        counts["records"] += 1
        counts[outcome] += 1
        if reason is None:
            self._run = None
            return
        kind = shorten_reason(reason)
        self._reasons[kind if kind in self._reasons or len(self._reasons) < NUM_REASONS else OTHER] += 1
        if self._run is not None and (self._run["outcome"], self._run["reason"]) == (outcome, reason):
            self._run["last"] = number
            return
        self._run = {"file": counts["path"], "first": number, "last": number, "outcome": outcome, "reason": reason}
        if len(self.runs) < NUM_RUNS:
            self.runs.append(self._run)
        else:
            self.num_unlisted += 1

    def count_reasons(self) -> dict[str, int]:
        """Number of records that were left out or malformed in any file, by reason, the most frequent first."""
        total: Counter[str] = Counter()
        for counts in self.files:
            total.update(counts["reasons"])
        return dict(total.most_common())


def shorten_reason(reason: str) -> str:
    """A reason without its details on one record: up to the first colon or bracket."""
    with suppress(ValueError):
        reason = reason[: min(place for mark in (": ", " (", " {", " [") if (place := reason.find(mark)) > 0)]
    return reason[:200]
