"""Builds a tokenizer, a generic target, a domain target and a generic draft from a folder of real conversations.

    python -m benchmarks.build_models --data_dir DATA --domain function_calling --models_dir MODELS

DATA holds `<domain>/` and `general/`, each with train.jsonl and test.jsonl in TRL's conversational prompt-completion
form. The domain `generated_function_calling` is written by examples/made_up/function_calling.py and needs no folder: a
target of this size becomes surer of it than of real text. What was built is reused; a killed build resumes at the stage
it was in. The folders are printed as JSON.
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

from trl import TrlParser

from examples.made_up.function_calling import generate_conversations
from examples.made_up.language_model_training import Budget
from examples.made_up.models import BuildRecipe, BuiltModels, Corpus, ModelSize, build_models

GENERATED = "generated_function_calling"
GENERATED_TRAIN, GENERATED_TEST = 8_000, 400  # distinct conversations about the same tools


@dataclass
class BuildArguments:
    r"""
    Args:
        data_dir (`str`): Folder with a folder of the domain and one named `general`.
        domain (`str`): Name of the domain's folder, or `generated_function_calling`.
        models_dir (`str`): Where models are kept.
        vocab_size (`int`): Ids of the tokenizer.
        max_prompt_and_completion (`int`): Longest training row in ids.
        general_steps, domain_steps, draft_steps (`int`): Optimizer steps of generic target, domain target and (at most)
            generic draft.
        tokens_per_step (`int`): Tokens of a batch.
        build_seed (`int`): Seed of weights and order.
        build_in_bf16 (`bool`): Whether products of the training are taken in bfloat16, for processors that have them.
    """

    data_dir: str = field(metadata={"help": "Folder with the domain's folder and one named `general`."})
    models_dir: str = field(default="outputs/models", metadata={"help": "Where models are kept."})
    domain: str = field(default="function_calling", metadata={"help": "Name of the domain's folder."})
    vocab_size: int = field(default=4096, metadata={"help": "Ids of the tokenizer."})
    max_prompt_and_completion: int = field(default=1024, metadata={"help": "Longest training row in ids."})
    general_steps: int = field(default=900, metadata={"help": "Steps of the generic target."})
    domain_steps: int = field(default=1000, metadata={"help": "Steps of the domain target."})
    draft_steps: int = field(default=4000, metadata={"help": "Steps of the generic draft at most."})
    tokens_per_step: int = field(default=1024, metadata={"help": "Tokens of a batch."})
    build_seed: int = field(default=0, metadata={"help": "Seed of weights and order."})
    build_in_bf16: bool = field(default=False, metadata={"help": "Train them with products in bfloat16."})


def read_rows(folder: Path, split: str) -> list[dict]:
    """Rows of `folder/split.jsonl`; raises if the file or a column is missing."""
    path = folder / f"{split}.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist. `data_dir` needs <domain>/ and general/ with {split}.jsonl.")
    with path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file if line.strip()]
    if not rows:
        raise ValueError(f"{path} is empty.")
    for column in ("prompt", "completion"):
        if column not in rows[0]:
            raise ValueError(f"{path} has the columns {sorted(rows[0])}, but `{column}` is missing.")
    return [{"prompt": row["prompt"], "completion": row["completion"]} for row in rows]


def read_corpus(data_dir: Path, domain: str) -> Corpus:
    """Domain and general rows of a data folder; those of the domain `GENERATED` are written here."""
    if domain == GENERATED:
        rows = generate_conversations("train", GENERATED_TRAIN + GENERATED_TEST)
        own = [rows[:GENERATED_TRAIN], rows[GENERATED_TRAIN:]]
    else:
        own = [read_rows(data_dir / domain, split) for split in ("train", "test")]
    return Corpus(*own, *(read_rows(data_dir / "general", split) for split in ("train", "test")))


def build_from_folder(arguments: BuildArguments) -> tuple[BuiltModels, Corpus]:
    """Builds, or loads what was built, for `arguments`."""
    corpus = read_corpus(Path(arguments.data_dir), arguments.domain)
    budget = Budget(
        arguments.general_steps,
        tokens_per_step=arguments.tokens_per_step,
        learning_rate=1e-3,
        bf16=arguments.build_in_bf16,
    )
    recipe = BuildRecipe(
        vocab_size=arguments.vocab_size,
        max_length=arguments.max_prompt_and_completion,
        target=ModelSize(256, 640, 4, 8),
        draft=ModelSize(128, 352, 2, 4),
        general_target=replace(budget, eval_steps=300),
        domain_target=replace(budget, max_steps=arguments.domain_steps, eval_steps=250),
        general_draft=replace(
            budget, max_steps=arguments.draft_steps, until_flat=True, learning_rate=1.5e-3, eval_steps=150
        ),
        general_share=0.2,
        seed=arguments.build_seed,
    )
    return build_models(recipe, corpus, Path(arguments.models_dir)), corpus


if __name__ == "__main__":
    (parsed,) = TrlParser((BuildArguments,)).parse_args_and_config()
    built, _ = build_from_folder(parsed)
    print(json.dumps(vars(built), indent=1))
