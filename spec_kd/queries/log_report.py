"""What became of the records of a log."""

from dataclasses import asdict, dataclass
from typing import Any

from spec_kd.escaping import make_code_span


@dataclass(frozen=True)
class QueryLogsReport:
    """Counts of one reading; prompts = kept + the sum of dropped, kept = train + test.

    Args:
        files (`int`): Files read.
        ignored_files (`tuple[str, ...]`): In the folders, not of a known kind.
        records (`int`): Lines, rows and items read, malformed ones included.
        malformed (`int`): Records that could not be read.
        malformed_examples (`tuple[str, ...]`): The first of them, as `file:line: reason`.
        left_out (`int`): Records that a function given as `format` left out, or lines of vLLM's log without a request.
        prompts (`int`): Turns of the other records.
        dropped (`dict[str, int]`): Prompts by the reason for which they are not kept.
        kept (`int`): Prompts in the result.
        train (`int`): Of them, for training.
        test (`int`): Of them, for testing.
        conversations (`int`): That the kept prompts belong to.
        with_completion (`int`): Kept prompts of which the log has the answer.
        redacted (`int`): Prompts in which something was replaced, before duplicates were dropped.
        seconds (`float`): Wall-clock time.
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

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON."""
        lists = {"ignored_files": list(self.ignored_files), "malformed_examples": list(self.malformed_examples)}
        return asdict(self) | lists

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "QueryLogsReport":
        """The report from what [`to_dict`] made."""
        lists = ("ignored_files", "malformed_examples")
        return cls(**values | {name: tuple(values[name]) for name in lists})

    def to_markdown(self) -> str:
        """The report as a table, with the malformed records below."""
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
            "with the answer": self.with_completion,
        }
        lines = ["| | |", "|---|---|", *(f"| {name} | {count:,} |" for name, count in counts.items())]
        if self.malformed:
            lines += ["", f"Malformed, the first {len(self.malformed_examples)} of {self.malformed:,}:", ""]
            lines += [f"- {make_code_span(example)}" for example in self.malformed_examples]
        return "\n".join(lines) + "\n"
