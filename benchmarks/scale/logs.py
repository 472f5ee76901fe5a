"""A log beyond memory: time and memory of datatrove's tasks, what they make of it, and which near-duplicates are found.

    python -m benchmarks.scale.logs --judge                        # 100,000 lines, some minutes
    python -m benchmarks.scale.logs --equal                        # a million lines
    python -m benchmarks.scale.logs --lines 1000000 10000000 --runs 3  # hours, and 25 GB of disk

Every run is a process of its own, whose tasks run one after the other. Processor time includes that of its children;
memory is the kernel's VmHWM of the largest of its processes, less what it had after the imports. What is in `logs.json`
is not run again. Writes logs.{json,md} to benchmarks/results/scale.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import describe_machine
from benchmarks.scale.growth import FOLDER, read_peak
from benchmarks.scale.made_logs import make_log
from spec_kd.escaping import make_table

LINES_OF_SHARE = 125_000
JUDGED, EQUAL = 100_000, 1_000_000
THRESHOLD = 0.8


def run_here(path: str, log: str, output: str, **options: Any) -> dict[str, Any]:
    """Reads a log by one of the paths: `one` process, or `shared`."""
    from spec_kd.prompts.logs.query_logs import load_query_logs
    from spec_kd.prompts.logs.scale import pipeline
    from spec_kd.prompts.logs.scale.options import ScaleOptions

    num_shares = max(2, options.pop("lines") // LINES_OF_SHARE)
    scale = ScaleOptions(executor="local", num_tasks=num_shares) if path == "shared" else None
    assert pipeline, "imported, so that it counts as before the run"
    before, computed, started = read_peak(), count_processor_seconds(), time.monotonic()
    result = load_query_logs(log, output, scale=scale, show_progress=False, **options)
    children = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return {
        "seconds": time.monotonic() - started,
        "processor_seconds": count_processor_seconds() - computed,
        "bytes": max(read_peak(), children) - before,
        "cpu": describe_machine()["cpu"],
        "kept": result.report.kept,
        "dropped": result.report.dropped,
    }


def count_processor_seconds() -> float:
    """Of this process and its children."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in usage)


def run_apart(path: str, lines: int, log: Path | str, output: Path | str, **options: Any) -> dict[str, Any]:
    """The same in a process of its own."""
    arguments = json.dumps({"path": path, "lines": lines, "log": str(log), "output": str(output), **options})
    command = [sys.executable, "-m", "benchmarks.scale.logs", "--one", arguments]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found = json.loads(answer.splitlines()[-1])
    print(path, lines, options, found, flush=True)
    return found


def compare(folder: Path, lines: int) -> dict[str, Any]:
    """Whether both paths write the same bytes, with redaction and without near-duplicates."""
    log = folder / "log"
    make_log(lines, log)
    options = {"near_duplicate_threshold": None, "redact": ["email", "phone", "key", "card"]}
    runs = {path: run_apart(path, lines, log, folder / path, **options) for path in ("one", "shared")}
    is_equal = {
        name: not subprocess.run(["cmp", *(folder / path / name for path in runs)], check=False).returncode
        for name in ("train.arrow", "test.arrow")
    }
    reports = [json.loads((folder / path / "report.json").read_text())["report"] for path in runs]
    is_equal["report"] = {**reports[0], "seconds": 0} == {**reports[1], "seconds": 0}
    return {"lines": lines, "runs": runs, "is_equal": is_equal}


def judge(folder: Path, lines: int) -> dict[str, Any]:
    """How many near-duplicates each path drops, and how many it should, by the exact Jaccard similarity."""
    from datasets import Dataset

    log = folder / "log"
    make_log(lines, log)
    rows = {}
    for name, path, threshold in (("every", "one", None), ("one", "one", THRESHOLD), ("shared", "shared", THRESHOLD)):
        run_apart(path, lines, log, folder / name, near_duplicate_threshold=threshold, test_fraction=0)
        dataset = Dataset.from_file(str(folder / name / "train.arrow"))
        rows[name] = [json.dumps([row["prompt"], row["tools"]]) for row in dataset]
    started = time.monotonic()
    kept = set(find_kept([json.loads(row) for row in rows["every"]]))
    wanted = {row for number, row in enumerate(rows["every"]) if number not in kept}
    result: dict[str, Any] = {"lines": lines, "near_duplicates": len(wanted), "seconds": time.monotonic() - started}
    for path in ("one", "shared"):
        found = set(rows["every"]) - set(rows[path])
        both = len(found & wanted)
        result[path] = {"dropped": len(found), "recall": both / len(wanted), "precision": both / len(found)}
    return result


