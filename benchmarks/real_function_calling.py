"""Real function-calling conversations: acceptance before and after, white-box and black-box at equal steps.

    python -m benchmarks.real_function_calling --data_dir DATA --output_dir outputs/real_fc

DATA is described in build_models.py. The target completes the training prompts once and both methods learn from the
same completions, each in a run of examples/train_fc.py. Writes real_function_calling.{json,md,png} to `results_dir`.
Every argument of the trainer and of the build is an option; the defaults are the ones of the committed record.
"""

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import TrlParser

from benchmarks.build_models import BuildArguments, build_from_folder
from benchmarks.harness import describe_machine
from examples.made_up import embedded_run
from examples.made_up.arguments import METHODS, ExampleArguments
from examples.made_up.models import BuiltModels
from examples.made_up.record import describe, format_table, plot_histories, save_record
from spec_kd import WhiteBoxDistillConfig, generate_responses

DEFAULTS = {
    **embedded_run.DEFAULTS,
    "output_dir": "outputs/real_function_calling",
    "per_device_train_batch_size": 8,
    "max_new_tokens": 128,
    "num_train_prompts": 600,
    "response_temperature": 0.0,
    "max_steps": 200,
    "num_eval_prompts": 128,
}


@dataclass
class RecordArguments:
    r"""
    Args:
        results_dir (`str`): Folder for the record.
    """

    results_dir: str = field(
        default=str(Path(__file__).parent / "results"), metadata={"help": "Folder for the record."}
    )


def save_data(models: BuiltModels, corpus, options: ExampleArguments, folder: Path) -> None:
    """Writes `train.parquet`, the domain target's completions of the first training prompts, and `test.parquet`."""
    rows = corpus.domain_train[: options.num_train_prompts]
    responses = generate_responses(
        AutoModelForCausalLM.from_pretrained(models.domain_target),
        Dataset.from_list([{"prompt": row["prompt"]} for row in rows]),
        processing_class=AutoTokenizer.from_pretrained(models.domain_target),
        max_new_tokens=options.max_new_tokens,
        temperature=options.response_temperature,
        batch_size=options.generation_batch_size,
        output_dir=str(folder / "responses"),
    )
    (folder / "data").mkdir(exist_ok=True)
    responses.to_parquet(folder / "data" / "train.parquet")
    Dataset.from_list(corpus.domain_test).to_parquet(folder / "data" / "test.parquet")


def train(method: str, models: BuiltModels, argv: list[str], output_dir: Path) -> dict:
    """Runs the example with the stored completions; returns its record."""
    given = DEFAULTS | {
        "method": method,
        "model_name_or_path": models.generic_draft,
        "teacher_model_name_or_path": models.domain_target,
        "dataset_name": str(output_dir / "data"),
        "generate_responses": False,
        "output_dir": str(output_dir / method),
    }
    flags = [text for name, value in given.items() if value is not None for text in (f"--{name}", str(value))]
    names = {f"--{name}" for name in asdict(BuildArguments("")) | asdict(RecordArguments())} | {"--output_dir"}
    own = [text for flag in zip(argv[::2], argv[1::2], strict=True) if flag[0] not in names for text in flag]
    subprocess.run(["accelerate", "launch", "examples/train_fc.py", *flags, *own], check=True)
    return json.loads((output_dir / method / "acceptance.json").read_text(encoding="utf-8"))


def main(argv: list[str]) -> dict:
    parser = TrlParser((RecordArguments, BuildArguments, ExampleArguments, WhiteBoxDistillConfig))
    if unknown := parser.set_defaults_with_config(**DEFAULTS):
        raise ValueError(f"Unknown defaults: {unknown}")
    record_arguments, build, options, training = parser.parse_args_and_config(argv)
    embedded_run.use_all_cores()
    start = time.perf_counter()
    models, corpus = build_from_folder(build)
    seconds = {"building or loading the models": round(time.perf_counter() - start, 1)}
    output_dir = Path(training.output_dir)
    start = time.perf_counter()
    save_data(models, corpus, options, output_dir)
    seconds["target responses"] = round(time.perf_counter() - start, 1)
    general_prompts = Dataset.from_list(corpus.general_test[: options.num_eval_prompts])
    table, histories = {}, {}
    for method in METHODS:
        start = time.perf_counter()
        run = train(method, models, argv, output_dir)
        histories[method] = run["history"]
        table.setdefault("domain prompts: generic draft", run["metrics"]["before"])
        table[f"domain prompts: after {method}"] = run["metrics"]["after"]
        draft = AutoModelForCausalLM.from_pretrained(output_dir / method)
        for label, row in embedded_run.compare_on_general_prompts(models, draft, general_prompts, options).items():
            is_domain_draft = label.endswith("domain draft")
            table[f"{label} ({method})" if is_domain_draft else label] = describe(row)
        seconds[method] = round(time.perf_counter() - start, 1)
    record = {
        "what": f"{build.domain} conversations, {options.num_eval_prompts} test prompts",
        "command": "python -m benchmarks.real_function_calling --data_dir DATA",
        "machine": describe_machine(),
        "build": {key: value for key, value in asdict(build).items() if key not in ("data_dir", "models_dir")},
        "training": {key: getattr(training, key) for key in DEFAULTS if hasattr(training, key) and key != "output_dir"},
        "recipe": {key: getattr(options, key) for key in DEFAULTS if hasattr(options, key)},
        "num_assistant_tokens": options.num_assistant_tokens,
        "seconds": seconds,
        "models": models.records,
        "histories": histories,
        "metrics": table,
    }
    folder = Path(record_arguments.results_dir)
    folder.mkdir(parents=True, exist_ok=True)
    name = f"real_{build.domain}"
    save_record(record, folder / f"{name}.json")
    (folder / f"{name}.md").write_text(format_table(table) + "\n", encoding="utf-8")
    plot_histories(histories, folder / f"{name}.png", f"Acceptance on real {build.domain} prompts")
    print(format_table(table))
    return record


if __name__ == "__main__":
    main(sys.argv[1:])
