"""What the evaluation claims, measured: replay against `generate`, predicted against measured speed-up, batches.

    python -m benchmarks.evaluation --data_dir DATA --work_dir outputs/evaluation

DATA is described in build_models.py. The draft is trained on the target's answers first, so that there is acceptance to
measure. Writes evaluation.{json,md} and the report of the drafts before and after (`evaluation_report/`) to
`results_dir`. The prompts' own text is left out of the report: it is not ours to publish.
"""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import TrlParser

from benchmarks import build_models
from benchmarks.harness import describe_machine
from examples.made_up.embedded_run import use_all_cores
from examples.made_up.record import save_record
from spec_kd import (
    WhiteBoxDistillConfig,
    WhiteBoxDistillTrainer,
    evaluate_draft,
    generate_assisted,
    generate_responses,
    generate_speculatively,
    save_report,
)
from spec_kd.evaluation import measure_assisted_costs, score_responses

BUILD_DEFAULTS = {"vocab_size": 32768, "general_steps": 400, "domain_steps": 600, "draft_steps": 800}
GAMMA = 5
GAMMAS = range(1, 17)
PREDICTED_GAMMAS = (2, 5, 8)
ASSISTED, BATCHED = "assisted generation, batch 1", "ours, batch 16"


@dataclass
class EvaluationArguments:
    r"""
    Args:
        work_dir (`str`): Where models, answers and the trained draft are kept.
        results_dir (`str`): Where the record is written.
        num_train_prompts (`int`): Prompts answered to train the draft.
        num_prompts (`int`): Prompts of the comparison of replay and `generate`.
        num_report_prompts (`int`): Prompts of the report.
        num_timed_prompts (`int`): Prompts that assisted generation is timed on, and as many others for its costs.
        max_new_tokens (`int`): Longest answer.
        steps (`int`): Optimizer steps of the draft.
    """

    work_dir: str = field(default="outputs/evaluation", metadata={"help": "Where everything is kept."})
    results_dir: str = field(
        default=str(Path(__file__).parent / "results"), metadata={"help": "Where the record is written."}
    )
    num_train_prompts: int = field(default=256, metadata={"help": "Prompts answered to train the draft."})
    num_prompts: int = field(default=64, metadata={"help": "Prompts of replay against `generate`."})
    num_report_prompts: int = field(default=96, metadata={"help": "Prompts of the report."})
    num_timed_prompts: int = field(default=12, metadata={"help": "Prompts of speed, and others of costs."})
    max_new_tokens: int = field(default=128, metadata={"help": "Longest answer."})
    steps: int = field(default=120, metadata={"help": "Optimizer steps of the draft."})


class Timer:
    """Seconds of a block."""

    def __enter__(self):
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_):
        self.seconds = time.perf_counter() - self._started


def train_draft(arguments: EvaluationArguments, generic_draft: str, target, tokenizer, prompts: Dataset) -> str:
    """A draft distilled from the target, trained once and kept."""
    folder = Path(arguments.work_dir) / "draft"
    if (folder / "model.safetensors").exists():
        return str(folder)
    rows = generate_responses(
        target, prompts, processing_class=tokenizer, max_new_tokens=arguments.max_new_tokens, temperature=1.0,
        batch_size=32, output_dir=str(Path(arguments.work_dir) / "training_completions"),
    )  # fmt: skip
    options = WhiteBoxDistillConfig(
        output_dir=str(folder), max_steps=arguments.steps, per_device_train_batch_size=8, learning_rate=1.5e-3,
        lr_scheduler_type="cosine", warmup_steps=20, max_length=None, gradient_checkpointing=False, bf16=False,
        report_to="none", save_strategy="no", logging_steps=50, seed=0,
    )  # fmt: skip
    trainer = WhiteBoxDistillTrainer(
        model=generic_draft, teacher_model=target, args=options, train_dataset=rows, processing_class=tokenizer
    )
    trainer.train()
    trainer.save_model()
    return str(folder)


def compare_with_generate(arguments, draft, target, tokenizer, prompts: Dataset) -> dict:
    """Replay of 16 gammas against one run of assisted generation on the same prompts, greedy."""
    common = {"max_new_tokens": arguments.max_new_tokens}
    with Timer() as writing:
        texts = generate_responses(
            target, prompts, processing_class=tokenizer, temperature=0.0, batch_size=32, show_progress=False, **common
        )
    vocab_size = len(tokenizer)
    with Timer() as replaying:
        scores = score_responses(draft, None, texts, vocab_size=vocab_size, batch_size=32, temperature=0.0)
        figures = {gamma: scores.replay(gamma, arguments.max_new_tokens) for gamma in GAMMAS}
    with Timer() as assisting:
        assisted = generate_assisted(
            target, draft, texts["prompt_ids"], num_assistant_tokens=GAMMA, vocab_size=vocab_size,
            eos_token_id=tokenizer.eos_token_id, **common,
        )  # fmt: skip
    return {
        "prompts": len(prompts),
        "seconds": {"writing": writing.seconds, "replay": replaying.seconds, "assisted": assisting.seconds},
        "target_calls_equal": int((assisted.target_calls == figures[GAMMA].target_calls.round(9)).sum()),
        "block_efficiency": {
            "replay": list(figures[GAMMA].block_efficiency),
            "assisted": list(assisted.block_efficiency),
        },
    }


