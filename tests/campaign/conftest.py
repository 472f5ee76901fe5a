"""Makes tests of the tables' cells, chooses those that a run has time for, and writes the record."""

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from campaign_table import Cell, Outcome, choose_cells, find_commit, get_cell


def pytest_generate_tests(metafunc):
    if "cell" in metafunc.fixturenames:
        metafunc.parametrize("cell", list(metafunc.module.TABLE), ids=str)


def pytest_collection_modifyitems(config, items):
    is_named = any("[" in argument for argument in config.args)
    if config.getoption("campaign") == "full" or is_named:
        return
    cells = [cell for item in items if (cell := get_cell(item)) is not None]
    chosen = choose_cells(cells, find_commit())
    left_out = [item for item in items if (cell := get_cell(item)) is not None and cell not in chosen]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


@pytest.fixture
def outcome(record_property, cell) -> Outcome:
    """What a test says of its cell for the record; a cell without a word from its test is "right"."""
    record_property("campaign_cell", [cell.table, cell.row, cell.column])
    return Outcome(record_property)


def pytest_configure(config):
    if config.getoption("campaign_record"):
        config.pluginmanager.register(Recorder(Path(config.getoption("campaign_record"))), "campaign_recorder")


class Recorder:
    """One JSON line a cell in a file; lines of cells that did not run now are kept."""

    def __init__(self, path: Path):
        self.path, self.lines = path, {}
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                values = json.loads(line)
                self.lines[Cell(values["table"], values["row"], values["column"])] = values
        self.stamp = {"commit": find_commit(), "date": datetime.now(UTC).date().isoformat()}

    def pytest_runtest_logreport(self, report):
        properties = dict(report.user_properties)
        if "campaign_cell" not in properties or (report.when != "call" and not report.failed):
            return
        cell = Cell(*properties["campaign_cell"])
        self.lines[cell] = {
            "table": cell.table,
            "row": cell.row,
            "column": cell.column,
            "outcome": properties["campaign_outcome"] if report.passed else report.outcome,
            "detail": properties.get("campaign_detail", ""),
            "seconds": round(report.duration, 1),
            **self.stamp,
        }

    def pytest_sessionfinish(self, session):
        if hasattr(session.config, "workerinput"):
            return  # the process that started the workers writes for them
        order = sorted(self.lines, key=lambda cell: (cell.table, cell.row, cell.column))
        text = "".join(json.dumps(self.lines[cell], ensure_ascii=False) + "\n" for cell in order)
        self.path.write_text(text, encoding="utf-8")
