"""Makes the draft of a domain and trains it: on conversations that the target read, or on its own completions.

    python -m experiments.smollm2.train_draft --domain function_calling --phase pretrain
    python -m experiments.smollm2.train_draft --domain function_calling --phase train

Both phases read stored signals, so that the target is not there. The second one begins with the draft of the first
where there is one. A killed run continues from its last checkpoint. `<work_dir>/<domain>/<run>/<phase>` is the draft
after a phase.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from transformers import AutoTokenizer, Trainer
from transformers.trainer_utils import get_last_checkpoint

from experiments.smollm2.conversations import DOMAINS, find_fast_dtype, find_target
from experiments.smollm2.score_text import TEXTS, load_responses, load_scored
from spec_kd import SpeculativeEvalCallback, WhiteBoxDistillConfig, WhiteBoxDistillTrainer, init_draft

# As `plan_draft` names them: width and layers
SHAPES: dict[str, dict[str, Any]] = {
    "192x4": {
        "hidden_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "intermediate_size": 512,
    },
    # Layers are cheap beside the head, and one matrix for embedding and head halves the file
    "192x8": {
        "hidden_size": 192,
        "num_hidden_layers": 8,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "intermediate_size": 512,
        "tie_word_embeddings": True,
    },
    "256x4": {
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 704,
    },
}
PHASES = {"pretrain": ("conversations",), "train": ("completions", "sampled")}
"""The texts that each phase reads, where `--texts` names no others."""
COLUMNS = ["prompt_ids", "completion_ids", "teacher_token_logprobs", "teacher_signal", "teacher_info"]


def make_draft(folder: Path, target: Path, responses: Dataset, shape: str) -> None:
    """The draft before training: fresh layers on the target's embeddings, projected."""
    found = init_draft(str(target), responses=responses, fresh_layers=True, **SHAPES[shape])
    print(found.summary, flush=True)
    found.save_pretrained(folder)


def parse_training(parser: argparse.ArgumentParser, batch_size: int) -> argparse.Namespace:
    """The arguments of a script that trains, with those that all of them have."""
    parser.add_argument("--batch_size", type=int, default=batch_size, help="Rows of a step (default: %(default)s).")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/smollm2"))
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1).")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    return arguments


def build_options(output_dir: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Options of all trainers."""
    return {
        "output_dir": str(output_dir),
        "max_length": 1024,
        "per_device_train_batch_size": arguments.batch_size,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 50,
        "weight_decay": 0.01,
        "eval_strategy": "steps",
        "eval_steps": 200,
        "logging_steps": 20,
        "save_steps": 100,
        "save_total_limit": 1,
        "use_cpu": True,
        "bf16": find_fast_dtype() == "bfloat16",
        "gradient_checkpointing": False,
        "model_init_kwargs": {"dtype": "float32"},
        "report_to": "none",
        "seed": arguments.seed,
    }


def run_trainer(trainer: Trainer, output: Path) -> dict[str, Any]:
    """Trains, from the last checkpoint where there is one, and saves the draft; returns the log."""
    checkpoints = trainer.args.output_dir
    trainer.train(resume_from_checkpoint=get_last_checkpoint(checkpoints) if Path(checkpoints).exists() else None)
    trainer.save_model(str(output))
    return {"log": trainer.state.log_history}


def train(run: Path, phase: str, start: Path, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains the draft in `start` and saves it in `<run>/<phase>`; returns the log."""
    texts = [load_scored(folder, text) for text in arguments.texts or PHASES[phase]]
    rows = texts[0] if len(texts) == 1 else concatenate_datasets([text.select_columns(COLUMNS) for text in texts])
    held_out = load_scored(folder, "validation")
    trainer = WhiteBoxDistillTrainer(
        model=str(start),
        args=WhiteBoxDistillConfig(
            num_train_epochs=arguments.epochs,
            learning_rate=arguments.learning_rate,
            train_sampling_strategy="group_by_length",
            **build_options(run / f"{phase}-checkpoints", arguments),
        ),
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=AutoTokenizer.from_pretrained(start),
        callbacks=[SpeculativeEvalCallback(held_out, temperatures=(0.0,), num_assistant_tokens=3)],
    )
    return run_trainer(trainer, run / phase)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domain", choices=DOMAINS, required=True)
    parser.add_argument("--phase", choices=PHASES, required=True)
    parser.add_argument("--texts", nargs="+", choices=TEXTS, help="What the phase reads (default: all of its texts).")
    parser.add_argument("--shape", choices=SHAPES, default="192x4")
    parser.add_argument("--epochs", type=float, default=3.0, help="Passes over the text (default: 3).")
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="At its highest (default: 0.002).")
    arguments = parse_training(parser, batch_size=4)

    folder = arguments.work_dir / arguments.domain
    target = find_target(arguments.work_dir, arguments.domain)
    run = folder / f"{arguments.shape}-seed{arguments.seed}"
    if not (run / "init").exists():
        make_draft(run / "init", target, load_responses(folder, "draft"), arguments.shape)
    is_second = arguments.phase == "train" and (run / "pretrain").exists()
    start = run / ("pretrain" if is_second else "init")
    started = time.monotonic()
    record = train(run, arguments.phase, start, folder, arguments)
    record |= {"seconds_since_last_start": time.monotonic() - started, "start": start.name}
    record |= {name: getattr(arguments, name) for name in ("epochs", "batch_size", "learning_rate")}
    (run / f"{arguments.phase}.json").write_text(json.dumps(record, indent=1))
    print(f"The draft after {arguments.phase} is in {run / arguments.phase}.")


if __name__ == "__main__":
    main()
