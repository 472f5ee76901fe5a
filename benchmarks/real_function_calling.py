"""Real function-calling conversations: acceptance before and after, white-box and black-box at equal steps.

    python benchmarks/real_function_calling.py --data_dir DATA --output_dir outputs/real_fc

DATA is described in build_models.py. The target answers the training prompts once and both methods learn from the same
answers. Writes real_function_calling.{json,md,png} to `results_dir`. Every argument of the trainer and of the build is
an option; the defaults are the ones of the committed record.
"""

import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from build_models import BuildArguments, build_from_folder
from datasets import Dataset
from domain_example import EMBEDDED_DEFAULTS, compare_on_general_prompts
from machine import describe_machine
from recipe import (
    METHODS,
    RecipeArguments,
    RecipeResult,
    describe_history,
    describe_metrics,
    format_table,
    plot_histories,
    run_recipe,
    save_record,
    use_all_cores,
)
from tiny_models import BuiltModels
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import TrlParser

from spec_kd import WhiteBoxDistillConfig, generate_responses

DEFAULTS = {
    **EMBEDDED_DEFAULTS,
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
        results_dir (`str`): Where the record is written.
    """

    results_dir: str = field(
        default=str(Path(__file__).parent / "results"), metadata={"help": "Where the record is written."}
    )


def complete_prompts(models: BuiltModels, rows: list[dict], arguments: RecipeArguments, folder: Path) -> Dataset:
    """The domain target's answers to the first training prompts."""
    rows = rows[: arguments.num_train_prompts]
    return generate_responses(
        AutoModelForCausalLM.from_pretrained(models.domain_target),
        Dataset.from_list([{"prompt": row["prompt"]} for row in rows]),
        processing_class=AutoTokenizer.from_pretrained(models.domain_target),
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.response_temperature,
        batch_size=arguments.generation_batch_size,
        output_dir=str(folder),
    )


def main(argv: list[str]) -> dict:
    parser = TrlParser((RecordArguments, BuildArguments, RecipeArguments, WhiteBoxDistillConfig))
    unknown = parser.set_defaults_with_config(**DEFAULTS)
    if unknown:
        raise ValueError(f"Unknown defaults: {unknown}")
    record_arguments, build, recipe, training = parser.parse_args_and_config(argv)
    use_all_cores()
    start = time.perf_counter()
    models, corpus = build_from_folder(build)
    seconds = {"building or loading the models": round(time.perf_counter() - start, 1)}
    output_dir = Path(training.output_dir)
    start = time.perf_counter()
    rows = complete_prompts(models, corpus.domain_train, recipe, output_dir / "responses")
    seconds["target responses"] = round(time.perf_counter() - start, 1)
    test_prompts = Dataset.from_list(corpus.domain_test)
    general_prompts = Dataset.from_list(corpus.general_test)
    results: dict[str, RecipeResult] = {}
    table: dict[str, dict] = {}
    for method in METHODS:
        start = time.perf_counter()
        result = run_recipe(
            replace(recipe, method=method, generate_responses=False),
            parse_training(argv, output_dir / method),
            draft_path=models.generic_draft,
            target_path=models.domain_target,
            train_prompts=rows,
            test_prompts=test_prompts,
        )
        results[method] = result
        table.setdefault("domain prompts: generic draft", result.before)
        table[f"domain prompts: after {method}"] = result.after
        general = compare_on_general_prompts(recipe, result, models, general_prompts)
        for label, figures in general.items():
            is_domain_draft = label.endswith("domain draft")
            table[f"{label} ({method})" if is_domain_draft else label] = figures
        seconds[method] = round(time.perf_counter() - start, 1)
    record = {
        "what": f"{build.domain} conversations, {recipe.num_eval_prompts} test prompts",
        "command": "python benchmarks/real_function_calling.py --data_dir DATA",
        "machine": describe_machine(),
        "build": {key: value for key, value in asdict(build).items() if key not in ("data_dir", "models_dir")},
        "training": {key: getattr(training, key) for key in DEFAULTS if hasattr(training, key) and key != "output_dir"},
        "recipe": {key: getattr(recipe, key) for key in DEFAULTS if hasattr(recipe, key)},
        "num_assistant_tokens": recipe.num_assistant_tokens,
        "seconds": seconds,
        "models": models.records,
        "histories": {method: describe_history(result.history) for method, result in results.items()},
        "figures": {label: {f"T={t:g}": describe_metrics(f) for t, f in fs.items()} for label, fs in table.items()},
    }
    folder = Path(record_arguments.results_dir)
    folder.mkdir(parents=True, exist_ok=True)
    name = f"real_{build.domain}"
    save_record(record, folder / f"{name}.json")
    (folder / f"{name}.md").write_text(format_table(table) + "\n", encoding="utf-8")
    plot_histories(record["histories"], folder / f"{name}.png", f"Acceptance on real {build.domain} prompts")
    print(format_table(table))
    return record


def parse_training(argv: list[str], output_dir: Path) -> WhiteBoxDistillConfig:
    """A fresh trainer configuration for one method: a trainer changes the one it is given."""
    parser = TrlParser((RecordArguments, BuildArguments, RecipeArguments, WhiteBoxDistillConfig))
    parser.set_defaults_with_config(**DEFAULTS)
    *_, training = parser.parse_args_and_config(argv)
    training.output_dir = str(output_dir)
    return training


if __name__ == "__main__":
    main(sys.argv[1:])
