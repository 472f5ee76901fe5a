"""Tables of situations (`tests/campaign`): a row is a situation, a column what is done with it, a cell is a test."""

import hashlib
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

NUM_CHOSEN = 30  # cells that a run adds to the cheapest one of each row


@dataclass(frozen=True)
class Cell:
    """One test of a table.

    Args:
        table (`str`): Name of the table.
        row (`str`): Name of the row.
        column (`str`): Name of the column.
    """

    table: str
    row: str
    column: str

    def __str__(self) -> str:
        return f"{self.row}-{self.column}"


@dataclass(frozen=True)
class Table:
    """
    Args:
        name (`str`): Names the table in the record.
        rows (`dict`): What each row's test needs, by the name of the row.
        columns (sequence of `str`): What is done with a row, the cheapest first.
        missing (`dict`, *optional*):
            Columns that make no sense for a row, by its name, with the reason: `{"row": {"column": "reason"}}`.
    """

    name: str
    rows: Mapping[str, Any]
    columns: Sequence[str] = ("check",)
    missing: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Cell]:
        for row in self.rows:
            for column in self.columns:
                if column not in self.missing.get(row, {}):
                    yield Cell(self.name, row, column)

    def __getitem__(self, cell: Cell) -> Any:
        """What the tests of a cell's row need."""
        return self.rows[cell.row]


class Outcome:
    """What a test says of its cell besides passing, for the record.

    `refused` counts only where the test has shown that the reason is true: a refusal without a need is a failure.
    """

    def __init__(self, record_property):
        self._record = record_property
        record_property("campaign_outcome", "right")

    def refused(self, reason: str) -> None:
        """The package refuses this cell, by name, and the test has shown why that is right."""
        self._record("campaign_outcome", "refused")
        self._record("campaign_detail", reason)

    def note(self, detail: str) -> None:
        """A figure or a sentence for the record, such as the largest difference that was seen."""
        self._record("campaign_detail", detail)


def choose_cells(cells: Sequence[Cell], commit: str, num_chosen: int = NUM_CHOSEN) -> set[Cell]:
    """The cheapest cell of each row, and `num_chosen` others that the commit's hash picks."""
    cheapest = {}
    for cell in cells:
        cheapest.setdefault((cell.table, cell.row), cell)
    chosen = set(cheapest.values())
    others = sorted(set(cells) - chosen, key=lambda cell: hashlib.sha256(f"{commit} {cell!r}".encode()).digest())
    return chosen | set(others[:num_chosen])


def find_commit() -> str:
    """`CAMPAIGN_COMMIT` where it is set, else the commit that is checked out; "unknown" outside of a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    if commit := os.environ.get("CAMPAIGN_COMMIT"):
        return commit
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def get_cell(item: pytest.Item) -> Cell | None:
    """The cell that a test is about, or `None` for tests outside of the tables."""
    cell = getattr(item, "callspec", None) and item.callspec.params.get("cell")
    return cell if isinstance(cell, Cell) else None
