"""Online distillation from served requests under a shift of domain: the dip of acceptance, and its recovery.

    python -m benchmarks.streaming --data_dir DATA --work_dir outputs/streaming

DATA has `general/`, `biology/` and `chinese/` as build_models.py describes. A target that knows all three and a draft
that has seen the general set alone are built once; then the same stream of requests, one domain after the other, is
served three times with `OnlineGKDTrainer(mode="streaming")`: learning where the target corrected the draft, learning
from every token, and not learning. Nobody tells the trainer of a shift. Every run is kept in `work_dir` when it is
done; the same command continues. Writes streaming.{json,md,png} to `results_dir`. About 25 minutes on one core, most of
it the target.
"""

import random
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from datasets import IterableDataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import TrlParser

from benchmarks.build_models import read_rows
from benchmarks.harness import describe_machine, keep_part
from benchmarks.streaming_report import write_report
from examples.made_up.embedded_run import use_all_cores
from examples.made_up.language_model_training import Budget
from examples.made_up.models import BuildRecipe, BuiltModels, Corpus, ModelSize
from examples.made_up.models import build_models as build_tiny_models
from examples.made_up.record import save_record
from spec_kd import OnlineGKDConfig, OnlineGKDTrainer
from spec_kd.evaluation import bootstrap

DOMAINS = ("general", "biology", "chinese")
RUNS = {
    "learns from rejected tokens": {"trained_positions": "rejected"},
    "learns from all tokens": {"trained_positions": "all"},
    "does not learn": {"learning_rate": 0.0},
}
HELD_BACK = 600  # training rows of each domain that the target does not see: the requests come from them


