"""The three data scenarios on real biology questions, each from raw input to an evaluated draft by `spec-kd run`.

    python -m benchmarks.scenarios --data_dir DATA --work_dir outputs/scenarios

DATA is described in build_models.py. A target that has learnt the questions as well as the answers and a generic draft
are built once. Then there are three raw inputs: a log of requests to the target, as an OpenAI-style server writes it
(historical); a table of questions of the other sources (curated); and nothing at all (synthetic: the target writes the
queries). A recipe for each ends in a report on the same test prompts; one of them is killed with SIGKILL on the way,
again and again, and has to end with the same figures. Every step is `spec-kd run`'s own and kept; the same command
continues. Writes scenarios.{json,md} to `results_dir`. About 30 minutes on one core.
"""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from datasets import load_dataset
from transformers import AutoModelForCausalLM
from trl import TrlParser

from benchmarks.build_models import read_rows
from benchmarks.harness import describe_machine, keep_part
from examples.made_up.embedded_run import use_all_cores
from examples.made_up.language_model_training import Budget
from examples.made_up.models import BuildRecipe, BuiltModels, Corpus, ModelSize
from examples.made_up.models import build_models as build_tiny_models
from examples.made_up.record import save_record
from spec_kd.evaluation import load_report
from spec_kd.evaluation.gates import collect_metrics

DOMAIN = "biology"
SCENARIOS = ("historical", "curated", "synthetic")
KILLED = "historical, killed"
HELD_BACK = 1200  # rows that the target is not trained on: half of them become the log, half the curated set
MAX_PROMPT_CHARACTERS = 800
FIGURES = ("alpha_greedy", "alpha_t1", "block_efficiency_greedy", "block_efficiency_t1")


@dataclass
class ScenarioArguments:
    r"""
    Args:
        data_dir (`str`): Folder with `biology/` and `general/`.
        work_dir (`str`): Where models, raw inputs and runs are kept.
        results_dir (`str`): Where the record is written.
        num_queries (`int`): Training prompts of each scenario.
        steps (`int`): Optimizer steps of each draft.
        seconds_between_kills (`float`): How long the killed run may live at first; half as long again each time.
        general_steps, domain_steps, draft_steps (`int`): Budgets of the models.
    """

    data_dir: str = field(metadata={"help": "Folder with `biology/` and `general/`."})
    work_dir: str = field(default="outputs/scenarios", metadata={"help": "Where everything is kept."})
    results_dir: str = field(
        default=str(Path(__file__).parent / "results"), metadata={"help": "Where the record is written."}
    )
    num_queries: int = field(default=400, metadata={"help": "Training prompts of each scenario."})
    steps: int = field(default=100, metadata={"help": "Optimizer steps of each draft."})
    seconds_between_kills: float = field(default=30.0, metadata={"help": "Life of the killed run at first."})
    general_steps: int = field(default=300, metadata={"help": "Steps of the generic target."})
    domain_steps: int = field(default=700, metadata={"help": "Steps of the domain target."})
    draft_steps: int = field(default=600, metadata={"help": "Steps of the generic draft, at most."})


def build(arguments: ScenarioArguments) -> tuple[BuiltModels, list[dict]]:
    """The models, and the rows held back from them."""
    folder = Path(arguments.data_dir)
    rows = read_rows(folder / DOMAIN, "train")
    corpus = Corpus(
        rows[HELD_BACK:],
        read_rows(folder / DOMAIN, "test"),
        read_rows(folder / "general", "train"),
        read_rows(folder / "general", "test"),
    )
    # the user's turns too, or the target could not write queries
    budget = Budget(arguments.general_steps, tokens_per_step=1024, learning_rate=1e-3, prompt_weight=0.5)
    recipe = BuildRecipe(
        vocab_size=4096,
        max_length=384,
        target=ModelSize(256, 640, 4, 8),
        draft=ModelSize(128, 352, 2, 4),
        general_target=replace(budget, eval_steps=300),
        domain_target=replace(budget, max_steps=arguments.domain_steps, eval_steps=350),
        general_draft=replace(
            budget, max_steps=arguments.draft_steps, until_flat=True, learning_rate=1.5e-3, eval_steps=200
        ),
    )
    return build_tiny_models(recipe, corpus, Path(arguments.work_dir) / "models"), rows[:HELD_BACK]


