"""The cached teacher against a live one: bytes on disk, alpha after training, speed of training and of generation.

    python -m benchmarks.offline_cache --data_dir DATA
    python -m benchmarks.offline_cache --data_dir DATA --domain function_calling --domain_steps 3000 --num_draws 35

DATA is described in build_models.py. The target answers prompts once; every signal is of the same text. A draft is
trained from some at equal steps, and from the live target; plain fine-tuning is timed. The target of the first command
learns generated conversations, of which it becomes fairly sure; that of the second, real text, of which one this small
stays unsure: there draws say less and take more room. Every part is kept in `work_dir` when it is done, and the same
command continues. Writes offline_cache_<domain>.{json,md,png} to `results_dir`.
"""

import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import TrlParser

from benchmarks import build_models
from benchmarks.harness import describe_machine, keep_part
from benchmarks.offline_cache_metrics import compare, describe_alpha, describe_without_target, sum_column_bytes
from benchmarks.offline_cache_report import LIVE, PLAIN, UNSIGNED, write_report
from examples.made_up.embedded_run import use_all_cores
from examples.made_up.models import BuiltModels
from examples.made_up.record import save_record
from spec_kd import (
    BlackBoxSFTConfig,
    BlackBoxSFTTrainer,
    WhiteBoxDistillConfig,
    WhiteBoxDistillTrainer,
    generate_responses,
    score_completions,
)
from spec_kd.data.teacher_signal import TeacherInfo, unpack_sparse
from spec_kd.evaluation import ResponseScores, score_responses

ID_COLUMNS = ["prompt", "completion", "prompt_ids", "completion_ids"]
TIMED_STEPS = 20
TEMPERATURES = (0.0, 1.0)


@dataclass(frozen=True)
class Signals:
    """What is kept of the target, by name.

    Args:
        num_draws (`int`): Of the two sampled signals.
    """

    num_draws: int

    @property
    def trained(self) -> tuple[str, str]:
        """The signals that drafts are trained from."""
        return (f"sampled_counts, {self.num_draws} draws", f"sampled_logprobs, {self.num_draws} draws")

    @property
    def written(self) -> str:
        """The signal that is kept while the target writes; drafts without a signal learn from its texts."""
        return self.trained[0]

    @property
    def requests(self) -> dict[str, dict[str, Any]]:
        """Options of all signals."""
        return {
            "token_only": {"teacher_signal": "token_only"},
            self.trained[0]: {"teacher_signal": "sampled_counts", "num_draws": self.num_draws},
            self.trained[1]: {"teacher_signal": "sampled_logprobs", "num_draws": self.num_draws},
            "top_k_tail": {"teacher_signal": "top_k_tail"},
        }


@dataclass
class CacheArguments:
    r"""
    Args:
        work_dir (`str`): Where answers and results of the parts are kept.
        results_dir (`str`): Where the record is written.
        num_train_prompts (`int`): Prompts that the target answers for training; 5,800 are seen once in 725 steps of 8.
        num_size_prompts (`int`): Prompts whose answers are measured on disk, and trained from where speed is timed.
        num_test_prompts (`int`): Prompts that alpha is measured on.
        max_new_tokens (`int`): Longest answer.
        steps (`int`): Optimizer steps of every draft.
        num_draws (`int`): Draws a token of the sampled signals.
        timing_rounds (`int`): How often generation with and without each signal takes turns.
    """

    work_dir: str = field(default="outputs/offline_cache", metadata={"help": "Where the parts are kept."})
    results_dir: str = field(
        default=str(Path(__file__).parent / "results"), metadata={"help": "Where the record is written."}
    )
    num_train_prompts: int = field(default=5800, metadata={"help": "Prompts answered for training."})
    num_size_prompts: int = field(default=400, metadata={"help": "Prompts whose answers are measured on disk."})
    num_test_prompts: int = field(default=400, metadata={"help": "Prompts that alpha is measured on."})
    max_new_tokens: int = field(default=128, metadata={"help": "Longest answer."})
    steps: int = field(default=725, metadata={"help": "Optimizer steps of every draft."})
    num_draws: int = field(default=50, metadata={"help": "Draws a token of the sampled signals."})
    timing_rounds: int = field(default=3, metadata={"help": "Rounds of the generation timing."})


