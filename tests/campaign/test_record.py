"""The committed record has every cell of every table, and none that failed."""

import json
import re
from importlib import import_module
from pathlib import Path

import pytest
from campaign_table import Cell

FOLDER = Path(__file__).parent
TABLES = re.compile(r"^TABLE = Table\(", re.MULTILINE)
MODULES = sorted(path.stem for path in FOLDER.glob("test_*.py") if TABLES.search(path.read_text(encoding="utf-8")))
LINES = [json.loads(line) for line in (FOLDER / "record.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", MODULES)
def test_no_cell_is_empty(name):
    table = import_module(name).TABLE
    recorded = {Cell(line["table"], line["row"], line["column"]) for line in LINES if line["table"] == table.name}
    assert recorded == set(table), "Run the table with --campaign full --campaign-record tests/campaign/record.jsonl."


def test_every_cell_is_right_or_refused_with_its_reason():
    assert [line for line in LINES if line["outcome"] not in ("right", "refused")] == []
    assert [line for line in LINES if line["outcome"] == "refused" and not line["detail"]] == []


def test_every_line_says_where_and_when_it_was_made():
    assert all(len(line["commit"]) == 40 and line["date"] for line in LINES)