def find_kept(rows: list[Any]) -> list[int]:
    """Rows that stay: those that are near no earlier row that stays, compared exactly.

    Candidates come from the prefix filter (Chaudhuri et al., 2006): of two sets with a Jaccard similarity of t or more,
    the first `n - ceil(t n) + 1` elements of each, in the order of their frequency, have an element in common. So
    nothing is missed, and few sets are compared.
    """
    from spec_kd.prompts.deduplication import normalize_text
    from spec_kd.prompts.similarity import END, LONG, hash_windows

    texts = [normalize_text(prompt) for prompt, _ in rows]
    contexts = [
        normalize_text("\n".join([*(m["content"] for m in prompt if m["role"] == "system"), tools or ""]))
        for prompt, tools in rows
    ]
    turns = [sum(m["role"] == "user" for m in prompt) for prompt, _ in rows]
    windows = [np.unique(hash_windows([text])[0]) for text in texts]
    unique, counts = np.unique(np.concatenate(windows), return_counts=True)

    def is_alike(one: str, other: str) -> bool:
        a, b = (np.unique(hash_windows([text])[0]) for text in (one, other))
        return len(np.intersect1d(a, b)) >= THRESHOLD * len(np.union1d(a, b))

    places: dict[tuple[int, int], list[int]] = defaultdict(list)
    kept = []
    for row, own in enumerate(windows):
        frequency = counts[np.searchsorted(unique, own)]
        size = len(own) - int(np.ceil(THRESHOLD * len(own) - 1e-9)) + 1
        prefix = own[np.lexsort((own, frequency))[:size]].tolist()
        candidates = sorted({other for window in prefix for other in places.get((turns[row], window), ())})
        for other in candidates:
            sizes = sorted((len(own), len(windows[other])))
            if sizes[0] < THRESHOLD * sizes[1]:
                continue
            common = len(np.intersect1d(own, windows[other], assume_unique=True))
            if common < THRESHOLD * (sum(sizes) - common) or not (
                contexts[row] == contexts[other] or is_alike(contexts[row], contexts[other])
            ):
                continue
            pair = texts[row], texts[other]
            if min(map(len, pair)) <= LONG or (
                is_alike(*(text[:END] for text in pair)) and is_alike(*(text[-END:] for text in pair))
            ):
                break
        else:
            kept.append(row)
            for window in prefix:
                places[turns[row], window].append(row)
    return kept


def write_report(record: dict[str, Any], folder: Path) -> None:
    """logs.md."""
    parts = [
        "# Logs beyond memory",
        f"`python -m benchmarks.scale.logs` on {record['machine']['cpu']}, one core; `shared` is "
        '`ScaleOptions(executor="local")` with one worker and a share for each 125,000 lines, `one` is one process '
        "without it. Default options unless said otherwise. Memory is what a process had above the imports.",
    ]
    rows = [
        [
            path,
            f"{int(lines):,}",
            str(len(runs)),
            *(f"{statistics.median(r[n] for r in runs):,.0f}" for n in names),
            size,
        ]
        for names in [("processor_seconds", "seconds")]
        for path, found in record.get("runs", {}).items()
        for lines, runs in sorted(found.items(), key=lambda item: int(item[0]))
        for size in [f"{max(one['bytes'] for one in runs) / 2**20:,.0f}"]
    ]
    if rows:
        parts.append("\n".join(make_table(["path", "lines", "runs", "processor seconds", "seconds", "MiB"], rows)))
        parts.append("Seconds are medians, memory the largest.")
    if equal := record.get("equal"):
        same = all(equal["is_equal"].values())
        parts += [
            "## The exact steps",
            f"{equal['lines']:,} lines with all kinds of redaction and without near-duplicates: `train.arrow`, "
            f"`test.arrow` and the report are {'the same' if same else 'NOT the same'} by both paths, byte for byte "
            f"({equal['runs']['one']['kept']:,} prompts kept).",
        ]
    if judged := record.get("judged"):
        rows = [
            [path, f"{judged[path]['dropped']:,}", *(f"{judged[path][name]:.4f}" for name in ("recall", "precision"))]
            for path in ("one", "shared")
        ]
        parts += [
            "## Near-duplicates",
            f"{judged['lines']:,} lines, of which {judged['near_duplicates']:,} prompts are nearly the same as an "
            "earlier one that stays, by the exact Jaccard similarity of all pairs that can reach the threshold of 0.8.",
            "\n".join(make_table(["path", "dropped", "recall", "precision"], rows)),
        ]
    (folder / "logs.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, nargs="*", default=[], help="Sizes whose time and memory are measured")
    parser.add_argument("--runs", type=int, default=1, help="Runs of each size")
    parser.add_argument("--paths", nargs="*", default=["shared"], choices=("one", "shared"))
    parser.add_argument("--judge", type=int, nargs="?", const=JUDGED, help="Lines whose near-duplicates are judged")
    parser.add_argument(
        "--equal", type=int, nargs="?", const=EQUAL, help="Lines of which both paths' bytes are compared"
    )
    parser.add_argument("--scratch", type=Path, help="Folder for logs and results; one of the system by default")
    parser.add_argument("--results", type=Path, default=FOLDER)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        given = json.loads(arguments.one)
        print(json.dumps(run_here(**given)))
        return
    path = arguments.results / "logs.json"
    record = json.loads(path.read_text()) if path.exists() else {"machine": describe_machine()}

    def save() -> None:
        path.write_text(json.dumps(record, indent=1) + "\n")
        write_report(record, arguments.results)

    if arguments.judge:
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
            record["judged"] = judge(Path(folder), arguments.judge)
        save()
    if arguments.equal:
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
            record["equal"] = compare(Path(folder), arguments.equal)
        save()
    for lines in arguments.lines:
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
            make_log(lines, Path(folder, "log"))
            for name in arguments.paths:
                runs = record.setdefault("runs", {}).setdefault(name, {}).setdefault(str(lines), [])
                while len(runs) < arguments.runs:
                    runs.append(run_apart(name, lines, Path(folder, "log"), Path(folder, "out")))
                    shutil.rmtree(Path(folder, "out"))
                    save()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