BUILD_DEFAULTS = {
    "domain": build_models.GENERATED,
    "vocab_size": 32768,
    "general_steps": 400,
    "domain_steps": 2000,
    "draft_steps": 800,
    "build_in_bf16": True,
}


class StepTimer(TrainerCallback):
    """Seconds of every optimizer step, from its first forward to the end of its update."""

    def __init__(self):
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **_):
        self._started = time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        self.seconds.append(time.perf_counter() - self._started)


class Benchmark:
    """The parts, each kept as JSON in `work_dir` once it is done."""

    def __init__(self, arguments: CacheArguments, models: BuiltModels, corpus: Any, domain: str):
        self.arguments, self.models, self.signals = arguments, models, Signals(arguments.num_draws)
        self.folder = Path(arguments.work_dir) / domain
        self.folder.mkdir(parents=True, exist_ok=True)
        self.target = AutoModelForCausalLM.from_pretrained(models.domain_target).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(models.domain_target)
        room = self.target.config.max_position_embeddings - arguments.max_new_tokens
        fits = [self._fitting(rows, room) for rows in (corpus.domain_train, corpus.domain_test)]
        self.train_prompts = Dataset.from_list(fits[0][: arguments.num_train_prompts])
        self.size_prompts = self.train_prompts.select(range(arguments.num_size_prompts))
        self.test_prompts = Dataset.from_list(fits[1][: arguments.num_test_prompts])

    def _fitting(self, rows: list[dict], room: int) -> list[dict]:
        prompts = [{"prompt": row["prompt"]} for row in rows]
        encode = self.tokenizer.apply_chat_template
        return [p for p in prompts if len(encode(p["prompt"], add_generation_prompt=True, return_dict=False)) <= room]

    def part(self, name: str, compute) -> Any:
        """The result of a part, computed unless it is there."""
        path = self.folder / f"{name_folder(name)}.json"
        return keep_part(path, compute)

    def answer(self, prompts: Dataset, signal: str, temperature: float, folder: str) -> Dataset:
        """The target's answers, from disk where they are there."""
        return generate_responses(
            self.target,
            prompts,
            processing_class=self.tokenizer,
            max_new_tokens=self.arguments.max_new_tokens,
            temperature=temperature,
            batch_size=32,
            output_dir=str(self.folder / folder),
            **self.signals.requests[signal],
        )

    def complete_prompts(self, prompts: Dataset, signal: str) -> Dataset:
        """Answers sampled at temperature 1: written once, with one signal; the others are added to the same text."""
        folder = self.name_answers(prompts, signal)
        if signal == self.signals.written:
            return self.answer(prompts, signal, 1.0, folder)
        return score_completions(
            self.target,
            self.complete_prompts(prompts, self.signals.written).select_columns(ID_COLUMNS),
            processing_class=self.tokenizer,
            sampling_temperature=1.0,
            max_new_tokens=self.arguments.max_new_tokens,
            batch_size=32,
            output_dir=str(self.folder / folder),
            **self.signals.requests[signal],
        )

    def name_answers(self, prompts: Dataset, signal: str) -> str:
        """The folder of answers."""
        return f"answers/{len(prompts)}/{name_folder(signal)}"

    def measure_size(self, signal: str) -> dict:
        """Bytes on disk per completion token of all that a signal adds, as Parquet keeps it."""
        rows = self.complete_prompts(self.size_prompts, signal)
        path = self.folder / self.name_answers(self.size_prompts, signal) / "responses.parquet"
        tokens = sum(map(len, rows["completion_ids"]))
        sizes = sum_column_bytes(path)
        columns = {name: size for name, size in sizes.items() if name.startswith("teacher_")}
        distinct = None
        if "teacher_signal" in rows.column_names:
            info = TeacherInfo.from_json(rows["teacher_info"][0])
            counts = [
                unpack_sparse(content, len(ids), info)[1]
                for content, ids in zip(rows["teacher_signal"], rows["completion_ids"], strict=True)
            ]
            distinct = float(np.concatenate(counts).mean())
        return {
            "tokens": tokens,
            "bytes_per_token": sum(columns.values()) / tokens,
            "by_column": {name: size / tokens for name, size in columns.items()},
            "ids_per_token": distinct,
        }

    def time_generation(self) -> dict[str, list[float]]:
        """Seconds for the same 32 prompts with no signal and with each, taking turns; the first round is left out."""
        prompts = self.train_prompts.select(range(min(32, len(self.train_prompts))))
        seconds: dict[str, list[float]] = {name: [] for name in (UNSIGNED, *self.signals.trained, "top_k_tail")}
        for number in range(self.arguments.timing_rounds + 1):
            for name, measured in seconds.items():
                started = time.perf_counter()
                generate_responses(
                    self.target,
                    prompts,
                    processing_class=self.tokenizer,
                    max_new_tokens=self.arguments.max_new_tokens,
                    temperature=1.0,
                    batch_size=32,
                    show_progress=False,
                    **self.signals.requests.get(name, {}),
                )
                if number:
                    measured.append(time.perf_counter() - started)
        return seconds

    def train(self, method: str) -> dict:
        """Trains the generic draft by one method; its loss, and alpha per test prompt."""
        signal = method if method in self.signals.trained else self.signals.written
        rows = self.complete_prompts(self.train_prompts, signal)
        trainer = self.make_trainer(method, rows, self.arguments.steps)
        trainer.train()
        loss = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        return {"loss": loss, **self.measure_alpha(trainer.model, method == LIVE)}

    def time_training(self) -> dict[str, float]:
        """Median seconds of an optimizer step of each method, on the answers whose size was measured."""
        seconds = {}
        for method in (LIVE, PLAIN, *self.signals.trained):
            signal = method if method in self.signals.trained else self.signals.written
            rows = self.complete_prompts(self.size_prompts, signal)
            timer = StepTimer()
            self.make_trainer(method, rows, TIMED_STEPS, callbacks=[timer]).train()
            seconds[method] = statistics.median(timer.seconds[5:])
        return seconds

    def make_trainer(self, method: str, rows: Dataset, steps: int, callbacks: Sequence[TrainerCallback] = ()) -> Any:
        """The trainer of a method over the generic draft."""
        if method not in self.signals.trained:
            rows = rows.select_columns(ID_COLUMNS)
        options = {
            "output_dir": str(self.folder / "runs" / name_folder(method)),
            "max_steps": steps,
            "per_device_train_batch_size": 8,
            "learning_rate": 1.5e-3,
            "lr_scheduler_type": "cosine",
            "warmup_steps": min(20, steps // 2),
            "max_length": None,
            "gradient_checkpointing": False,
            "bf16": False,
            "report_to": "none",
            "save_strategy": "no",
            "logging_steps": 50,
            "seed": 0,
        }
        common = {
            "model": AutoModelForCausalLM.from_pretrained(self.models.generic_draft),
            "train_dataset": rows,
            "processing_class": self.tokenizer,
            "callbacks": list(callbacks),
        }
        if method == PLAIN:
            return BlackBoxSFTTrainer(args=BlackBoxSFTConfig(**options), **common)
        teacher = {"teacher_model": self.target} if method == LIVE else {}
        return WhiteBoxDistillTrainer(args=WhiteBoxDistillConfig(**options), **teacher, **common)

    def measure_alpha(self, draft, all_ways: bool = False) -> dict:
        """Sums of alpha per test prompt at each temperature; for one draft also from the stored texts alone."""
        result: dict[str, Any] = {}
        for temperature in TEMPERATURES:
            texts = self.answer(self.test_prompts, "token_only", temperature, f"test/t{temperature:g}")
            scores = score_responses(draft, self.target, texts, temperature=temperature, batch_size=16)
            result[f"T={temperature:g}"] = {
                "alpha_sum": scores.alpha_sum.tolist(),
                "tokens": scores.lengths.tolist(),
                "block_efficiency": self._efficiency(scores),
            }
            if all_ways:
                alone = score_responses(draft, None, texts, temperature=temperature, batch_size=16)
                result[f"T={temperature:g}"]["without_target"] = {
                    "alpha_sum": alone.alpha_sum.tolist(),
                    "block_efficiency": self._efficiency(alone),
                    "largest_difference_of_acceptance": float((alone.acceptance - scores.acceptance).abs().max()),
                }
        return result

    def _efficiency(self, scores: ResponseScores) -> list[float]:
        return list(scores.replay(5, self.arguments.max_new_tokens).block_efficiency)


def name_folder(name: str) -> str:
    """A name as part of a path."""
    return name.replace(",", "").replace(" ", "_")


def main(argv: list[str]) -> None:
    parser = TrlParser((CacheArguments, build_models.BuildArguments))
    parser.set_defaults_with_config(**BUILD_DEFAULTS)
    arguments, build = parser.parse_args_and_config(argv)
    use_all_cores()
    models, corpus = build_models.build_from_folder(build)
    benchmark = Benchmark(arguments, models, corpus, build.domain)
    signals = benchmark.signals
    sizes = {
        signal: benchmark.part(f"size {signal}", lambda s=signal: benchmark.measure_size(s))
        for signal in signals.requests
    }
    generation = benchmark.part("generation", benchmark.time_generation)
    before = benchmark.part(
        "before", lambda: benchmark.measure_alpha(AutoModelForCausalLM.from_pretrained(models.generic_draft))
    )
    results = {
        method: benchmark.part(f"train {method}", lambda m=method: benchmark.train(m))
        for method in (LIVE, *signals.trained)
    }
    speeds = benchmark.part("training speed", benchmark.time_training)
    record = {
        "what": f"{build.domain} conversations, target answers sampled at temperature 1",
        "command": f"python -m benchmarks.offline_cache {shlex.join(argv)}",
        "machine": describe_machine(),
        "vocab_size": len(benchmark.tokenizer),
        "parameters": {
            "target": benchmark.target.num_parameters(),
            "draft": models.records["generic_draft"]["num_parameters"],
        },
        "train_prompts": len(benchmark.train_prompts),
        "test_prompts": len(benchmark.test_prompts),
        "steps": arguments.steps,
        "num_draws": arguments.num_draws,
        "models": models.records,
        "sizes": sizes,
        "generation_seconds": generation,
        "alpha": {f"T={t:g}": describe_alpha({"generic draft": before, **results}, t) for t in TEMPERATURES},
        "alpha_minus_live": {f"T={t:g}": compare(results, t) for t in TEMPERATURES},
        "block_efficiency": {
            f"T={t:g}": {m: r[f"T={t:g}"]["block_efficiency"] for m, r in {"generic draft": before, **results}.items()}
            for t in TEMPERATURES
        },
        "without_target": {f"T={t:g}": describe_without_target(results[LIVE][f"T={t:g}"]) for t in TEMPERATURES},
        "seconds_per_step": speeds,
    }
    folder = Path(arguments.results_dir)
    folder.mkdir(parents=True, exist_ok=True)
    save_record(record, folder / f"offline_cache_{build.domain}.json")
    write_report(folder / f"offline_cache_{build.domain}.json")


if __name__ == "__main__":
    torch.set_float32_matmul_precision("highest")
    main(sys.argv[1:])