@dataclass
class StreamArguments:
    r"""
    Args:
        data_dir (`str`): Folder with a folder of each domain.
        work_dir (`str`): Where models and runs are kept.
        results_dir (`str`): Where the record is written.
        requests_per_domain (`int`): Requests before the stream turns to the next domain.
        update_interval (`int`): Requests between two updates.
        max_prompt_tokens, max_new_tokens (`int`): Longest prompt and answer.
        num_assistant_tokens (`int`): Tokens drafted in a round.
        learning_rate (`float`): Constant.
        target_steps, domain_steps, draft_steps (`int`): Budgets of the models.
    """

    data_dir: str = field(metadata={"help": "Folder with a folder of each domain."})
    work_dir: str = field(default="outputs/streaming", metadata={"help": "Where models and runs are kept."})
    results_dir: str = field(
        default=str(Path(__file__).parent / "results"), metadata={"help": "Where the record is written."}
    )
    requests_per_domain: int = field(default=320, metadata={"help": "Requests before the stream turns."})
    update_interval: int = field(default=8, metadata={"help": "Requests between two updates."})
    max_prompt_tokens: int = field(default=256, metadata={"help": "Longest prompt."})
    max_new_tokens: int = field(default=64, metadata={"help": "Longest answer."})
    num_assistant_tokens: int = field(default=4, metadata={"help": "Tokens drafted in a round."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Constant learning rate."})
    target_steps: int = field(default=300, metadata={"help": "Steps of the target on the general set."})
    domain_steps: int = field(default=700, metadata={"help": "Steps of the target on all three sets."})
    draft_steps: int = field(default=800, metadata={"help": "Steps of the draft on the general set, at most."})


def read_corpora(data_dir: Path) -> tuple[Corpus, dict[str, list[dict]]]:
    """What the models are trained on, and the rows held back for the stream, by domain."""
    train, held_back = {}, {}
    for domain in DOMAINS:
        rows = read_rows(data_dir / domain, "train")
        held_back[domain], train[domain] = rows[:HELD_BACK], rows[HELD_BACK:]
    mixed = [*train["biology"], *train["chinese"]]
    random.Random(0).shuffle(mixed)
    tests = {domain: read_rows(data_dir / domain, "test") for domain in DOMAINS}
    return Corpus(mixed, tests["biology"] + tests["chinese"], train["general"], tests["general"]), held_back


def build(arguments: StreamArguments, corpus: Corpus) -> BuiltModels:
    """The target of three domains and the generic draft."""
    budget = Budget(arguments.target_steps, tokens_per_step=1024, learning_rate=1e-3)
    recipe = BuildRecipe(
        vocab_size=8192,
        max_length=512,
        target=ModelSize(256, 640, 4, 8),
        draft=ModelSize(128, 352, 2, 4),
        general_target=replace(budget, eval_steps=250),
        domain_target=replace(budget, max_steps=arguments.domain_steps, eval_steps=250),
        general_draft=replace(
            budget, max_steps=arguments.draft_steps, until_flat=True, learning_rate=1.5e-3, eval_steps=200
        ),
        general_share=0.25,
    )
    return build_tiny_models(recipe, corpus, Path(arguments.work_dir) / "models")


def serve(arguments: StreamArguments, models: BuiltModels, requests: list[dict], options: dict) -> list[dict]:
    """One run over the stream: what was logged at every update."""
    options = {"learning_rate": arguments.learning_rate, **options}
    trainer = OnlineGKDTrainer(
        model=AutoModelForCausalLM.from_pretrained(models.generic_draft),
        teacher_model=AutoModelForCausalLM.from_pretrained(models.domain_target),
        args=OnlineGKDConfig(
            output_dir=str(Path(arguments.work_dir) / "run"),
            mode="streaming",
            update_interval=arguments.update_interval,
            per_device_train_batch_size=arguments.update_interval,
            max_steps=len(requests) // arguments.update_interval,
            generation_temperature=1.0,
            max_new_tokens=arguments.max_new_tokens,
            num_assistant_tokens=arguments.num_assistant_tokens,
            lr_scheduler_type="constant",
            max_length=None,
            gradient_checkpointing=False,
            bf16=False,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            seed=0,
            **options,
        ),
        train_dataset=IterableDataset.from_generator(lambda: iter(requests)),
        processing_class=AutoTokenizer.from_pretrained(models.domain_target),
    )
    trainer.train()
    names = ("block_efficiency", "acceptance_rate", "rejected_share")
    return [
        {name: log[f"stream/{name}"] for name in names} | {"loss": log["loss"]}
        for log in trainer.state.log_history
        if "loss" in log
    ]


def summarize(runs: dict[str, list[dict]], updates_per_domain: int) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Tokens a target pass in the first 5 and the last 15 updates of each domain, with 95 % intervals over updates."""
    summary: dict[str, dict[str, dict[str, list[float]]]] = {}
    for name, logs in runs.items():
        efficiency = np.array([log["block_efficiency"] for log in logs])
        for i, domain in enumerate(DOMAINS):
            part = efficiency[i * updates_per_domain : (i + 1) * updates_per_domain]
            summary.setdefault(domain, {})[name] = {
                "first": list(bootstrap(lambda x, n: x / n, part[:5], np.ones(5))),
                "last": list(bootstrap(lambda x, n: x / n, part[-15:], np.ones(15))),
            }
    return summary


def main(argv: list[str]) -> None:
    (arguments,) = TrlParser((StreamArguments,)).parse_args_and_config(argv)
    use_all_cores()
    corpus, held_back = read_corpora(Path(arguments.data_dir))
    models = build(arguments, corpus)
    tokenizer = AutoTokenizer.from_pretrained(models.domain_target)
    requests = []
    for domain in DOMAINS:
        prompts = [{"prompt": row["prompt"]} for row in held_back[domain]]
        encode = tokenizer.apply_chat_template
        lengths = [len(encode(p["prompt"], add_generation_prompt=True, return_dict=False)) for p in prompts]
        fitting = [p for p, length in zip(prompts, lengths, strict=True) if length <= arguments.max_prompt_tokens]
        if len(fitting) < arguments.requests_per_domain:
            raise ValueError(
                f"{domain} has {len(fitting)} requests of at most {arguments.max_prompt_tokens} tokens, but "
                f"`requests_per_domain={arguments.requests_per_domain}`. Lower it, or raise `max_prompt_tokens`."
            )
        requests += fitting[: arguments.requests_per_domain]
    runs = {}
    for name, options in RUNS.items():
        path = Path(arguments.work_dir) / f"{name.replace(' ', '_')}.json"
        runs[name] = keep_part(path, lambda options=options: serve(arguments, models, requests, options))
    record = {
        "command": "python -m benchmarks.streaming --data_dir DATA",
        "machine": describe_machine(),
        "arguments": {
            key: value for key, value in asdict(arguments).items() if key not in ("data_dir", "work_dir", "results_dir")
        },
        "models": models.records,
        "parameters": {
            "target": AutoModelForCausalLM.from_pretrained(models.domain_target).num_parameters(),
            "draft": models.records["generic_draft"]["num_parameters"],
        },
        "domains": list(DOMAINS),
        "runs": runs,
        "summary": summarize(runs, arguments.requests_per_domain // arguments.update_interval),
    }
    folder = Path(arguments.results_dir)
    folder.mkdir(parents=True, exist_ok=True)
    save_record(record, folder / "streaming.json")
    write_report(folder / "streaming.json")


if __name__ == "__main__":
    main(sys.argv[1:])
