"""How time and memory grow with lines of log, rows of completions, tokens of training data, and processes.

    python -m benchmarks.scale.growth                                    # about 10 minutes on a busy core
    python -m benchmarks.scale.growth --lines 1000000 3000000 10000000   # more sizes, hours

Data is made, and the models are tiny, so that the package's own work is what is measured. Every size runs in a process
of its own, or in several that train together. Memory is what the process had at most at 50 looks a second, less what it
had before; pages of mapped files, which the kernel takes back when it needs them, are counted apart. A size that is in
`growth.json` is not run again. Writes growth.{json,md,png} to benchmarks/results/scale.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import describe_machine
from benchmarks.query_logs import LogWriter
from spec_kd.escaping import make_table
from spec_kd.reports.plots import PICTURE_DPI, new_figure

FOLDER = Path(__file__).parents[1] / "results" / "scale"
SIZES = {
    "lines": [30_000, 100_000, 300_000],
    "rows": [3_000, 10_000, 30_000, 100_000, 300_000],
    "tokens": [30_000, 100_000, 300_000, 1_000_000],
    "processes": [1, 2],
}
TITLES = {
    "lines": "`load_query_logs`, lines of log",
    "shared lines": "`load_query_logs` with `ScaleOptions`, lines of log (`benchmarks.scale.logs`; memory with files)",
    "rows": "`generate_responses`, rows (an engine that answers at once)",
    "tokens": "`WhiteBoxDistillTrainer`, tokens of one pass (tiny models)",
    "processes": "`WhiteBoxDistillTrainer`, 300,000 tokens shared by processes (DDP, a core each)",
}
SHARED_TOKENS = 300_000
PROMPT_TOKENS, COMPLETION_TOKENS, VOCABULARY = 60, 40, 512


class MemoryWatch:
    """The most memory that this process had at one time and that belongs to no file, in bytes."""

    def __init__(self) -> None:
        self.most, self._is_done = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "MemoryWatch":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_done.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.most = max(self.most, read_status("RssAnon"))
            if self._is_done.wait(0.02):
                return


def read_status(name: str) -> int:
    """A size that the kernel knows of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def read_peak() -> int:
    """The highest resident set of this process so far, in bytes."""
    return read_status("VmHWM")


def make_log(size: int, folder: Path) -> None:
    writer = LogWriter(folder, seed=0)
    for number in range(size):
        writer.write_line(number)
    writer.close()


def read_log(size: int, folder: Path, measure: Callable[[Callable[[], Any]], dict]) -> dict:
    """Reads, filters, deduplicates and splits a log, with the default options."""
    from spec_kd.prompts.logs.query_logs import load_query_logs

    # Made by another process, which does not count
    code = f"from benchmarks.scale.growth import make_log, Path; make_log({size}, Path({str(folder)!r}))"
    subprocess.run([sys.executable, "-c", code], check=True)
    with tempfile.TemporaryDirectory() as output:
        return measure(lambda: load_query_logs(str(folder), output, show_progress=False))


def make_rows(size: int):
    """Prompts as ids, all different."""
    from datasets import Dataset

    def list_rows():
        generator = np.random.default_rng(0)
        for _ in range(size):
            yield {"prompt_ids": generator.integers(3, VOCABULARY, PROMPT_TOKENS).tolist()}

    return Dataset.from_generator(list_rows, keep_in_memory=False)


