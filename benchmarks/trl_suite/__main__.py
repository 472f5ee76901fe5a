"""Runs TRL's suites with its own trainers and with ours, and prints for each test what became of it."""

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

from benchmarks.trl_suite.stand_ins import build_stand_ins

SUITES = {
    "sft": ("tests/test_sft_trainer.py", ("BlackBoxSFTTrainer", "WhiteBoxDistillTrainer")),
    "gkd": ("tests/experimental/test_gkd_trainer.py", ("OnlineGKDTrainer",)),
    "distillation": ("tests/experimental/test_distillation_trainer.py", ("OnlineGKDTrainer",)),
}
REPOSITORY = Path(__file__).resolve().parents[2]


def run_suite(checkout: Path, work: Path, suite: str, trainer: str, extra: list[str]) -> dict[str, dict[str, str]]:
    """Outcome and reason of each test of a suite, by its name, with one trainer in TRL's place."""
    file, _ = SUITES[suite]
    outcomes = work / f"{suite}-{trainer}.json"
    outcomes.unlink(missing_ok=True)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(work / "hub"),
        "HF_MODULES_CACHE": str(work / "modules"),
        "TRL_SUITE_TRAINER": trainer,
        "TRL_SUITE_WORK": str(work),
        "TRL_SUITE_OUTCOMES": str(outcomes),
    }
    command = [sys.executable, "-m", "pytest", str(checkout / file), "-q", "-p", "benchmarks.trl_suite.plugin"]
    command += ["-p", "no:cacheprovider", "-p", "no:warnings", f"--rootdir={checkout}", "--no-header", *extra]
    with (work / f"{suite}-{trainer}.log").open("w") as log:
        subprocess.run(command, env=environment, cwd=work, stdout=log, stderr=subprocess.STDOUT, check=False)
    return json.loads(outcomes.read_text(encoding="utf-8"))


def compare(theirs: dict[str, dict[str, str]], ours: dict[str, dict[str, dict[str, str]]]) -> str:
    """A Markdown table of the tests that do not pass everywhere, and the counts."""
    passing = [name for name, result in theirs.items() if result["outcome"] == "passed"]
    lines = ["| | " + " | ".join(["TRL", *ours]) + " |", "|---" * (len(ours) + 2) + "|"]
    counts = Counter(result["outcome"] for result in theirs.values())
    passed = [sum(results.get(name, {}).get("outcome") == "passed" for name in passing) for results in ours.values()]
    lines.append(f"| tests that pass with TRL's trainer | {len(passing)} | " + " | ".join(map(str, passed)) + " |")
    lines += ["", f"With TRL's trainer: {dict(counts)}.", "", "| test | TRL | ours | reason |", "|---|---|---|---|"]
    for name, result in theirs.items():
        for trainer, results in ours.items():
            own = results.get(name, {"outcome": "not run", "reason": ""})
            if own["outcome"] != "passed" or result["outcome"] != "passed":
                reason = own["reason"] or result["reason"]
                reason = reason.replace("|", "\\|")
                lines.append(f"| `{name}` | {result['outcome']} | {trainer}: {own['outcome']} | {reason} |")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trl_suite", description=__doc__)
    parser.add_argument("checkout", type=Path, help="a checkout of TRL's repository, with its tests and scripts")
    parser.add_argument("--work", type=Path, required=True, help="folder of the stand-ins and of the outcomes")
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=list(SUITES))
    parser.add_argument("--trainers", nargs="+", help="TRL and names of ours; all by default")
    parser.add_argument("--only", help="an expression that pytest's -k takes")
    parser.add_argument("--only_compare", action="store_true", help="read the outcomes of the last runs again")
    arguments = parser.parse_args()
    checkout, work = arguments.checkout.resolve(), arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    failures = build_stand_ins(checkout, work, [checkout / file for file, _ in SUITES.values()])
    for name, reason in failures.items():
        print(f"no stand-in for {name}: {reason}", file=sys.stderr)
    for suite in arguments.suites:
        _, own = SUITES[suite]
        outcomes = {}
        for trainer in ("TRL", *own):
            path = work / f"{suite}-{trainer}.json"
            if not arguments.only_compare and trainer in (arguments.trainers or ("TRL", *own)):
                outcomes[trainer] = run_suite(
                    checkout, work, suite, trainer, ["-k", arguments.only] if arguments.only else []
                )
            elif path.exists():
                outcomes[trainer] = json.loads(path.read_text(encoding="utf-8"))
        theirs = outcomes.pop("TRL", {})
        table = compare(theirs, outcomes)
        (work / f"{suite}.md").write_text(table + "\n", encoding="utf-8")
        print(f"## {suite}\n\n{table}\n", flush=True)


if __name__ == "__main__":
    main()
