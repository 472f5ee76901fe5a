"""Time and memory of the fused loss, forward and backward, against its peers and against the bare matrix products.

    python benchmarks/losses.py                      # the cells of the committed table, about an hour on two cores
    python benchmarks/losses.py --tokens 512 --vocab 32768 --hidden 64:128 --repeats 1     # a look, seconds

Every cell (tokens, vocabulary, hidden sizes) runs in a process of its own, where the methods take turns. Time is the
median of the repeats after one round that does not count, which cells of tens of seconds a call do without; memory the
peak of the resident set over its state before the call, head gradient included. A measurement during which other
processes computed is made again. A cell is written as soon as it is done, and cells that are there are not run again.
"""

import argparse
import csv
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
FLOOR = "four matrix products"
MAX_DISTURBED = 50
FIELDS = ["tokens", "vocab", "hidden", "loss", "method", "repeats", "seconds", "peak_mib"]  # fmt: skip

# (tokens, vocabulary, draft hidden : teacher hidden, methods, repeats; negative: without a round that does not count):
# all methods where the claims are made, then how it scales. Dense losses keep some ten tensors of tokens x vocabulary,
# which 2,048 tokens do not leave room for.
ALL, NO_DENSE, SCALING, OURS = "all", "no_dense", "scaling", "ours"
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


class Case:
    """Random hidden states and heads of one cell, and every way to the loss as a function without arguments."""

    def __init__(self, tokens: int, vocab: int, draft_hidden: int, teacher_hidden: int):
        generator = torch.Generator().manual_seed(0)

        def make(rows: int, columns: int, scale: float = 1.0) -> torch.Tensor:
            return torch.randn(rows, columns, generator=generator) * scale

        self.tokens, self.vocab = tokens, vocab
        self.hidden = make(tokens, draft_hidden).requires_grad_()
        self.weight = make(vocab, draft_hidden, 2 * draft_hidden**-0.5).requires_grad_()
        self.teacher_hidden = make(tokens, teacher_hidden)
        self.teacher_head = torch.nn.Linear(teacher_hidden, vocab, bias=False).requires_grad_(False)
        self.teacher_head.weight.copy_(make(vocab, teacher_hidden, 2 * teacher_hidden**-0.5))
        self.labels = torch.randint(0, vocab, (tokens,), generator=generator)

    def methods(self, which: str) -> dict[tuple[str, str], Callable[[], None]]:
        """(loss, method) -> function; imports are here so that `--help` needs nothing."""
        from spec_kd.losses import DIVERGENCES

        names = ["forward_kl"] if which == SCALING else list(DIVERGENCES)
        # Filled, so that the kernel has given every page: the floor is products, not page faults
        self.buffers = [torch.empty(self.tokens, self.vocab).fill_(0.0) for _ in range(2)]
        methods = {("-", FLOOR): self.run_products}
        for name in names:
            methods[name, "spec_kd"] = lambda name=name: self.run_fused(name, self.make_targets())
        sparse = self.make_sparse_targets(64)
        methods["forward_kl", "spec_kd, sparse top-64"] = lambda: self.run_fused("forward_kl", sparse)
        if which == OURS:
            return methods
        betas = {"forward_kl": 0.0} if which == SCALING else {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}
        for name, beta in betas.items():
            methods[name, "TRL chunked divergence"] = lambda beta=beta: self.run_trl(beta)
        if which != SCALING:
            methods["jsd", "Liger fused linear JSD"] = self.run_liger
        if which == ALL:
            methods["jsd", "TRL GKD, dense"] = lambda: self.run_gkd(0.5)
            for name in names:
                methods[name, "dense autograd"] = lambda name=name: self.run_dense(name)
        return methods

    def run_products(self) -> None:
        """The four products of a loss with a live teacher, each one call over all tokens into memory that is there."""
        logits, teacher_logits = self.buffers
        with torch.no_grad():
            torch.mm(self.hidden, self.weight.T, out=logits)
            torch.mm(self.teacher_hidden, self.teacher_head.weight.T, out=teacher_logits)
            self.kept = (logits @ self.weight, logits.T @ self.hidden)

    def make_targets(self):
        from spec_kd.heads import LogitHead, LogitTransform
        from spec_kd.trainer.teacher import LiveTargets

        head = LogitHead(self.teacher_head, LogitTransform(), self.vocab)
        return LiveTargets(self.teacher_hidden, head, torch.device("cpu"))

    def make_sparse_targets(self, k: int):
        from spec_kd.losses import SPARSE_METHODS, SparseTargets

        targets, parts = self.make_targets(), []
        for start in range(0, self.tokens, 64):
            logits = targets(slice(start, min(start + 64, self.tokens)))
            parts.append(logits.log_softmax(-1).topk(k))
        log_p, ids = (torch.cat([part[i] for part in parts]) for i in (0, 1))
        return SparseTargets(SPARSE_METHODS["top_k_tail"], ids, log_p)

    def run_fused(self, name: str, targets) -> None:
        from spec_kd.losses import build_divergence, fused_linear_divergence

        output = fused_linear_divergence(
            self.hidden, self.weight, targets, self.labels, divergence=build_divergence(name)
        )
        (output.loss / self.tokens).backward()

    def run_trl(self, beta: float) -> None:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        teacher = (self.teacher_hidden, self.teacher_head.weight, None)
        divergence, _ = ChunkedDivergenceFunction.apply(self.hidden, self.weight, None, *teacher, beta)
        (divergence.sum() / self.tokens).backward()

    def run_liger(self) -> None:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5)
        teacher = (self.teacher_hidden, self.teacher_head.weight)
        loss(self.hidden, self.weight, *teacher, self.labels).backward()

    def run_gkd(self, beta: float) -> None:
        from trl.experimental.gkd import GKDTrainer

        with torch.no_grad():
            teacher_logits = self.teacher_head(self.teacher_hidden)
        GKDTrainer.generalized_jsd_loss(self.hidden @ self.weight.T, teacher_logits, beta=beta).backward()

    def run_dense(self, name: str) -> None:
        from spec_kd.losses import dense_divergence

        with torch.no_grad():
            teacher_logits = self.teacher_head(self.teacher_hidden)
        dense_divergence(self.hidden @ self.weight.T, teacher_logits, name).mean().backward()


