"""The paper's comparisons with the real target: each method trains the generic draft for equal time.

    python -m experiments.smollm2.compare_methods --minutes 20

White-box, black-box and on-policy training begin with the draft of the general set, which was trained for the target
that nobody moved. Offline methods read the stored completions; what the target took to write and score them is not in
their time, and stands beside it in the README. On the test responses each draft's acceptance is replayed, and
that of the generic draft. (arXiv 2503.07807, sections 4.2 to 4.4)
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from experiments.smollm2.conversations import KEPT, MAX_NEW_TOKENS, find_fast_dtype, find_target
from experiments.smollm2.keep_draft import restore_draft
from experiments.smollm2.score_text import load_responses, load_scored
from experiments.smollm2.train_draft import build_options, parse_training, run_trainer
from spec_kd import (
    OnlineGKDConfig,
    OnlineGKDTrainer,
    SpeculativeEvalCallback,
    WhiteBoxDistillConfig,
    WhiteBoxDistillTrainer,
    replay,
)

DOMAIN = "function_calling"
NUM_DRAFT_TOKENS = 3
Options = dict[str, Any]


def make_white_box(rows: Dataset, target: Path, options: Options, common: Options) -> Trainer:
    """Forward KL to the stored signals of the target."""
    return WhiteBoxDistillTrainer(args=WhiteBoxDistillConfig(**options), train_dataset=rows, **common)


def make_black_box(rows: Dataset, target: Path, options: Options, common: Options) -> Trainer:
    """Cross-entropy on the target's completions, but for a thousandth, so that all methods have one head.

    TRL's head, which `BlackBoxSFTTrainer` has, scores every position on a CPU and takes half a minute a step.
    """
    return WhiteBoxDistillTrainer(args=WhiteBoxDistillConfig(ce_weight=0.999, **options), train_dataset=rows, **common)


def make_on_policy(rows: Dataset, target: Path, options: Options, common: Options) -> Trainer:
    """The loss of the live target, on texts that the draft writes in training."""
    args = OnlineGKDConfig(
        lmbda=1.0, max_new_tokens=64, teacher_model_init_kwargs={"dtype": find_fast_dtype()}, **options
    )
    prompts = rows.select_columns(["prompt_ids"])
    return OnlineGKDTrainer(args=args, teacher_model=str(target), train_dataset=prompts, **common)


METHODS: dict[str, Callable[[Dataset, Path, Options, Options], Trainer]] = {
    "white_box": make_white_box,
    "black_box": make_black_box,
    "on_policy": make_on_policy,
}


def measure(draft: Path, responses: Dataset, domain: str) -> dict[str, Any]:
    """Greedy acceptance on responses of the target, as llama-server counts it."""
    metrics = replay(
        AutoModelForCausalLM.from_pretrained(draft, dtype="float32"),
        None,
        responses,
        temperature=0.0,
        max_new_tokens=MAX_NEW_TOKENS[domain],
        num_assistant_tokens=NUM_DRAFT_TOKENS,
        serving_engine="llama.cpp",
    )
    assert metrics.alpha is not None  # greedy acceptance is exact
    return {"alpha": list(metrics.alpha), "block_efficiency": list(metrics.block_efficiency)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument(
        "--start", default="192x8-seed0/train", help="Run and phase of the generic draft; else the kept one."
    )
    parser.add_argument("--minutes", type=float, default=20.0, help="Training time of each method (default: 20).")
    arguments = parse_training(parser, batch_size=8)

    folder = arguments.work_dir / DOMAIN
    generic = arguments.work_dir / "general" / arguments.start
    if not generic.exists():
        generic = restore_draft(arguments.work_dir, "general")
    scored = {text: load_scored(folder, text) for text in ("completions", "validation")}
    test = load_responses(folder, "test")
    kept = KEPT / DOMAIN / "compared"
    kept.mkdir(parents=True, exist_ok=True)
    (kept / "generic.json").write_text(json.dumps(measure(generic, test, DOMAIN), indent=1) + "\n")
    for method in arguments.methods:
        run = folder / f"compare-seed{arguments.seed}"
        options = {
            **build_options(run / f"{method}-checkpoints", arguments),
            "learning_rate": 1e-3,
            "max_train_minutes": arguments.minutes,
        }
        common = {
            "model": str(generic),
            "eval_dataset": scored["validation"],
            "processing_class": AutoTokenizer.from_pretrained(generic),
            "callbacks": [SpeculativeEvalCallback(scored["validation"], temperatures=(0.0,), num_assistant_tokens=3)],
        }
        target = find_target(arguments.work_dir, DOMAIN)
        found = run_trainer(METHODS[method](scored["completions"], target, options, common), run / method)
        found |= {"minutes": arguments.minutes, **measure(run / method, test, DOMAIN)}
        (kept / f"{method}-seed{arguments.seed}.json").write_text(json.dumps(found, indent=1) + "\n")
        print(method, found["alpha"], found["block_efficiency"], flush=True)


if __name__ == "__main__":
    main()
