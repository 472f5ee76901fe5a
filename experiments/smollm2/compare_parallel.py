"""Parallel drafts from the domain's draft: each loss trains for equal time, with K tokens in one pass.

    python -m experiments.smollm2.compare_parallel --domain function_calling --minutes 5

Every method begins with the trained autoregressive draft, which also trains on by itself. On the test responses each
draft is replayed at 1 to K drafted tokens: tokens per target pass. Results are kept run by run, and a
killed run continues from its last checkpoint.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments.smollm2.conversations import DOMAINS, KEPT, MAX_NEW_TOKENS
from experiments.smollm2.score_text import load_responses, load_scored
from experiments.smollm2.train_draft import build_options, parse_training, run_trainer
from spec_kd import WhiteBoxDistillConfig, WhiteBoxDistillTrainer
from spec_kd.evaluation.response_replay import score_responses

# The options of each method, beside those of all. "pard_2" is the loss of arXiv 2605.08632, and "sft" that of PARD
# (arXiv 2504.18583): cross-entropy, but for a thousandth, so that all losses have one head. TRL's, which
# `BlackBoxSFTTrainer` has, scores every position on a CPU
METHODS: dict[str, dict[str, Any]] = {
    "autoregressive": {},
    "white_box": {},
    "sft": {"ce_weight": 0.999},
    "pard_2": {"parallel_weighting": "target_confidence", "ce_weight": 0.1 / 1.1},
    "expected_length": {"parallel_weighting": "expected_length", "divergence": "tvd"},
    "d_pace": {"parallel_weighting": "d_pace"},
}
TEXTS = ("completions", "sampled")


def measure(draft: Path, responses: Dataset, domain: str, num_tokens: int) -> dict[str, Any]:
    """Tokens per target pass on greedy responses, by the number of drafted tokens."""
    limit = MAX_NEW_TOKENS[domain]
    model = AutoModelForCausalLM.from_pretrained(draft, dtype="float32")
    scores = score_responses(model, None, responses, temperature=0.0, max_new_tokens=limit)
    return {str(gamma): list(scores.replay(gamma, limit).block_efficiency) for gamma in range(1, num_tokens + 1)}


def train(method: str, start: Path, run: Path, rows: Dataset, arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains the draft in `start` and saves it in `<run>/trained`; returns the seconds and the log."""
    options = {
        **build_options(run / "checkpoints", arguments),
        **METHODS[method],
        "learning_rate": 1e-3,
        "max_train_minutes": arguments.minutes,
        "eval_strategy": "no",
    }
    if method != "autoregressive":
        options["num_parallel_tokens"] = arguments.num_parallel_tokens
    trainer = WhiteBoxDistillTrainer(
        model=str(start),
        args=WhiteBoxDistillConfig(**options),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(start),
    )
    started = time.monotonic()
    found = run_trainer(trainer, run / "trained")
    return {"steps": trainer.state.global_step, "seconds_since_last_start": time.monotonic() - started, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domain", choices=DOMAINS, default="function_calling")
    parser.add_argument("--start", default="192x8-seed0/train", help="Run and phase of the draft that they begin with.")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--texts", nargs="+", choices=TEXTS, default=["sampled"], help="What they train on.")
    parser.add_argument("--num_parallel_tokens", type=int, default=4, help="Tokens of one pass (default: 4).")
    parser.add_argument("--minutes", type=float, default=5.0, help="Training time of each method (default: 5).")
    arguments = parse_training(parser, batch_size=8)

    folder, count = arguments.work_dir / arguments.domain, arguments.num_parallel_tokens
    test = load_responses(folder, "test")
    kept = KEPT / arguments.domain / "parallel"
    kept.mkdir(parents=True, exist_ok=True)
    for text in arguments.texts:
        for method in arguments.methods:
            name = f"{method}-{text}-{count}-seed{arguments.seed}"
            run = folder / "parallel" / name
            found = train(method, folder / arguments.start, run, load_scored(folder, text), arguments)
            efficiency = measure(run / "trained", test, arguments.domain, count)
            found = {"minutes": arguments.minutes, **found, "block_efficiency": efficiency}
            (kept / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
            print(name, found["steps"], efficiency, flush=True)


if __name__ == "__main__":
    main()