def write_rows(size: int, folder: Path, measure: Callable[[Callable[[], Any]], dict]) -> dict:
    """Writes completions with a signal, shard by shard."""
    from benchmarks.training_steps import build_tokenizer
    from spec_kd import generate_responses
    from spec_kd.engines.base import Completion, Engine
    from spec_kd.losses import SparseDistribution

    class InstantEngine(Engine):
        """Answers at once, with eight likely ids for each token."""

        name = target_name = "instant"

        def describe(self):
            return {"model": self.name}

        def check(self, prompts, options, signal):
            pass

        def generate(self, prompts, options, signal=None, seed=""):
            ids, log_p = np.arange(3, 11, dtype=np.int32), np.full(8, np.log(0.1), np.float32)
            sparse = SparseDistribution([ids] * COMPLETION_TOKENS, [log_p] * COMPLETION_TOKENS)
            return [
                Completion(prompt[:COMPLETION_TOKENS], "length", [-2.3] * COMPLETION_TOKENS, sparse)
                for prompt in prompts
            ]

    prompts = make_rows(size)
    return measure(
        lambda: generate_responses(
            InstantEngine(),
            prompts,
            processing_class=build_tokenizer(VOCABULARY),
            max_new_tokens=COMPLETION_TOKENS,
            teacher_signal="top_k_tail",
            signal_top_k=8,
            output_dir=str(folder / "responses"),
            show_progress=False,
        )
    )


