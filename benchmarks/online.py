"""On-policy distillation against its peers in TRL: tokens per second at equal settings, and time to a given alpha.

    python -m benchmarks.online --data_dir DATA --work_dir outputs/online

DATA is described in build_models.py. `OnlineGKDTrainer`, TRL's `DistillationTrainer` and TRL's GKD train the same
generic draft on the same prompts, an optimizer step each in turn (interleaved_training.py). Every part is kept in
`work_dir` when it is done; the same command continues. Writes online.{json,md,png} to `results_dir`. About 12
minutes on two cores.
"""

import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from trl import TrlParser

from benchmarks import build_models
from benchmarks.harness import describe_machine, keep_part
from benchmarks.interleaved_training import PARTS, train_in_turns
from benchmarks.online_report import write_report
from benchmarks.online_trainers import OURS, TRAINERS, EqualSettings, make_trainer
from examples.made_up.embedded_run import use_all_cores
from examples.made_up.models import BuiltModels
from examples.made_up.record import save_record
from spec_kd import generate_responses
from spec_kd.evaluation import bootstrap, score_responses

BUILD_DEFAULTS = {"vocab_size": 32768, "general_steps": 400, "domain_steps": 600, "draft_steps": 800}
BATCHES = {"8 prompts": (8, 1), "32 prompts in 4 micro batches": (8, 4)}
WARM_UP = 1  # steps of every trainer that do not count


