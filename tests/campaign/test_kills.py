"""Every step that goes on from what is there: killed anywhere, or out of disk, it ends as the undisturbed one."""

import hashlib
import json
import random
import re
import shutil
import signal

import pytest
from campaign_table import Table, find_commit
from resumable_steps import STEPS, run_in_process

NUM_PARTS = 11
FULL_DISK = "full disk"
# Beginnings first: few operations are repeated there.
PARTS = [f"killed in part {part} of {NUM_PARTS}" for part in range(1, NUM_PARTS + 1)]
TABLE = Table("kills", STEPS, (*PARTS, FULL_DISK))
# Hashes by time of modification, sums of files with times in them, options as objects with such. All other files are
# compared byte by byte, or without the times in them.
UNCOMPARED = (".hashes.json", "lock", "manifest.lock", "training_args.bin", "checkpoint_sums.json")
TIMES = re.compile(r"runtime|seconds|_per_second|_time$|^time|^date|^num_tokens$")  # TRL counts tokens by process
MOMENT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00")


@pytest.fixture(scope="session")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills") / "given"
    folder.mkdir()
    code, said = run_in_process("prepare", folder, folder)
    assert code == 0 and said["error"] is None, said
    return folder


@pytest.fixture(scope="session")
def undisturbed(given):
    """The end of each step and its number of operations on files, made when first asked for."""
    ends = {}

    def run(step):
        if step not in ends:
            folder = find_folder(given, step)
            shutil.rmtree(folder.parent, ignore_errors=True)
            folder.parent.mkdir()
            code, said = run_in_process(step, given, folder)
            assert code == 0 and said["error"] is None, said["error"]["trace"]
            sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
            ends[step] = read_tree(folder), said["num_operations"], max(sizes)
        return ends[step]

    return run


def find_folder(given, step):
    """The same for every run of a step, as notes and cards name it."""
    return given.parent / re.sub(r"\W+", "-", step) / "out"


def test_cell(cell, outcome, given, undisturbed):
    expected, num_operations, largest = undisturbed(cell.row)
    folder = find_folder(given, cell.row)
    shutil.rmtree(folder.parent)
    folder.parent.mkdir()
    if cell.column == FULL_DISK:
        code, said = run_in_process(cell.row, given, folder, file_limit=largest // 2)
        assert code == 0 and said["error"] is not None
        text = said["error"]["text"]
        assert "could not be written" in text and "\n" not in text, said["error"]["trace"]
        outcome.note(re.sub(re.escape(str(given.parent)) + r"\S*/", "", text))
    else:
        number = choose_operation(cell, num_operations)
        code, _ = run_in_process(cell.row, given, folder, stop_at=number)
        assert code == -signal.SIGKILL
        outcome.note(f"operation {number} of {num_operations}")
    code, said = run_in_process(cell.row, given, folder)
    assert code == 0 and said["error"] is None, said["error"]["trace"]
    found = read_tree(folder)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []


def choose_operation(cell, num_operations):
    """One of the part of the step that the column names; which one depends on the commit."""
    part = int(cell.column.split()[3])
    first, last = ((part - 1) * num_operations // NUM_PARTS + 1, max(1, part * num_operations // NUM_PARTS))
    seed = hashlib.sha256(f"{find_commit()} {cell!r}".encode()).digest()
    return random.Random(seed).randint(min(first, last), last)


def read_tree(folder):
    """All files below a folder, with what is the same in every run of them."""
    return {str(path.relative_to(folder)): read_file(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def read_file(path):
    if path.name in UNCOMPARED:
        return None
    if path.suffix == ".json":
        return drop_times(json.loads(path.read_text()))
    if path.suffix in (".md", ".html"):
        return MOMENT.sub("", path.read_text())
    return hashlib.sha256(path.read_bytes()).hexdigest()


def drop_times(value):
    if isinstance(value, dict):
        # the files of a step come with their sums, which are those of reports with times in them
        kept = {
            name: sorted(item) if name == "files" and isinstance(item, dict) else item for name, item in value.items()
        }
        return {name: drop_times(item) for name, item in kept.items() if not TIMES.search(name)}
    return [drop_times(item) for item in value] if isinstance(value, list) else value
