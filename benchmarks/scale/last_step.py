"""The last step of shared reading, which one process does for the whole log, at more prompts than a run here reaches.

    python -m benchmarks.scale.last_step --scratch DIR     # 10 million lines from 250,000; minutes, 20 GB of disk

The other steps run on a log; then the arrays that they hand on are copied, each copy as further shares of the log whose
conversations are their own. What the last step and the opening of its result take is measured in a process of its own:
memory is the kernel's VmHWM above that before. Writes last_step.json to benchmarks/results/scale.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import describe_machine
from benchmarks.scale.growth import FOLDER, MemoryWatch, read_peak, read_status
from benchmarks.scale.logs import LINES_OF_SHARE
from benchmarks.scale.made_logs import make_log

FILES = ("rows", "kept", "prompts", "ledgers", "counts", "renamed")
LINKS = ("links", "text_links")


def prepare(folder: Path, lines: int) -> int:
    """Runs all steps but the last one; returns the number of shares."""
    from spec_kd.prompts.logs.files import find_files
    from spec_kd.prompts.logs.options import LogOptions
    from spec_kd.prompts.logs.scale.options import ScaleOptions
    from spec_kd.prompts.logs.scale.pipeline import build_stages
    from spec_kd.prompts.logs.scale.shares import cut_into_shares

    make_log(lines, folder / "log")
    files, _ = find_files(str(folder / "log"), folder / "out")
    shares = cut_into_shares(files, max(2, lines // LINES_OF_SHARE))
    scale = ScaleOptions(executor="local", num_tasks=len(shares))
    build_stages(folder, shares, LogOptions(), scale, None, show_progress=False).run()
    return len(shares)


def copy_shares(folder: Path, num_shares: int, copies: range) -> None:
    """Makes further shares of the arrays of the steps before; copy 0 are these themselves."""
    from spec_kd.prompts.logs.scale.work_folder import ROW_BITS, WorkFolder

    work = WorkFolder(str(folder / "work"), num_shares)
    for copy in copies:
        shift = np.uint64(copy * num_shares) << ROW_BITS
        for part in range(num_shares):
            for name in FILES:
                os.link(work.place(name, part), work.place(name, part + copy * num_shares))
            for name in LINKS:
                work.save(name, part + copy * num_shares, work.load(name, part) + shift)


def write(folder: Path, num_shares: int) -> dict[str, Any]:
    """Writes the result and opens it."""
    from spec_kd.prompts.logs.options import LogOptions
    from spec_kd.prompts.logs.prompt_store import PromptStore
    from spec_kd.prompts.logs.scale import pipeline
    from spec_kd.prompts.logs.scale.work_folder import WorkFolder
    from spec_kd.prompts.logs.scale.writing import WriteResult

    assert pipeline, "imported, so that it counts as before the step"
    work, output = WorkFolder(str(folder / "work"), num_shares), str(folder / "out")
    facts = {"files": 1, "ignored_files": [], "started": time.time()}
    before, mapped_before = read_status("RssAnon"), read_peak()
    started, computed = time.monotonic(), time.process_time()
    with MemoryWatch() as memory:
        WriteResult(work, output, LogOptions(), {}, facts).do(0, 1)
        train, test = PromptStore(output).open_splits()
    return {
        "prompts": len(train) + len(test),
        "seconds": time.monotonic() - started,
        "processor_seconds": time.process_time() - computed,
        "bytes": memory.most - before,
        "bytes_with_files": read_peak() - mapped_before,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=250_000)
    parser.add_argument("--copies", type=int, nargs="+", default=[4, 12, 40])
    parser.add_argument("--scratch", type=Path, help="Folder for logs and results; one of the system by default")
    parser.add_argument("--results", type=Path, default=FOLDER)
    parser.add_argument("--write", nargs=2, metavar=("FOLDER", "SHARES"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write:
        print(json.dumps(write(Path(arguments.write[0]), int(arguments.write[1]))))
        return
    record: dict[str, Any] = {"machine": describe_machine(), "lines": arguments.lines, "found": {}}
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as name:
        folder = Path(name)
        num_shares = prepare(folder, arguments.lines)
        done = 1
        for copies in sorted(arguments.copies):
            copy_shares(folder, num_shares, range(done, copies))
            done = copies
            command = [sys.executable, "-m", "benchmarks.scale.last_step", "--write", name, str(copies * num_shares)]
            answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found = record["found"][str(copies * arguments.lines)] = json.loads(answer.splitlines()[-1])
            print(copies, found, flush=True)
            subprocess.run(["rm", "-r", str(folder / "out")], check=True)
            (arguments.results / "last_step.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
