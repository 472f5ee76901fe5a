"""Tokens per second of a first phase on text of others, on one core: scoring it, and training a narrow draft on it.

    taskset -c 1 python -m benchmarks.pretraining --target TARGET --corpus texts.jsonl  # about 4 minutes
    python -m benchmarks.pretraining --report                                           # the table again

Each figure stands beside its limit: the rate of a large matrix product on this core, divided by the operations that the
matrices of target and draft need for a token. Tokens are counted per second of the process's own time, so that other
programs on the core take little part in the figures. A part that the record has is not measured again.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TrainerCallback

from benchmarks.harness import describe_machine
from spec_kd import (
    WhiteBoxDistillConfig,
    WhiteBoxDistillTrainer,
    init_draft,
    score_completions,
    tokenize_corpus,
)
from spec_kd.cli.rows import load_rows, take_first

RECORD = Path(__file__).parent / "results" / "pretraining.json"
SHAPE = {
    "hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 3, "num_key_value_heads": 1,
    "intermediate_size": 512,
}  # fmt: skip
MAX_LENGTH = 512
STEPS = 3  # the first one does not count
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PADDED = {"per_device_train_batch_size": 8}
PACKED = {"packing": True, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
JOINED = {"packing": True, "per_device_train_batch_size": 4}
# (what the draft learns from, dtype of a live target, dtype of the draft's products, options of the trainer)
TRAININGS = {
    "top_k_tail, float32, padded": ("top_k_tail", None, "float32", PADDED),
    "top_k_tail, bf16, padded": ("top_k_tail", None, "bfloat16", {**PADDED, "bf16": True}),
    "top_k_tail, bf16, 16 rows padded, by length": (
        "top_k_tail", None, "bfloat16",
        {"bf16": True, "per_device_train_batch_size": 16, "train_sampling_strategy": "group_by_length"},
    ),
    "top_k_tail, bf16, 4 rows packed, one at a time": ("top_k_tail", None, "bfloat16", {**PACKED, "bf16": True}),
    "top_k_tail, bf16, 4 rows packed, joined": ("top_k_tail", None, "bfloat16", {**JOINED, "bf16": True}),
    "top_k_tail, bf16, 8 rows packed, joined": (
        "top_k_tail", None, "bfloat16", {**JOINED, "bf16": True, "per_device_train_batch_size": 8},
    ),
    "top_k_tail, bf16 weights, padded": (
        "top_k_tail", None, "bfloat16", {**PADDED, "model_init_kwargs": {"dtype": "bfloat16"}},
    ),
    "sampled_logprobs, bf16, padded": ("sampled_logprobs", None, "bfloat16", {**PADDED, "bf16": True}),
    "live target in bf16, bf16, padded": ("live", "bfloat16", "bfloat16", {**PADDED, "bf16": True}),
    "live target in bf16, bf16, 4 rows packed, one at a time": (
        "live", "bfloat16", "bfloat16", {**PACKED, "bf16": True},
    ),
    "live target in bf16, bf16, 4 rows packed, joined": ("live", "bfloat16", "bfloat16", {**JOINED, "bf16": True}),
    "live target in float32, float32, 4 rows packed, one at a time": ("live", "float32", "float32", PACKED),
}  # fmt: skip
SCORINGS = (("top_k_tail", "bfloat16"), ("sampled_logprobs", "bfloat16"), ("top_k_tail", "float32"))


class StepTimes(TrainerCallback):
    """Own seconds of the process at the end of each step."""

    def __init__(self):
        self.seconds: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.process_time())


def measure_seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    started = time.process_time()
    result = function()
    return time.process_time() - started, result


def measure_rate(dtype: torch.dtype) -> float:
    """Operations per second of a large product, the best of five."""
    factor = torch.randn(2048, 2048).to(dtype)
    return 2 * 2048**3 / min(measure_seconds(lambda: factor @ factor)[0] for _ in range(5))


def count_weights(model: PreTrainedModel) -> int:
    """Numbers in the matrices that every token is multiplied with, the head included."""
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))


def train(draft: str, rows: Dataset, teacher: PreTrainedModel | None, tokenizer, options: dict) -> float:
    """Tokens per second of the steps after the first one."""
    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        args = WhiteBoxDistillConfig(**{
            "output_dir": folder, "max_steps": STEPS, "logging_steps": 1, "report_to": "none", "save_strategy": "no",
            "disable_tqdm": True, "use_cpu": True, "gradient_checkpointing": False, "max_length": MAX_LENGTH,
            "completion_only_loss": None if teacher is None else False, **options,
        })  # fmt: skip
        trainer = WhiteBoxDistillTrainer(
            draft, args, train_dataset=rows, teacher_model=teacher, processing_class=tokenizer, callbacks=[times]
        )
        trainer.train()
    counts = [log["num_tokens"] for log in trainer.state.log_history if "num_tokens" in log]
    return (counts[STEPS - 1] - counts[0]) / (times.seconds[-1] - times.seconds[0])


def measure(target: str, corpus: str, folder: str, path: Path) -> None:
    """Measures what the record does not have yet, and writes it after each part."""
    tokenizer = AutoTokenizer.from_pretrained(target)
    rows = tokenize_corpus(take_first(load_rows(corpus), 400), tokenizer, max_length=MAX_LENGTH)
    models = {name: AutoModelForCausalLM.from_pretrained(target, dtype=dtype) for name, dtype in DTYPES.items()}
    init_draft(
        models["float32"], fresh_layers=True, responses=rows, num_samples=8, processing_class=tokenizer, **SHAPE
    ).save_pretrained(folder)
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {
        "machine": describe_machine(), "rates": {name: measure_rate(dtype) for name, dtype in DTYPES.items()},
        "weights": {
            "target": count_weights(models["float32"]),
            "draft": count_weights(AutoModelForCausalLM.from_pretrained(folder)),
        },
        "mean_length": sum(map(len, rows["completion_ids"])) / len(rows) + 1, "scoring": {}, "training": {},
    }  # fmt: skip
    few, rates, weights = rows.select(range(16)), record["rates"], record["weights"]

    def score(signal: str, dtype: str) -> tuple[float, Dataset]:
        return measure_seconds(lambda: score_completions(
            models[dtype], few, processing_class=tokenizer, teacher_signal=signal, show_progress=False
        ))  # fmt: skip

    @cache
    def find_rows(source: str) -> Dataset:
        # what is trained on takes longer to score than to train on, so the rows are repeated
        return rows if source == "live" else score(source, "bfloat16")[1].select([i % 16 for i in range(64)])

    def keep(kind: str, name: str, tokens_per_second: float, seconds_at_limit: float) -> None:
        record[kind][name] = {"tokens_per_second": tokens_per_second, "limit": 1 / seconds_at_limit}
        path.write_text(json.dumps(record, indent=2) + "\n")
        print(name, json.dumps(record[kind][name]), flush=True)

    for signal, dtype in SCORINGS:
        if f"{signal}, {dtype}" not in record["scoring"]:
            tokens = sum(map(len, few["completion_ids"]))
            keep(
                "scoring", f"{signal}, {dtype}", tokens / score(signal, dtype)[0], 2 * weights["target"] / rates[dtype]
            )
    for name, (source, teacher, dtype, options) in TRAININGS.items():
        if name not in record["training"]:
            seconds = 6 * weights["draft"] / rates[dtype]  # forward once, backward twice
            seconds += 0.0 if teacher is None else 2 * weights["target"] / rates[teacher]
            live = None if teacher is None else models[teacher]
            keep("training", name, train(folder, find_rows(source), live, tokenizer, options), seconds)


def write_report(path: Path) -> None:
    """`pretraining.md` beside the JSON."""
    record = json.loads(path.read_text())
    machine, rates = record["machine"], record["rates"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    weights = {name: f"{count / 1e6:.0f}" for name, count in record["weights"].items()}
    text = [
        "# A first phase on text of others, on one core",
        "",
        f"`python -m benchmarks.pretraining` on one core of an {machine['cpu']}, one thread; {versions}. Matrices of "
        f"{weights['target']} M numbers in the target, {weights['draft']} M in the draft (width 192, 4 layers; with "
        f"the head), rows of {record['mean_length']:.0f} tokens on average, at most {MAX_LENGTH}. Tokens per second of "
        "the process's own time. The limit is the rate of a product of 2,048 x 2,048 matrices "
        f"({rates['float32'] / 1e9:.0f} GFLOP/s in float32, {rates['bfloat16'] / 1e9:.0f} in bfloat16) divided by the "
        "operations of these matrices; attention, the softmax over the vocabulary and padding are not in it.",
    ]
    for title, what in (("scoring", "signal, dtype of the target"), ("training", "from, dtype of products, batch")):
        text += ["", f"| {title}: {what} | tokens a second | limit | share |", "|---|---|---|---|"]
        text += [
            f"| {name} | {row['tokens_per_second']:,.0f} | {row['limit']:,.0f} | "
            f"{row['tokens_per_second'] / row['limit']:.0%} |"
            for name, row in record[title].items()
        ]
    path.with_suffix(".md").write_text("\n".join(text) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", help="folder of the target")
    parser.add_argument("--corpus", help="file of text, or of prompts with completions")
    parser.add_argument("--report", action="store_true", help="write the table of the record again")
    parser.add_argument("--output", type=Path, default=RECORD)
    args = parser.parse_args()
    if not args.report:
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as folder:
            measure(args.target, args.corpus, folder, args.output)
    write_report(args.output)


if __name__ == "__main__":
    main()