def compare_sampled(arguments, draft, target, tokenizer, prompts: Dataset) -> dict:
    """Assisted generation at temperature 1 and the replay of the very text it wrote."""
    assisted = generate_assisted(
        target, draft, [row["prompt_ids"] for row in prompts], temperature=1.0, num_assistant_tokens=GAMMA,
        max_new_tokens=arguments.max_new_tokens, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    rows = [
        {"prompt_ids": row["prompt_ids"], "completion_ids": ids}
        for row, ids in zip(prompts, assisted.completion_ids, strict=True)
    ]
    scores = score_responses(draft, target, rows, temperature=1.0, vocab_size=len(tokenizer), batch_size=16)
    replayed = scores.replay(GAMMA, arguments.max_new_tokens)
    difference = assisted.target_calls - replayed.target_calls
    return {
        "block_efficiency": {"replay": list(replayed.block_efficiency), "assisted": list(assisted.block_efficiency)},
        "z": float(difference.mean() / (difference.std(ddof=1) / np.sqrt(len(difference)))),
    }


def compare_prediction(arguments, draft, target, tokenizer, timed: Dataset, others: Dataset) -> list[dict]:
    """Predicted and measured speed-up of assisted generation, greedy, at several gammas; rounds timed on others."""
    common = {
        "max_new_tokens": arguments.max_new_tokens, "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    costs = measure_assisted_costs(
        draft, target, [row["prompt_ids"] for row in others], gammas=PREDICTED_GAMMAS, **common
    )
    rows = []
    for gamma in PREDICTED_GAMMAS:
        measured = generate_assisted(
            target,
            draft,
            [row["prompt_ids"] for row in timed],
            num_assistant_tokens=gamma,
            measure_speed=True,
            **common,
        )
        texts = [
            {"prompt_ids": row["prompt_ids"], "completion_ids": ids}
            for row, ids in zip(timed, measured.completion_ids, strict=True)
        ]
        replayed = score_responses(draft, None, texts, vocab_size=len(tokenizer), temperature=0.0).replay(
            gamma, arguments.max_new_tokens
        )
        lengths = np.array([len(row["prompt_ids"]) for row in timed])
        rows.append(
            {
                "gamma": gamma,
                "measured": list(measured.speedup),
                "predicted": float(costs.predict_speedup(lengths, replayed.tokens, replayed.target_calls, gamma)),
                "cost_ratio": costs.costs.cost_ratio,
                "round_overhead": costs.costs.round_overhead,
                "verify_cost": costs.costs.verify(gamma),
            }
        )
    return rows


def compare_batches(arguments, draft, target, tokenizer, prompts: Dataset) -> dict:
    """Tokens per second of batched speculative decoding and of assisted generation one by one."""
    ids = [row["prompt_ids"] for row in prompts]
    common = {
        "num_assistant_tokens": GAMMA, "max_new_tokens": arguments.max_new_tokens, "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    speeds, texts = {}, {}
    for name in (ASSISTED, BATCHED):
        with Timer() as timer:
            if name == ASSISTED:
                texts[name] = generate_assisted(target, draft, ids, **common).completion_ids
            else:
                texts[name] = generate_speculatively(target, draft, ids, batch_size=16, **common).completion_ids
        speeds[name] = sum(map(len, texts[name])) / timer.seconds
    return {
        "prompts": len(ids),
        "tokens_per_second": speeds,
        "equal_texts": sum(a == b for a, b in zip(texts[ASSISTED], texts[BATCHED], strict=True)),
    }


def write_table(record: dict, path: Path) -> None:
    """`evaluation.md`."""
    against, sampled, batches = record["replay"], record["sampled"], record["batches"]
    seconds = against["seconds"]
    factor = seconds["assisted"] / seconds["replay"]
    both = seconds["assisted"] / (seconds["replay"] + seconds["writing"])
    speeds = batches["tokens_per_second"]
    ratio = speeds[BATCHED] / speeds[ASSISTED]
    machine = record["machine"]
    lines = [
        "# Evaluation: what it claims, measured",
        "",
        f"`{record['command']}` on {machine['cpu']}, {machine['threads']} threads, float32; target "
        f"{record['parameters']['target'] / 1e6:.1f} M, draft {record['parameters']['draft'] / 1e6:.1f} M parameters, "
        f"vocabulary {record['vocab_size']:,}, real function-calling prompts, at most {record['max_new_tokens']} new "
        "tokens.",
        "",
        "| figure | value | asked for |",
        "|---|---|---|",
        f"| greedy: prompts whose target calls are equal, replayed and assisted, of {against['prompts']} "
        f"| {against['target_calls_equal']} | all |",
        f"| temperature 1: replayed minus assisted target calls, paired z | {sampled['z']:+.2f} | within 2 |",
        f"| replay of gamma 1..16 ({seconds['replay']:.1f} s) against one assisted run at gamma {GAMMA} "
        f"({seconds['assisted']:.1f} s), text at hand | {factor:.0f}x faster | >= 20x |",
        f"| the same with the text still to be written ({seconds['writing']:.1f} s) | {both:.1f}x faster | |",
        f"| batched speculative decoding at 16 against assisted generation at 1 "
        f"({speeds[BATCHED]:.0f} and {speeds[ASSISTED]:.0f} tokens/s) "
        f"| {ratio:.1f}x | >= 4x |",
        f"| its texts equal to assisted generation's, of {batches['prompts']} | {batches['equal_texts']} | all |",
    ]
    for row in record["prediction"]:
        value, low, high = row["measured"]
        lines.append(
            f"| speed-up at gamma {row['gamma']}: measured {value:.3f} [{low:.3f}, {high:.3f}], predicted "
            f"{row['predicted']:.3f} | {row['predicted'] / value - 1:+.1%} | within 10 % |"
        )
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(argv: list[str]) -> None:
    parser = TrlParser((EvaluationArguments, build_models.BuildArguments))
    parser.set_defaults_with_config(**BUILD_DEFAULTS)
    arguments, build = parser.parse_args_and_config(argv)
    use_all_cores()
    models, corpus = build_models.build_from_folder(build)
    tokenizer = AutoTokenizer.from_pretrained(models.domain_target)
    target = AutoModelForCausalLM.from_pretrained(models.domain_target).eval()
    room = target.config.max_position_embeddings - arguments.max_new_tokens

    def fitting(rows: list[dict]) -> Dataset:
        encode = tokenizer.apply_chat_template
        kept = [
            {"prompt_ids": ids}
            for row in rows
            if len(ids := encode(row["prompt"], add_generation_prompt=True, return_dict=False)) <= room
        ]
        return Dataset.from_list(kept)

    test_prompts = fitting(corpus.domain_test)
    draft_path = train_draft(
        arguments, models.generic_draft, target, tokenizer, fitting(corpus.domain_train[: arguments.num_train_prompts])
    )
    draft = AutoModelForCausalLM.from_pretrained(draft_path).eval()
    some = test_prompts.select(range(arguments.num_prompts))
    timed = test_prompts.select(range(arguments.num_timed_prompts))
    others = test_prompts.select(range(len(test_prompts) - arguments.num_timed_prompts, len(test_prompts)))
    record = {
        "command": "python -m benchmarks.evaluation --data_dir DATA",
        "machine": describe_machine(),
        "vocab_size": len(tokenizer),
        "max_new_tokens": arguments.max_new_tokens,
        "parameters": {"target": target.num_parameters(), "draft": draft.num_parameters()},
        "replay": compare_with_generate(arguments, draft, target, tokenizer, some),
        "sampled": compare_sampled(arguments, draft, target, tokenizer, some.select(range(len(some) // 2))),
        "prediction": compare_prediction(arguments, draft, target, tokenizer, timed, others),
        "batches": compare_batches(arguments, draft, target, tokenizer, some),
    }
    folder = Path(arguments.results_dir)
    folder.mkdir(parents=True, exist_ok=True)
    save_record(record, folder / "evaluation.json")
    write_table(record, folder / "evaluation.md")
    report = evaluate_draft(
        {"generic draft": models.generic_draft, "distilled draft": draft_path},
        target,
        test_prompts.select(range(arguments.num_report_prompts)),
        processing_class=tokenizer,
        max_new_tokens=arguments.max_new_tokens,
        batch_sizes=(1, 8),
        num_assisted_prompts=6,
        show_prompt_text=False,
        batch_size=16,
        output_dir=str(Path(arguments.work_dir) / "report_texts"),
    )
    save_report(report, folder / "evaluation_report")
    print((folder / "evaluation.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    torch.set_float32_matmul_precision("highest")
    main(sys.argv[1:])
