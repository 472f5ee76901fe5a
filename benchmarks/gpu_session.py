"""What has to be run on a GPU, in one go of ten minutes or less: tests, losses, trainers, FSDP2 on one card.

    python -m benchmarks.gpu_session            # a GPU with 80 GB
    python -m benchmarks.gpu_session --small    # the same parts at small sizes, on any machine; writes no result

Each part is a command with a limit of time, and the rest goes on where one fails. A part that is done is not run again
until `--output_dir` is removed: its log is `<part>.log` there. Tables are written to `benchmarks/results`.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

# part -> (command on a GPU, command at small sizes, seconds at most)
PARTS: dict[str, tuple[str, str, int]] = {
    "tests": (
        "-m pytest -q -m gpu tests",
        "-m pytest -q -m gpu tests",  # skipped without a GPU, which shows that they are found and import
        150,
    ),
    "losses": (
        "-m benchmarks.losses --device cuda",
        "-m benchmarks.losses --tokens 512 --vocab 32768 --hidden 64:128 --repeats 1 --output {output}/losses.csv",
        150,
    ),
    "trainers": ("-m benchmarks.training_steps", "-m benchmarks.training_steps --pair tiny", 240),
    "shared_card": ("-m benchmarks.shared_card", "-m benchmarks.shared_card --device cpu", 60),
}


def run_part(name: str, command: str, seconds: int, folder: Path) -> str:
    """Runs a part unless it is done; returns how it went, in words."""
    done = folder / f"{name}.done"
    if done.exists():
        return "was done before"
    started = time.monotonic()
    with (folder / f"{name}.log").open("w") as log:
        try:
            status = subprocess.run(
                [sys.executable, *command.format(output=folder).split()],
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=seconds,
            ).returncode
        except subprocess.TimeoutExpired:
            return f"was stopped after {seconds} s; see {log.name}"
    took = f"in {time.monotonic() - started:.0f} s"
    if status:
        return f"failed with status {status} {took}; see {log.name}"
    done.touch()
    return f"done {took}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="Small sizes, for any machine.")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/gpu_session"), help="Folder for the logs.")
    arguments = parser.parse_args()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    failed = False
    for name in arguments.parts:
        command = PARTS[name][1 if arguments.small else 0]
        outcome = run_part(name, command, PARTS[name][2], arguments.output_dir)
        failed |= "done" not in outcome
        print(f"{name}: {outcome}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
