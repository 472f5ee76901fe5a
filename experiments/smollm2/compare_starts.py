"""What a draft gains from where its weights come from: each start trains for equal steps on the same text.

    python -m experiments.smollm2.compare_starts --steps 200

Layers cut from the target and weights sliced from it, beside fresh layers of the same shape. The greedy acceptance on
the validation responses is replayed before training and after it; results are kept start by start.
"""

import argparse
import json
from typing import Any

from transformers import AutoTokenizer

from experiments.smollm2.compare_methods import measure
from experiments.smollm2.conversations import DOMAINS, KEPT, find_target
from experiments.smollm2.score_text import load_responses, load_scored
from experiments.smollm2.train_draft import SHAPES, build_options, parse_training, run_trainer
from spec_kd import WhiteBoxDistillConfig, WhiteBoxDistillTrainer, init_draft

NARROW = SHAPES["192x4"]
WIDE = {"num_hidden_layers": 4}  # of the target's width
STARTS: dict[str, dict[str, Any]] = {
    "wide-cut": WIDE,
    "wide-fresh": {**WIDE, "fresh_layers": True},
    "narrow-sliced": NARROW,
    "narrow-fresh": {**NARROW, "fresh_layers": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domain", choices=DOMAINS, default="function_calling")
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS))
    parser.add_argument("--steps", type=int, default=200, help="Steps of training (default: 200).")
    arguments = parse_training(parser, batch_size=8)

    folder = arguments.work_dir / arguments.domain
    target = find_target(arguments.work_dir, arguments.domain)
    validation = load_responses(folder, "validation")
    kept = KEPT / arguments.domain / "starts"
    kept.mkdir(parents=True, exist_ok=True)
    for name in arguments.starts:
        run = folder / "starts" / f"{name}-seed{arguments.seed}"
        if not (run / "init").exists():
            draft = init_draft(str(target), responses=load_responses(folder, "draft"), **STARTS[name])
            draft.save_pretrained(run / "init")
        options = {
            **build_options(run / "checkpoints", arguments),
            "learning_rate": 1e-3,
            "max_steps": arguments.steps,
            "eval_strategy": "no",
        }
        trainer = WhiteBoxDistillTrainer(
            model=str(run / "init"),
            args=WhiteBoxDistillConfig(**options),
            train_dataset=load_scored(folder, "completions"),
            processing_class=AutoTokenizer.from_pretrained(target),
        )
        found = {
            "steps": arguments.steps,
            "before": measure(run / "init", validation, arguments.domain),
            **run_trainer(trainer, run / "trained"),
            "after": measure(run / "trained", validation, arguments.domain),
        }
        (kept / f"{name}-seed{arguments.seed}.json").write_text(json.dumps(found, indent=1) + "\n")
        print(name, found["before"]["alpha"], found["after"]["alpha"], flush=True)


if __name__ == "__main__":
    main()