def measure(case: Case, function: Callable[[], None]) -> tuple[float, float]:
    """Seconds and MiB of one call that no other process disturbed: on few cores that multiplies the time."""
    for _ in range(MAX_DISTURBED):
        while read_others_cpu(0.5) > 0.05:
            time.sleep(1.0)
        others = read_others_cpu()
        seconds, peak = measure_once(case, function)
        if read_others_cpu() - others <= 0.02 * seconds + 0.1:
            return seconds, peak
        print(f"disturbed ({seconds:.2f} s), once more", file=sys.stderr, flush=True)
    raise RuntimeError(f"Other processes kept computing during {MAX_DISTURBED} tries. Give the benchmark the machine.")


def read_others_cpu(interval: float | None = None) -> float:
    """CPU seconds that other processes have used, in all or (as a share of a core) during an interval."""
    if interval is not None:
        before = read_others_cpu()
        time.sleep(interval)
        return (read_others_cpu() - before) / interval
    user, nice, system, _, _, irq, softirq, *_ = map(int, Path("/proc/stat").read_text().split()[1:9])
    own = os.times()
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK") - own.user - own.system


def measure_once(case: Case, function: Callable[[], None]) -> tuple[float, float]:
    """Seconds, and MiB of the resident set's peak over its state before (Linux: the kernel's own high-water mark)."""
    case.hidden.grad = case.weight.grad = case.kept = None
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = read_status("VmRSS")
    started = time.perf_counter()
    function()
    seconds = time.perf_counter() - started
    return seconds, (read_status("VmHWM") - before) / 1024


def read_status(name: str) -> int:
    """A line of /proc/self/status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])


def run_cell(tokens: int, vocab: int, hidden: str, which: str, repeats: int) -> list[dict]:
    """All methods of a cell, taking turns."""
    case = Case(tokens, vocab, *map(int, hidden.split(":")))
    methods = case.methods(which)
    measured = {key: [] for key in methods}
    has_warm_up, repeats = repeats > 0, abs(repeats)
    for repeat in range(repeats + has_warm_up):
        for key, function in methods.items():
            seconds, peak = measure(case, function)
            if repeat >= has_warm_up:
                measured[key].append((seconds, peak))
            print(f"{tokens} x {vocab}, {hidden}, {key}: {seconds:.2f} s, {peak:.0f} MiB", file=sys.stderr, flush=True)
    return [
        {
            "tokens": tokens, "vocab": vocab, "hidden": hidden, "loss": loss, "method": method, "repeats": repeats,
            "seconds": round(statistics.median(seconds for seconds, _ in values), 3),
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
    parser.add_argument("--output", type=Path, default=RESULTS / "losses.csv")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    own = [(args.tokens, args.vocab, args.hidden, args.methods, args.repeats)] if args.tokens else None
    if args.in_process:
        print(json.dumps(run_cell(*own[0])))
        return
    rows = []
    if own is None and args.output.exists():
        rows = list(csv.DictReader(args.output.open()))
    for tokens, vocab, hidden, which, repeats in own or CELLS:
        if any((row["tokens"], row["vocab"], row["hidden"]) == (str(tokens), str(vocab), hidden) for row in rows):
            continue
        options = {"tokens": tokens, "vocab": vocab, "hidden": hidden, "methods": which, "repeats": repeats}
        command = [sys.executable, __file__, "--in-process", "--threads", str(args.threads)]
        command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        rows += [{name: str(value) for name, value in row.items()} for row in json.loads(output.splitlines()[-1])]
        if own is None:
            write_csv(rows, args.output)
    if own is None:
        from losses_report import write_report

        write_report(args.output, args.threads)
    else:
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
