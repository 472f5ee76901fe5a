"""What became of the files and records of a log: the counts while it is read, and the report of the reading."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from spec_kd.escaping import escape_markdown, make_code_span, make_table
from spec_kd.open_types import JsonObject

READ, LEFT_OUT, MALFORMED = "read", "left_out", "malformed"
NUM_REASONS = 30  # counted separately in one file
OTHER_REASONS = "other reasons"
NUM_EXAMPLES = 100
NUM_RUNS = 20_000  # listed; a log of a million lines has some thousands that are malformed
# Where the details on one record begin in a reason.
DETAILS = re.compile(r"(?<=.)(?:: | [({\[])", re.DOTALL)
NUM_SHOWN = 50
TUPLES = ("ignored_files", "malformed_examples", "per_file", "outcomes")

NEAR_DUPLICATES = (
    "Near-duplicates are nearly the same as a whole and, if they are long, in their first and last 100 characters. "
    "Long prompts that differ only in their middle are among them; `near_duplicate_threshold=None` keeps them."
)


class LogLedger:
    """Keeps account of the records of log files, in bounded memory.

    Attributes:
        files (`list[dict]`): For each file its `path`, the number of its `records`, how many of them were `read`,
            `left_out` and `malformed`, and the number for each of the `reasons`.
        runs (`list[dict]`): Neighboring records that were not read for the same reason: the `file`, the `first` and the
            `last` line (row, item), the `outcome` (`"left_out"` or `"malformed"`) and the `reason`; the first 20,000.
        num_unlisted (`int`): Number of runs after these.
        malformed_examples (`list[str]`): The first malformed records, as `file:line: reason`.
    """

    def __init__(self) -> None:
        self.files: list[JsonObject] = []
        self.runs: list[JsonObject] = []
        self.num_unlisted = 0
        self.malformed_examples: list[str] = []
        self._run: JsonObject | None = None

    def start_file(self, name: str) -> None:
        """Begins a file, to which the next records belong."""
        self._run = None
        self.files.append({"path": name, "records": 0, READ: 0, LEFT_OUT: 0, MALFORMED: 0, "reasons": Counter()})

    def note(self, number: int, outcome: str, reason: str | None = None) -> None:
        """Counts the record on this line."""
        file = self.files[-1]
        file["records"] += 1
        file[outcome] += 1
        if reason is None:
            self._run = None
            return
        count_note(file["reasons"], DETAILS.split(reason, maxsplit=1)[0][:200], NUM_REASONS, OTHER_REASONS)
        if outcome == MALFORMED and len(self.malformed_examples) < NUM_EXAMPLES:
            self.malformed_examples.append(f"{file['path']}:{number}: {reason}")
        if self._run is not None and (self._run["outcome"], self._run["reason"]) == (outcome, reason):
            self._run["last"] = number
            return
        self._run = {"file": file["path"], "first": number, "last": number, "outcome": outcome, "reason": reason}
        if len(self.runs) < NUM_RUNS:
            self.runs.append(self._run)
        else:
            self.num_unlisted += 1

    def count_outcomes(self) -> JsonObject:
        """Number of records, and how many of them were left out and malformed."""
        return {name: sum(file[name] for file in self.files) for name in ("records", LEFT_OUT, MALFORMED)}

    def count_reasons(self) -> dict[str, int]:
        """Number of records that were left out or malformed in any file, by reason, the most frequent first."""
        return dict(sum((file["reasons"] for file in self.files), Counter[str]()).most_common())


def count_note(counts: Counter[str], note: str, limit: int, other: str) -> None:
    """Counts a note, under the name `other` if it is a new one and there are `limit` already."""
    counts[note if note in counts or len(counts) < limit else other] += 1


@dataclass(frozen=True)
class QueryLogsReport:
    """Counts of one reading: `prompts` is `kept` and the sum of `dropped`, `kept` is `train` and `test`.

    Args:
        files (`int`): Number of files read.
        ignored_files (`tuple[str, ...]`): Files in the folders that are not of a known kind.
        records (`int`): Number of lines, rows and items read, malformed ones included.
        malformed (`int`): Number of records that could not be read.
        malformed_examples (`tuple[str, ...]`): The first malformed records, as `file:line: reason`.
        left_out (`int`): Number of records that are no requests: those that a function given as `format` left out,
            lines of vLLM's log without a prompt, spans of a trace, texts that are not the user's.
        prompts (`int`): Number of prompts in the other records.
        dropped (`dict[str, int]`): Number of prompts that are not kept, by reason.
        kept (`int`): Number of prompts in the result.
        train (`int`): Number of prompts for training.
        test (`int`): Number of prompts for testing.
        conversations (`int`): Number of conversations of the kept prompts.
        with_completion (`int`): Number of kept prompts with a completion.
        redacted (`int`): Number of prompts in which something was replaced, before duplicates were dropped.
        seconds (`float`): Wall-clock time in seconds.
        reasons (`dict[str, int]`): Number of malformed and left-out records, by reason.
        notes (`dict[str, int]`): Further counts of records that were read, such as why completions that were logged are
            not kept.
        per_file (`tuple[dict, ...]`): For each file its `path`, the number of its `records`, how many were `read`,
            `left_out` and `malformed`, and the number for each of the `reasons`.
        outcomes (`tuple[dict, ...]`): Runs of neighboring records that were not read for the same reason: the `file`,
            the `first` and `last` line (row, item), the `outcome` and the `reason`. The first 20,000 runs.
        num_unlisted_outcomes (`int`): Number of further runs.
    """

    files: int
    ignored_files: tuple[str, ...]
    records: int
    malformed: int
    malformed_examples: tuple[str, ...]
    left_out: int
    prompts: int
    dropped: dict[str, int]
    kept: int
    train: int
    test: int
    conversations: int
    with_completion: int
    redacted: int
    seconds: float
    reasons: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    per_file: tuple[JsonObject, ...] = ()
    outcomes: tuple[JsonObject, ...] = ()
    num_unlisted_outcomes: int = 0

    def to_dict(self) -> JsonObject:
        """The report as JSON values."""
        return asdict(self) | {name: list(getattr(self, name)) for name in TUPLES}

    @classmethod
    def from_dict(cls, values: JsonObject) -> "QueryLogsReport":
        """The report from what [`to_dict`] returned."""
        return cls(**values | {name: tuple(values[name]) for name in TUPLES})

    def list_warnings(self) -> list[str]:
        """A sentence for each kind of thing that the user should know of."""
        found = []
        if self.malformed:
            found.append(
                f"{self.malformed} of {self.records} records are malformed, such as {self.malformed_examples[0]}"
            )
        if self.ignored_files:
            found.append(
                f"{len(self.ignored_files)} files of the folders are not read because of their names, such as "
                f"{self.ignored_files[0]}"
            )
        return found + [f"{note[0].upper()}{note[1:]}: {count}" for note, count in self.notes.items()]

    def to_markdown(self) -> str:
        """The report as tables: counts, files, and what was not read with its reasons."""
        counts = {
            "records": self.records,
            "malformed": self.malformed,
            **({"left out": self.left_out} if self.left_out else {}),
            "prompts": self.prompts,
            **{f"dropped: {reason}": count for reason, count in self.dropped.items()},
            "kept": self.kept,
            "for training": self.train,
            "for testing": self.test,
            "conversations": self.conversations,
            "with a completion": self.with_completion,
            **self.notes,
        }
        lines = make_table(("", ""), [(escape_markdown(name), f"{count:,}") for name, count in counts.items()])
        if self.dropped.get("near_duplicate"):
            lines += ["", NEAR_DUPLICATES]
        files = [
            (make_code_span(f["path"], in_table=True), *(f"{f[n]:,}" for n in ("records", READ, LEFT_OUT, MALFORMED)))
            for f in self.per_file[:NUM_SHOWN]
        ]
        lines += ["", *make_table(("file", "records", "read", "left out", "malformed"), files)]
        if len(self.per_file) > NUM_SHOWN:
            lines += ["", f"And {len(self.per_file) - NUM_SHOWN:,} other files."]
        if self.ignored_files:
            lines += ["", f"Not read because of their names: {len(self.ignored_files):,} files.", ""]
            lines += [f"- {make_code_span(name)}" for name in self.ignored_files[:NUM_SHOWN]]
        if self.reasons:
            rows = [(escape_markdown(reason), f"{count:,}") for reason, count in self.reasons.items()]
            lines += ["", *make_table(("why records were not read", ""), rows)]
        if self.malformed:
            lines += ["", f"Malformed, the first {len(self.malformed_examples)} of {self.malformed:,}:", ""]
            lines += [f"- {make_code_span(example)}" for example in self.malformed_examples]
        return "\n".join(lines) + "\n"


def describe_nothing(ledger: LogLedger, dropped: Mapping[str, int]) -> str:
    """The reason why no prompt of a log is kept."""
    totals = ledger.count_outcomes()
    if not totals["records"]:
        names = ", ".join(file["path"] for file in ledger.files[:3])
        return f"No prompt of 0 records is kept: there is nothing in {names}."
    reasons = {run["reason"]: f"{run['file']}:{run['first']}: {run['reason']}" for run in reversed(ledger.runs)}
    why = f" Not read are {'; '.join(list(reversed(reasons.values()))[:3])}." if reasons else ""
    why += f" Prompts dropped: {dict(dropped)}." if dropped else ""
    return (
        f"No prompt of {totals['records']} records is kept: {totals[MALFORMED]} are malformed and {totals[LEFT_OUT]} "
        f"left out.{why}"
    )