@dataclass
class OnlineArguments:
    r"""
    Args:
        work_dir (`str`): Where answers and results of the parts are kept.
        results_dir (`str`): Where the record is written.
        max_prompt_tokens (`int`): Longest prompt.
        max_new_tokens (`int`): Longest completion.
        timed_prompts (`int`): Prompts that speed is measured on with every batch, after a step that does not count.
        alpha_steps (`int`): Optimizer steps of the race to a given alpha.
        eval_steps (`int`): Steps between two measurements of alpha.
        num_test_prompts (`int`): Prompts that alpha is measured on.
        beta (`float`): Of the divergence, in TRL's convention: 0 is forward KL.
        learning_rate (`float`): Constant.
        seed (`int`): Of the sampling.
    """

    work_dir: str = field(default="outputs/online", metadata={"help": "Where the parts are kept."})
    results_dir: str = field(
        default=str(Path(__file__).parent / "results"), metadata={"help": "Where the record is written."}
    )
    max_prompt_tokens: int = field(default=320, metadata={"help": "Longest prompt."})
    max_new_tokens: int = field(default=128, metadata={"help": "Longest completion."})
    timed_prompts: int = field(default=160, metadata={"help": "Prompts that speed is measured on."})
    alpha_steps: int = field(default=30, metadata={"help": "Steps of the race to a given alpha."})
    eval_steps: int = field(default=3, metadata={"help": "Steps between two measurements of alpha."})
    num_test_prompts: int = field(default=96, metadata={"help": "Prompts that alpha is measured on."})
    beta: float = field(default=0.0, metadata={"help": "Of the divergence: 0 is forward KL, 1 reverse KL."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Constant learning rate."})
    seed: int = field(default=0, metadata={"help": "Seed of the sampling."})


class Benchmark:
    """The parts, each kept as JSON in `work_dir` once it is done."""

    def __init__(self, arguments: OnlineArguments, models: BuiltModels, corpus: Any):
        self.arguments, self.models = arguments, models
        self.folder = Path(arguments.work_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._check_arguments()
        self.tokenizer = AutoTokenizer.from_pretrained(models.domain_target)
        self.train_rows, test_rows = (self._fitting(rows) for rows in (corpus.domain_train, corpus.domain_test))
        self.test_prompts = [{"prompt": row["prompt"]} for row in test_rows[: arguments.num_test_prompts]]

    def _check_arguments(self) -> None:
        measured = {key: value for key, value in vars(self.arguments).items() if not key.endswith("_dir")}
        measured["target"] = self.models.domain_target
        kept = self.part("arguments", lambda: measured)
        if kept != measured:
            raise ValueError(
                f"{self.folder} has parts measured with {kept}, not with {measured}. Use another `work_dir`."
            )

    def _fitting(self, rows: list[dict]) -> list[dict]:
        return [row for row in rows if self.count_prompt_tokens(row) <= self.arguments.max_prompt_tokens]

    def count_prompt_tokens(self, row: dict) -> int:
        """Tokens of a row's prompt, as the models read it."""
        encoded = self.tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        return len(encoded)

    def part(self, name: str, compute: Callable[[], Any]) -> Any:
        """The result of a part, computed unless it is there."""
        path = self.folder / f"{name.replace(' ', '_')}.json"
        return keep_part(path, compute)

    def make_settings(self, batch: str, steps: int) -> EqualSettings:
        """What is equal for all trainers with one of `BATCHES`."""
        return EqualSettings(
            *BATCHES[batch],
            max_new_tokens=self.arguments.max_new_tokens,
            max_steps=steps,
            beta=self.arguments.beta,
            learning_rate=self.arguments.learning_rate,
            seed=self.arguments.seed,
        )

    def train(self, settings: EqualSettings, **evaluation: Any) -> dict[str, dict[str, list]]:
        """All trainers in turns, from the generic draft."""
        trainers = {
            name: make_trainer(
                name,
                settings,
                self.train_rows,
                self.models.generic_draft,
                self.models.domain_target,
                self.tokenizer,
                str(self.folder / "runs" / name.replace(" ", "_")),
            )
            for name in TRAINERS
        }
        return train_in_turns(trainers, **evaluation)

    def count_timed_steps(self, batch: str) -> int:
        """Optimizer steps over the timed prompts."""
        return self.arguments.timed_prompts // math.prod(BATCHES[batch])

    def time_steps(self, batch: str) -> dict[str, list[dict]]:
        """Steps of each trainer without those that warm up."""
        run = self.train(self.make_settings(batch, self.count_timed_steps(batch) + WARM_UP))
        return {name: result["steps"][WARM_UP:] for name, result in run.items()}

    def race(self) -> dict[str, Any]:
        """`before` (alpha of the generic draft), and of each trainer its steps and alpha as it trains."""
        target = AutoModelForCausalLM.from_pretrained(self.models.domain_target).eval()
        texts = generate_responses(
            target,
            Dataset.from_list(self.test_prompts),
            processing_class=self.tokenizer,
            max_new_tokens=self.arguments.max_new_tokens,
            temperature=1.0,
            batch_size=32,
            output_dir=str(self.folder / "test_answers"),
        )

        def measure_alpha(draft: PreTrainedModel) -> list[float]:
            scores = score_responses(draft, target, texts, temperature=1.0, batch_size=16)
            columns = scores.alpha_sum.numpy(), scores.lengths.numpy()
            return list(bootstrap(lambda alpha, tokens: alpha / tokens, *columns))

        run = self.train(
            self.make_settings(next(iter(BATCHES)), self.arguments.alpha_steps),
            evaluate=measure_alpha,
            eval_steps=self.arguments.eval_steps,
        )
        return {"before": measure_alpha(AutoModelForCausalLM.from_pretrained(self.models.generic_draft)), "run": run}


def describe_speed(steps: dict[str, list[dict]]) -> dict[str, Any]:
    """Tokens per second of each trainer, ours over each (95 % intervals over steps), and the parts of a step."""
    columns = {
        name: [np.array([step[key] for step in own]) for key in ("tokens", "seconds")] for name, own in steps.items()
    }
    ratios = {
        name: list(bootstrap(lambda a, b, c, d: (a / b) / (c / d), *columns[OURS], *own))
        for name, own in columns.items()
        if name != OURS
    }
    return {
        "steps": steps,
        "tokens_per_second": {name: list(bootstrap(lambda a, b: a / b, *own)) for name, own in columns.items()},
        "ours_over": ratios,
        "seconds_per_step": {name: float(own[1].mean()) for name, own in columns.items()},
        "tokens_per_step": {name: float(own[0].mean()) for name, own in columns.items()},
        "seconds_per_part": {
            name: {part: statistics.fmean(step["parts"].get(part, 0.0) for step in own) for part in PARTS}
            for name, own in steps.items()
        },
    }


def describe_race(result: dict[str, Any]) -> dict[str, Any]:
    """Curves of alpha over seconds and tokens, and when each trainer reached the highest alpha that all reached."""
    curves = {}
    for name, own in result["run"].items():
        seconds = np.cumsum([0.0] + [step["seconds"] for step in own["steps"]])
        tokens = np.cumsum([0] + [step["tokens"] for step in own["steps"]])
        points = [{"step": 0, "result": result["before"]}, *own["evaluations"]]
        curves[name] = [
            {
                "step": point["step"],
                "seconds": float(seconds[point["step"]]),
                "tokens": int(tokens[point["step"]]),
                "alpha": point["result"],
            }
            for point in points
        ]
    goal = min(max(point["alpha"][0] for point in curve) for curve in curves.values())
    return {
        "goal": goal,
        "curves": curves,
        "to_goal": {name: find_crossing(curve, goal) for name, curve in curves.items()},
    }


def find_crossing(curve: list[dict], goal: float) -> dict[str, float]:
    """Steps, seconds and tokens at which a curve first reaches `goal`, linear between two of its points."""
    for before, after in pairwise(curve):
        low, high = before["alpha"][0], after["alpha"][0]
        if high >= goal:
            share = (goal - low) / (high - low)
            return {key: before[key] + share * (after[key] - before[key]) for key in ("step", "seconds", "tokens")}
    raise ValueError(f"alpha never rose to {goal}: the draft did not learn. Raise `alpha_steps`.")


def main(argv: list[str]) -> None:
    parser = TrlParser((OnlineArguments, build_models.BuildArguments))
    parser.set_defaults_with_config(**BUILD_DEFAULTS)
    arguments, build = parser.parse_args_and_config(argv)
    use_all_cores()
    models, corpus = build_models.build_from_folder(build)
    benchmark = Benchmark(arguments, models, corpus)
    throughput = {
        batch: describe_speed(benchmark.part(f"throughput {batch}", lambda b=batch: benchmark.time_steps(b)))
        for batch in BATCHES
    }
    race = describe_race(benchmark.part("time to alpha", benchmark.race))
    prompt_lengths = [benchmark.count_prompt_tokens(row) for row in benchmark.train_rows]
    settings = {
        batch: benchmark.make_settings(batch, benchmark.count_timed_steps(batch) + WARM_UP) for batch in BATCHES
    }
    record = {
        "what": f"prompts of {build.domain} of `data_dir`, completions sampled from the draft at temperature 1",
        "command": "python -m benchmarks.online --data_dir DATA",
        "machine": describe_machine(),
        "vocab_size": len(benchmark.tokenizer),
        "models": models.records,
        "prompt_tokens": {"median": statistics.median(prompt_lengths), "most": max(prompt_lengths)},
        "beta": arguments.beta,
        "settings": {b: {name: own.options(name) for name in TRAINERS} for b, own in settings.items()},
        "throughput": throughput,
        "time_to_alpha": {"batch": next(iter(BATCHES)), "test_prompts": len(benchmark.test_prompts), **race},
    }
    folder = Path(arguments.results_dir)
    folder.mkdir(parents=True, exist_ok=True)
    save_record(record, folder / "online.json")
    write_report(folder / "online.json")


if __name__ == "__main__":
    torch.set_float32_matmul_precision("highest")
    main(sys.argv[1:])
