"""Time and memory of the fused loss, forward and backward, against its peers and against the bare matrix products.

    python -m benchmarks.losses                      # the cells of the committed table, about an hour on two cores
    python -m benchmarks.losses --device cuda        # the cells of the GPU's table, some minutes
    python -m benchmarks.losses --tokens 512 --vocab 32768 --hidden 64:128 --repeats 1     # a look, seconds

Every cell (tokens, vocabulary, hidden sizes) runs in a process of its own, where the methods take turns. Time is the
median of the repeats after one round that does not count, which cells of tens of seconds a call do without; memory the
peak of the resident set over its state before the call, head gradient included. A measurement during which other
processes computed is made again. On a GPU there are CUDA events and the allocator's peak, and the methods run one after
the other. A cell is written as soon as it is done, and cells that are there are not run again.
"""

import argparse
import csv
import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.loss_cases import ALL, NO_DENSE, OURS, SCALING, Case
from benchmarks.loss_meters import measure, measure_on_gpu
from benchmarks.losses_report import write_report

RESULTS = Path(__file__).parent / "results"
FIELDS = ["tokens", "vocab", "hidden", "loss", "method", "repeats", "seconds", "peak_mib"]  # fmt: skip

# (tokens, vocabulary, draft hidden : teacher hidden, methods, repeats; negative: without a round that does not count):
# all methods where the claims are made, then how it scales.
CELLS = [
    (512, 151936, "256:384", ALL, 3),
    (512, 151936, "896:3584", ALL, 2),
    (2048, 151936, "256:384", NO_DENSE, 2),
    (2048, 151936, "896:3584", NO_DENSE, -2),
    (1024, 151936, "256:384", SCALING, 2),
    (1024, 262144, "256:384", SCALING, 2),
    (4096, 32768, "256:384", SCALING, 2),
    (4096, 151936, "256:384", SCALING, -2),
    (8192, 151936, "256:384", SCALING, -2),
]
# Heads of Qwen2.5-0.5B <- 7B, Llama-3.2-1B <- 3.1-8B and Gemma 3 270M <- 4B
GPU_CELLS = [
    (4096, 151936, "896:3584", ALL, 10),
    (8192, 128256, "2048:4096", SCALING, 10),
    (512, 151936, "896:3584", SCALING, 20),
    (16384, 151936, "896:3584", SCALING, 10),
    (8192, 262144, "640:2560", SCALING, 10),
]


def run_cell(tokens: int, vocab: int, hidden: str, which: str, repeats: int, device: str) -> list[dict]:
    """All methods of a cell: taking turns on a CPU, one after the other on a GPU, which nothing else slows down."""
    case = Case(tokens, vocab, *map(int, hidden.split(":")), device)
    methods = case.methods(which)
    measured = {key: [] for key in methods}
    has_warm_up, repeats = repeats > 0, abs(repeats)
    on_gpu = device == "cuda"
    for round_ in range(1 if on_gpu else repeats + has_warm_up):
        for key, function in methods.items():
            seconds, peak = measure_on_gpu(case, function, repeats) if on_gpu else measure(case, function)
            if on_gpu or round_ >= has_warm_up:
                measured[key].append((seconds, peak))
            print(f"{tokens} x {vocab}, {hidden}, {key}: {seconds:.4f} s, {peak:.0f} MiB", file=sys.stderr, flush=True)
    return [
        {
            "tokens": tokens, "vocab": vocab, "hidden": hidden, "loss": loss, "method": method, "repeats": repeats,
            "seconds": round(statistics.median(seconds for seconds, _ in values), 3 if device == "cpu" else 6),
            "peak_mib": round(max(peak for _, peak in values)),
        }
        for (loss, method), values in measured.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, help="one cell of your own, with --vocab and --hidden")
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--hidden", default="256:384", help="draft:teacher")
    parser.add_argument("--methods", choices=[ALL, NO_DENSE, SCALING, OURS], default=ALL)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="cuda has cells of its own, in bfloat16"
    )
    parser.add_argument("--output", type=Path, help="losses.csv or losses_gpu.csv in results/ by default")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    output = args.output or RESULTS / ("losses.csv" if args.device == "cpu" else "losses_gpu.csv")
    own = [(args.tokens, args.vocab, args.hidden, args.methods, args.repeats)] if args.tokens else None
    if args.in_process:
        print(json.dumps(run_cell(*own[0], args.device)))
        return
    rows = []
    if own is None and output.exists():
        rows = list(csv.DictReader(output.open()))
    for tokens, vocab, hidden, which, repeats in own or (CELLS if args.device == "cpu" else GPU_CELLS):
        if any((row["tokens"], row["vocab"], row["hidden"]) == (str(tokens), str(vocab), hidden) for row in rows):
            continue
        options = {"tokens": tokens, "vocab": vocab, "hidden": hidden, "methods": which, "repeats": repeats}
        options |= {"threads": args.threads, "device": args.device}
        command = [sys.executable, "-m", "benchmarks.losses", "--in-process"]
        command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        rows += [{name: str(value) for name, value in row.items()} for row in json.loads(printed.splitlines()[-1])]
        if own is None:
            write_csv(rows, output)
            write_report(output)
    if own is not None:
        for row in rows:
            print(row)


def write_csv(rows: list[dict], path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
