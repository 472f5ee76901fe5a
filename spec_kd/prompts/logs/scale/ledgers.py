"""Joins what became of the records of all shares, as if one process had read them."""

from collections import Counter
from collections.abc import Sequence

from spec_kd.open_types import JsonObject
from spec_kd.prompts.logs.report import NUM_EXAMPLES, NUM_REASONS, NUM_RUNS, OTHER_REASONS, LogLedger


def merge_ledgers(shares: Sequence[JsonObject], num_notes: int, other_notes: str) -> tuple[LogLedger, Counter[str]]:
    """The ledger of the whole log, and its notes.

    Args:
        shares (`Sequence[dict]`): Of each share what `ShareReader.describe` returned.
        num_notes (`int`), other_notes (`str`): Most different notes, and the name of the others.
    """
    merged, notes = LogLedger(), Counter[str]()
    num_before, is_open = 0, False  # lines of the file in earlier shares; whether the last record was not read
    for share in shares:
        runs, examples = list(share["runs"]), list(share["malformed_examples"])
        for name, count in share["notes"].items():
            add_count(notes, name, count, num_notes, other_notes)
        ends = share["ends"] + [[False, False]] * (len(share["files"]) - len(share["ends"]))
        for place, file in enumerate(share["files"]):
            path = file["path"]
            if not num_before:  # of a file that begins here
                merged.files.append({**file, "reasons": Counter()})
                is_open = False
            else:
                for name in ("records", "read", "left_out", "malformed"):
                    merged.files[-1][name] += file[name]
            for name, count in file["reasons"].items():
                add_count(merged.files[-1]["reasons"], name, count, NUM_REASONS, OTHER_REASONS)
            is_first, last = True, 0
            while runs and runs[0]["file"] == path and (is_first or runs[0]["first"] > last):
                run = runs.pop(0)
                last = run["last"]
                joins = is_first and is_open and ends[place][0]
                _add_run(merged, {**run, "first": run["first"] + num_before, "last": last + num_before}, joins)
                is_first = False
            prefix = f"{path}:"
            last_example = 0
            while examples and examples[0].startswith(prefix):
                number, reason = examples[0].removeprefix(prefix).split(": ", 1)
                if int(number) <= last_example:
                    break
                last_example = int(number)
                examples.pop(0)
                if len(merged.malformed_examples) < NUM_EXAMPLES:
                    merged.malformed_examples.append(f"{path}:{int(number) + num_before}: {reason}")
            is_open = bool(ends[place][1]) or (is_open and not file["records"])
            num_before = num_before + share["lines"][place] if share["lines"][place] else 0
        merged.num_unlisted += share["num_unlisted"]
    return merged, notes


def _add_run(merged: LogLedger, run: JsonObject, joins: bool) -> None:
    before = merged.runs[-1] if merged.runs else None
    if joins and before and all(before[name] == run[name] for name in ("file", "outcome", "reason")):
        before["last"] = run["last"]
    elif len(merged.runs) < NUM_RUNS:
        merged.runs.append(run)
    else:
        merged.num_unlisted += 1


def add_count(counts: Counter[str], name: str, count: int, limit: int, other: str) -> None:
    """Adds a count of a share as `count_note` counts single records."""
    counts[name if name in counts or len(counts) < limit else other] += count
