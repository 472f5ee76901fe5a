"""What the examples of all domains do: a domain adds its conversations, and nothing else.

Without models on the command line: the embedded run, with small models made on the spot. With them: the real recipe.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import general_corpus
from datasets import Dataset
from recipe import (
    RecipeArguments,
    RecipeResult,
    describe_history,
    describe_metrics,
    format_table,
    load_prompts,
    parse_arguments,
    plot_histories,
    run_recipe,
    save_record,
    use_all_cores,
)
from tiny_models import BuildRecipe, BuiltModels, Corpus, build_models
from transformers import AutoModelForCausalLM, AutoTokenizer

from spec_kd import AcceptanceMetrics, WhiteBoxDistillConfig, generate_responses, replay

# Of the run without models; each can be changed on the command line.
EMBEDDED_DEFAULTS = {
    "max_steps": 280,  # as long as 150 with the live target
    "per_device_train_batch_size": 16,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 20,
    "max_length": None,
    "gradient_checkpointing": False,
    "bf16": False,
    "report_to": "none",
    "eval_strategy": "steps",
    "eval_steps": 70,
    "save_strategy": "no",
    "logging_steps": 10,
    "max_new_tokens": 96,
    "num_train_prompts": 800,
    "num_eval_prompts": 64,
    "seed": 0,
}
EMBEDDED_RECIPE = BuildRecipe()
EMBEDDED_ROWS = {"domain_train": 8_000, "domain_test": 300, "general_train": 4_000, "general_test": 300}


@dataclass(frozen=True)
class Domain:
    """A domain's bundled conversations and how to call them.

    Args:
        name (`str`): In words, for the table.
        unseen (`str`): What the test prompts hold that no training prompt holds, for the table.
        output_dir (`str`): Of the embedded run, unless it is told another one.
        generate_conversations (`Callable[[str, int, int], list[dict]]`):
            From `"train"` or `"test"`, a number of rows and a seed: rows with `prompt` and `completion`.
    """

    name: str
    unseen: str
    output_dir: str
    generate_conversations: Callable[[str, int, int], list[dict]]


def run_example(domain: Domain, argv: list[str]) -> RecipeResult:
    """Runs the embedded default of `domain`, or with a model or a configuration file in `argv` the real recipe."""
    is_embedded = not any(argument.split("=")[0] in ("--config", "--model_name_or_path") for argument in argv)
    if is_embedded:
        arguments, training, _ = parse_arguments(argv, {**EMBEDDED_DEFAULTS, "output_dir": domain.output_dir})
        return run_embedded(domain, arguments, training)
    return run_real(*parse_arguments(argv))


def run_real(arguments: RecipeArguments, training: WhiteBoxDistillConfig, model) -> RecipeResult:
    for name, value in (
        ("--model_name_or_path", model.model_name_or_path),
        ("--teacher_model_name_or_path", training.teacher_model_name_or_path),
    ):
        if value is None:
            raise ValueError(f"`{name}` is missing. Without any model, leave all arguments out for the embedded run.")
    if training.eval_strategy == "no":
        training.eval_strategy = "epoch"  # acceptance before and after is the point of the recipe
    training.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(training.model_init_kwargs or {}),
    }
    train_prompts, test_prompts = load_prompts(arguments)
    result = run_recipe(
        arguments,
        training,
        draft_path=model.model_name_or_path,
        target_path=training.teacher_model_name_or_path,
        train_prompts=train_prompts,
        test_prompts=test_prompts,
        model=model,
    )
    if result.trainer.is_world_process_zero():
        report(result, {"before": result.before, "after": result.after}, arguments, training, {})
    return result


def run_embedded(domain: Domain, arguments: RecipeArguments, training: WhiteBoxDistillConfig) -> RecipeResult:
    start = time.perf_counter()
    use_all_cores()
    models, data = build_embedded_models(domain, training.seed), load_embedded_data(domain, training.seed)
    built = time.perf_counter()
    result = run_recipe(
        arguments,
        training,
        draft_path=models.generic_draft,
        target_path=models.domain_target,
        train_prompts=data["train_prompts"],
        test_prompts=data["test_prompts"],
    )
    trained = time.perf_counter()
    if result.trainer.is_world_process_zero():
        rows = {
            f"{domain.name}, {domain.unseen}: generic draft": result.before,
            f"{domain.name}, {domain.unseen}: after {arguments.method} distillation": result.after,
            **compare_on_general_prompts(arguments, result, models, data["general_prompts"]),
        }
        seconds = {
            "building or loading the models": round(built - start, 1),
            "responses and training": round(trained - built, 1),
            "evaluation on general prompts": round(time.perf_counter() - trained, 1),
        }
        report(result, rows, arguments, training, {"seconds": seconds, "draft_held_out_loss": models.draft_curve})
    return result


def make_embedded_corpus(domain: Domain, seed: int = 0) -> Corpus:
    """The bundled conversations of `domain` and the general ones, drawn with `seed`."""
    general_train, general_test = general_corpus.generate_conversations(
        EMBEDDED_ROWS["general_train"], EMBEDDED_ROWS["general_test"], seed
    )
    return Corpus(
        domain.generate_conversations("train", EMBEDDED_ROWS["domain_train"], seed),
        domain.generate_conversations("test", EMBEDDED_ROWS["domain_test"], seed),
        general_train,
        general_test,
    )


def build_embedded_models(domain: Domain, seed: int = 0) -> BuiltModels:
    """The models of the embedded run."""
    return build_models(replace(EMBEDDED_RECIPE, seed=seed), make_embedded_corpus(domain, seed))


def load_embedded_data(domain: Domain, seed: int = 0) -> dict[str, Dataset]:
    """The rows of the embedded run: `train_prompts`, `test_prompts` (with what is unseen) and `general_prompts`."""
    corpus = make_embedded_corpus(domain, seed)
    parts = {
        "train_prompts": corpus.domain_train,
        "test_prompts": corpus.domain_test,
        "general_prompts": corpus.general_test,
    }
    return {name: Dataset.from_list(rows) for name, rows in parts.items()}


def compare_on_general_prompts(
    arguments: RecipeArguments, result: RecipeResult, models: BuiltModels, prompts
) -> dict[str, dict[float, AcceptanceMetrics]]:
    """The drift: the generic draft on the target it was made for, and what domain training cost the draft there."""
    tokenizer = AutoTokenizer.from_pretrained(models.generic_target)
    target = AutoModelForCausalLM.from_pretrained(models.generic_target)
    drafts = {
        "general prompts, generic target: generic draft": AutoModelForCausalLM.from_pretrained(models.generic_draft),
        "general prompts, generic target: domain draft": result.trainer.model,
    }
    prompts = prompts.select(range(min(arguments.num_eval_prompts, len(prompts)))).select_columns(["prompt"])
    rows: dict[str, dict[float, AcceptanceMetrics]] = {label: {} for label in drafts}
    for temperature in (0.0, 1.0):
        options = {"temperature": temperature, "max_new_tokens": arguments.max_new_tokens}
        texts = generate_responses(
            target, prompts, processing_class=tokenizer, batch_size=arguments.generation_batch_size, **options
        )
        for label, draft in drafts.items():
            rows[label][temperature] = replay(
                draft,
                target,
                texts,
                num_assistant_tokens=arguments.num_assistant_tokens,
                vocab_size=len(tokenizer),
                **options,
            )
    return rows


def report(
    result: RecipeResult,
    rows: dict[str, dict[float, AcceptanceMetrics]],
    arguments: RecipeArguments,
    training: WhiteBoxDistillConfig,
    extra: dict,
) -> None:
    """Prints the table; writes table, plot and record beside the draft."""
    folder = Path(training.output_dir)
    table = format_table(rows)
    (folder / "acceptance.md").write_text(table + "\n", encoding="utf-8")
    history = describe_history(result.history)
    plot_histories({arguments.method: history}, folder / "acceptance.png", "Acceptance over training")
    record = {
        "method": arguments.method,
        "divergence": training.divergence if arguments.method == "white_box" else None,
        "teacher_signal": arguments.stored_targets,
        "seed": training.seed,
        "steps": result.trainer.state.global_step,
        "num_assistant_tokens": arguments.num_assistant_tokens,
        "figures": {
            label: {f"T={t:g}": describe_metrics(f) for t, f in figures.items()} for label, figures in rows.items()
        },
        "history": history,
        **extra,
    }
    save_record(record, folder / "acceptance.json")
    print(
        f"\nExpected acceptance at {arguments.num_assistant_tokens} drafted tokens, with 95 % intervals over prompts\n"
    )
    print(table)
    print(f"\nDraft, model card, plot and table are in {folder}/")