def train(size: int, folder: Path, measure: Callable[[Callable[[], Any]], dict]) -> dict:
    """Prepares rows of so many tokens and trains on them once, with a live target."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from benchmarks.training_steps import build_tokenizer
    from spec_kd import WhiteBoxDistillConfig, WhiteBoxDistillTrainer

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
    draft, target = (
        LlamaForCausalLM(LlamaConfig(**shape, vocab_size=VOCABULARY, pad_token_id=0, eos_token_id=1)) for _ in range(2)
    )
    torch.set_num_threads(1)
    rows = make_rows(size // (PROMPT_TOKENS + COMPLETION_TOKENS))
    rows = rows.add_column("completion_ids", [row[:COMPLETION_TOKENS] for row in rows["prompt_ids"]])

    def run() -> None:
        args = WhiteBoxDistillConfig(
            output_dir=str(folder / "draft"), use_cpu=True, report_to="none",
            per_device_train_batch_size=32 // int(os.environ.get("WORLD_SIZE", 1)),
            save_strategy="no", disable_tqdm=True, logging_steps=1000, num_train_epochs=1,
        )  # fmt: skip
        WhiteBoxDistillTrainer(
            model=draft,
            teacher_model=target,
            args=args,
            train_dataset=rows,
            processing_class=build_tokenizer(VOCABULARY),
        ).train()

    return measure(run)


def train_together(size: int, folder: Path, measure: Callable[[Callable[[], Any]], dict]) -> dict:
    """Trains on the same tokens in so many processes; processor time is that of all, memory that of the largest."""
    command = ["accelerate", "launch", "--cpu", "--num_processes", str(size), "--num_machines", "1"]
    command += ["--module", "benchmarks.scale.growth", "--one", "tokens", str(SHARED_TOKENS)]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found = [json.loads(text) for text in re.findall(r'\{"seconds".*?\}', answer)]
    return {
        "seconds": max(one["seconds"] for one in found),
        "processor_seconds": sum(one["processor_seconds"] for one in found),
        **{name: max(one[name] for one in found) for name in ("bytes", "bytes_with_files")},
    }


KINDS = {"lines": read_log, "rows": write_rows, "tokens": train, "processes": train_together}


def run_size(kind: str, size: int) -> dict:
    """Seconds, and bytes above what the process had before, of one size."""

    def measure(work: Callable[[], Any]) -> dict:
        before, mapped_before = read_status("RssAnon"), read_peak()
        started, computed = time.monotonic(), time.process_time()
        with MemoryWatch() as memory:
            work()
        return {
            "seconds": time.monotonic() - started,
            "processor_seconds": time.process_time() - computed,
            "bytes": memory.most - before,
            "bytes_with_files": read_peak() - mapped_before,
        }

    with tempfile.TemporaryDirectory() as folder:
        return KINDS[kind](size, Path(folder), measure)


def find_slope(found: dict[str, dict], name: str) -> float:
    """Slope of the logarithm over that of the size, on the upper half of the sizes."""
    sizes = sorted(map(int, found))[-3:]
    values = [max(found[str(size)][name], 1e-9) for size in sizes]
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0]) if len(sizes) > 1 else float("nan")


def read_shared_logs(folder: Path) -> dict[str, dict]:
    """What `benchmarks.scale.logs` measured of shared reading, by the number of lines: medians, and the most memory."""
    path = folder / "logs.json"
    runs = json.loads(path.read_text()).get("runs", {}).get("shared", {}) if path.exists() else {}
    return {
        lines: {
            **{name: float(np.median([run[name] for run in own])) for name in ("processor_seconds", "seconds")},
            **dict.fromkeys(("bytes", "bytes_with_files"), max(run["bytes"] for run in own)),
        }
        for lines, own in runs.items()
    }


def write_report(record: dict, folder: Path) -> None:
    """growth.md and growth.png."""
    measured = {**record["found"], "shared lines": read_shared_logs(folder)}
    kinds = [kind for kind in TITLES if measured.get(kind)]
    parts = [
        "# Growth with size",
        f"`python -m benchmarks.scale.growth` on {record['machine']['cpu']}, one core. Processor time, and memory "
        "above what the process had before, without and with pages of mapped files. The slope is that of the "
        "logarithms over the last three sizes: 1 is linear growth, 0 none.",
    ]
    num_columns = min(3, len(kinds))
    num_rows = -(-len(kinds) // num_columns)
    figure = new_figure(4.0 * num_columns, 3.4 * num_rows)
    for i, kind in enumerate(kinds):
        found = measured[kind]
        sizes = sorted(map(int, found))
        slopes = {name: find_slope(found, name) for name in ("processor_seconds", "bytes")}
        rows = [
            [
                f"{size:,}",
                *(f"{one[name]:.1f}" for name in ("processor_seconds", "seconds")),
                *(f"{one[name] / 2**20:.0f}" for name in ("bytes", "bytes_with_files")),
            ]
            for size in sizes
            for one in [found[str(size)]]
        ]
        rows.append(["slope", f"{slopes['processor_seconds']:.2f}", "", f"{slopes['bytes']:.2f}", ""])
        header = [kind, "processor seconds", "seconds", "MiB", "MiB with mapped files"]
        parts += [f"## {TITLES[kind]}", "\n".join(make_table(header, rows))]
        axes = figure.add_subplot(num_rows, num_columns, i + 1)
        seconds = [found[str(size)]["processor_seconds"] for size in sizes]
        axes.loglog(sizes, seconds, "o-", label=f"processor seconds (slope {slopes['processor_seconds']:.2f})")
        memory = [max(found[str(size)]["bytes"] / 2**20, 1) for size in sizes]
        axes.loglog(sizes, memory, "s--", label=f"MiB (slope {slopes['bytes']:.2f})")
        axes.set_xlabel(kind)
        axes.xaxis.set_minor_formatter("")
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    (folder / "growth.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    figure.savefig(folder / "growth.png", dpi=PICTURE_DPI)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for kind, sizes in SIZES.items():  # "shared lines" are run by `benchmarks.scale.logs`
        parser.add_argument(f"--{kind}", type=int, nargs="*", default=sizes, help=TITLES[kind])
    parser.add_argument("--results", type=Path, default=FOLDER)
    parser.add_argument("--one", nargs=2, metavar=("KIND", "SIZE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(run_size(arguments.one[0], int(arguments.one[1]))))
        return
    path = arguments.results / "growth.json"
    record = json.loads(path.read_text()) if path.exists() else {"machine": describe_machine(), "found": {}}
    for kind in KINDS:
        for size in getattr(arguments, kind):
            if str(size) in record["found"].setdefault(kind, {}):
                continue
            command = [sys.executable, "-m", "benchmarks.scale.growth", "--one", kind, str(size)]
            answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            record["found"][kind][str(size)] = json.loads(answer.splitlines()[-1])
            print(kind, size, record["found"][kind][str(size)], flush=True)
            path.write_text(json.dumps(record, indent=1) + "\n")
    write_report(record, arguments.results)


if __name__ == "__main__":
    main()