def is_short(row: dict) -> bool:
    """Whether a prompt leaves room for an answer in the small models' positions."""
    return sum(len(message["content"]) for message in row["prompt"]) <= MAX_PROMPT_CHARACTERS


def write_inputs(arguments: ScenarioArguments, rows: list[dict]) -> dict[str, dict[str, Any]]:
    """Raw inputs on disk, and the section of a recipe that reads each."""
    folder = Path(arguments.work_dir) / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    log, table = rows[: HELD_BACK // 2], rows[HELD_BACK // 2 :]
    log, table = ([row for row in part if is_short(row)][: arguments.num_queries] for part in (log, table))
    with (folder / "requests.jsonl").open("w", encoding="utf-8") as file:
        for i, row in enumerate(log):
            record = {
                "request": {"model": "target", "messages": row["prompt"]},
                "response": {"choices": [{"message": row["completion"][0]}]},
                "session_id": f"session-{i}",
            }
            file.write(json.dumps(record) + "\n")
            if i % 10 == 0:  # somebody asks again
                file.write(json.dumps({**record, "session_id": f"again-{i}"}) + "\n")
            if i % 100 == 50:  # the disk was full
                file.write(json.dumps(record)[:80] + "\n")
    with (folder / "questions.jsonl").open("w", encoding="utf-8") as file:
        for row in table:
            file.write(json.dumps({"question": row["prompt"][-1]["content"], "id": len(row["prompt"])}) + "\n")
    return {
        "historical": {"paths": [str(folder / "requests.jsonl")], "test_fraction": 0.0},
        "curated": {
            "dataset": str(folder / "questions.jsonl"),
            "prompt_column": "question",
            "test_fraction": 0.0,
        },
        "synthetic": {"num_queries": arguments.num_queries, "max_new_tokens": 64, "test_fraction": 0.0},
    }


def write_recipe(arguments: ScenarioArguments, models: BuiltModels, name: str, part: dict[str, Any]) -> Path:
    """The recipe of a run; they differ in their prompts alone."""
    folder = Path(arguments.work_dir)
    recipe = {
        "target": models.domain_target,
        "draft": models.generic_draft,
        "output_dir": str(folder / "runs" / name.replace(", ", "_")),
        "seed": 0,
        "prompts": {name.split(",")[0]: part},
        "respond": {
            "temperature": 1.0,
            "max_new_tokens": 96,
            "teacher_signal": "sampled_logprobs",
            "batch_size": 32,
            "shard_size": 64,
        },
        "train": {
            "method": "white_box",
            "max_steps": arguments.steps,
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 10,
            "gradient_checkpointing": False,
            "logging_steps": 20,
            "save_steps": 25,
            "report_to": "none",
        },
        "evaluate": {
            "prompts": str(folder / "raw" / "test.jsonl"),
            "num_prompts": 96,
            "max_new_tokens": 96,
            "costs": "none",
            "num_shown_prompts": 1,
            "batch_size": 16,
        },
    }
    path = folder / f"{name.replace(', ', '_')}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def run_recipe(path: Path, is_killed_after: float | None = None) -> tuple[dict[str, Any], int]:
    """The result of `spec-kd run`, and how often it was killed before."""
    command = [sys.executable, "-m", "spec_kd.cli", "run", str(path)]
    kills = 0
    while True:
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                output, _ = process.communicate(timeout=is_killed_after)
            except subprocess.TimeoutExpired:
                os.kill(process.pid, signal.SIGKILL)
                process.communicate()
                kills, is_killed_after = kills + 1, is_killed_after * 1.5
                continue
        if process.returncode != 0:
            raise RuntimeError(f"`{' '.join(command)}` ended with exit status {process.returncode}.")
        return json.loads(output.splitlines()[-1]), kills


def describe_run(result: dict[str, Any]) -> dict[str, Any]:
    """What the result of a run does not say: how many prompts there were, and the figures before."""
    prompts = Path(result["output_dir"]) / "prompts" / "train.arrow"
    report = load_report(str(Path(result["output_dir"]) / "evaluation"))
    return {
        "num_prompts": load_dataset("arrow", data_files=str(prompts), split="train").num_rows,
        "before": collect_metrics(report, report.drafts[0]),
    }


def write_tables(record: dict[str, Any], path: Path) -> None:
    """`scenarios.md` from the record."""
    arguments = record["arguments"]
    lines = [
        "# From raw input to an evaluated draft, three ways",
        "",
        f"`{record['command']}`: biology questions, target of {record['parameters']['target'] / 1e6:.1f} M parameters, "
        f"draft of {record['parameters']['draft'] / 1e6:.1f} M, {arguments['num_queries']} queries asked for in each "
        f"scenario, {arguments['steps']} steps of 8 rows, forward KL from the cached signal; 96 test prompts, the same "
        f"for all. One seed, {record['machine']['cpu']}.",
        "",
        "| run | training prompts | alpha_greedy | alpha_t1 | tokens a pass, greedy | at T = 1 | times killed |",
        "|---|---|---|---|---|---|---|",
    ]
    before = [f"{record['runs']['historical']['before'][figure][0]:.3f}" for figure in FIGURES]
    lines.append(f"| the generic draft | | {' | '.join(before)} | |")
    for name, run in record["runs"].items():
        cells = [f"{run['figures'][figure][0]:.3f}" for figure in FIGURES]
        lines.append(f"| {name} | {run['num_prompts']} | {' | '.join(cells)} | {run['kills']} |")
    lines += [
        "",
        f"The killed run ended with the figures of the whole one: {'yes' if record['is_equal_after_kills'] else 'no'}.",
        "",
        "## Queries that the target wrote",
        "",
        *(f"- {text}" for text in record["samples"]),
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def run(recipe: Path, seconds_between_kills: float, is_killed: bool) -> dict:
    """What a run of a recipe found, and how often it was killed."""
    result, kills = run_recipe(recipe, seconds_between_kills if is_killed else None)
    return result | {"kills": kills, **describe_run(result)}


def main(argv: list[str]) -> None:
    (arguments,) = TrlParser((ScenarioArguments,)).parse_args_and_config(argv)
    use_all_cores()
    models, held_back = build(arguments)
    inputs = write_inputs(arguments, held_back)
    test = [row for row in read_rows(Path(arguments.data_dir) / DOMAIN, "test") if is_short(row)]
    with (Path(arguments.work_dir) / "raw" / "test.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"prompt": row["prompt"]}) + "\n" for row in test)
    runs = {}
    for name in (*SCENARIOS, KILLED):
        kept = Path(arguments.work_dir) / f"{name.replace(', ', '_')}.json"
        recipe = write_recipe(arguments, models, name, inputs[name.split(",")[0]])
        runs[name] = keep_part(kept, lambda r=recipe, n=name: run(r, arguments.seconds_between_kills, n == KILLED))
    save_results(arguments, models, runs)


def save_results(arguments: ScenarioArguments, models: BuiltModels, runs: dict[str, dict[str, Any]]) -> None:
    """The record and its table."""
    folder = Path(arguments.work_dir) / "runs" / "synthetic" / "queries" / "synthetic"
    written = load_dataset("arrow", data_files=str(folder / "train.arrow"), split="train")
    record = {
        "command": "python -m benchmarks.scenarios --data_dir DATA",
        "machine": describe_machine(),
        "arguments": {
            name: value
            for name, value in asdict(arguments).items()
            if name not in ("data_dir", "work_dir", "results_dir")
        },
        "parameters": {
            "target": AutoModelForCausalLM.from_pretrained(models.domain_target).num_parameters(),
            "draft": models.records["generic_draft"]["num_parameters"],
        },
        "models": models.records,
        "runs": runs,
        "is_equal_after_kills": runs["historical"]["metrics"] == runs[KILLED]["metrics"],
        "samples": [" ".join(row["prompt"][-1]["content"].split()) for row in written.select(range(8))],
    }
    results = Path(arguments.results_dir)
    results.mkdir(parents=True, exist_ok=True)
    save_record(record, results / "scenarios.json")
    write_tables(record, results / "scenarios.md")


if __name__ == "__main__":
    main(sys.argv[1:])
