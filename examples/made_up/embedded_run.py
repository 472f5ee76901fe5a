"""The embedded run of an example: a domain's made-up conversations, and small models trained on them."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from spec_kd import AcceptanceMetrics, generate_responses, replay

from . import biology, chinese, function_calling, general
from .arguments import ExampleOptions
from .models import BuildRecipe, BuiltModels, Corpus, build_models
from .record import ExampleResult

# Options of a run without models; each can be changed on the command line.
DEFAULTS = {
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
RECIPE = BuildRecipe()
ROWS = {"domain_train": 8_000, "domain_test": 300, "general_train": 4_000, "general_test": 300}


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


FUNCTION_CALLING = Domain(
    "function calling", "unseen tools", "outputs/train_fc", function_calling.generate_conversations
)
BIOLOGY = Domain("biology", "unseen subjects", "outputs/train_bio", biology.generate_conversations)
CHINESE = Domain("Chinese", "unseen subjects", "outputs/train_zh", chinese.generate_conversations)


@dataclass(frozen=True)
class EmbeddedRun:
    """Models and prompts of a run without arguments.

    Args:
        domain (`Domain`): What the target was specialized for.
        models (`BuiltModels`): Generic target, domain target and generic draft.
        train_prompts, test_prompts, general_prompts (`Dataset`): Rows with `prompt` and `completion`; the test prompts
            hold what no training prompt holds.
    """

    domain: Domain
    models: BuiltModels
    train_prompts: Dataset
    test_prompts: Dataset
    general_prompts: Dataset

    def compare(self, result: ExampleResult, options: ExampleOptions) -> dict[str, dict[float, AcceptanceMetrics]]:
        """Metrics by label and temperature: before, after, and both drafts on general prompts with the generic target.

        The last two show the drift: how good the generic draft is for the target it was made for, and what domain
        training cost the draft there.
        """
        name = f"{self.domain.name}, {self.domain.unseen}"
        rows = {
            f"{name}: generic draft": result.before,
            f"{name}: after {options.method} distillation": result.after,
        }
        prompts = self.general_prompts.select(range(min(options.num_eval_prompts, len(self.general_prompts))))
        return rows | compare_on_general_prompts(self.models, result.trainer.model, prompts, options)


def make_corpus(domain: Domain, seed: int = 0) -> Corpus:
    """The conversations of `domain` and the general ones, drawn with `seed`."""
    general_train, general_test = general.generate_conversations(ROWS["general_train"], ROWS["general_test"], seed)
    return Corpus(
        domain.generate_conversations("train", ROWS["domain_train"], seed),
        domain.generate_conversations("test", ROWS["domain_test"], seed),
        general_train,
        general_test,
    )


def prepare(domain: Domain, seed: int = 0) -> EmbeddedRun:
    """Builds the models, or loads them from the cache, with every core; makes the prompts."""
    use_all_cores()
    corpus = make_corpus(domain, seed)
    models = build_models(replace(RECIPE, seed=seed), corpus)
    rows = (corpus.domain_train, corpus.domain_test, corpus.general_test)
    return EmbeddedRun(domain, models, *map(Dataset.from_list, rows))


def compare_on_general_prompts(
    models: BuiltModels, domain_draft: PreTrainedModel, prompts: Dataset, options: ExampleOptions
) -> dict[str, dict[float, AcceptanceMetrics]]:
    """Metrics of the generic and of the domain draft for the generic target, by label and temperature."""
    tokenizer = AutoTokenizer.from_pretrained(models.generic_target)
    target = AutoModelForCausalLM.from_pretrained(models.generic_target)
    drafts = {
        "general prompts, generic target: generic draft": AutoModelForCausalLM.from_pretrained(models.generic_draft),
        "general prompts, generic target: domain draft": domain_draft,
    }
    rows: dict[str, dict[float, AcceptanceMetrics]] = {label: {} for label in drafts}
    for temperature in (0.0, 1.0):
        sampling = {"temperature": temperature, "max_new_tokens": options.max_new_tokens}
        responses = generate_responses(
            target,
            prompts.select_columns(["prompt"]),
            processing_class=tokenizer,
            batch_size=options.generation_batch_size,
            **sampling,
        )
        for label, draft in drafts.items():
            rows[label][temperature] = replay(
                draft,
                target,
                responses,
                num_assistant_tokens=options.num_assistant_tokens,
                vocab_size=len(tokenizer),
                **sampling,
            )
    return rows


def use_all_cores() -> None:
    """`accelerate launch` gives a CPU process one thread; a single process may have every core."""
    if not torch.accelerator.is_available() and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        is_linux = hasattr(os, "sched_getaffinity")  # which also counts what a container may use
        torch.set_num_threads(len(os.sched_getaffinity(0)) if is_linux else os.cpu_count() or 1)
