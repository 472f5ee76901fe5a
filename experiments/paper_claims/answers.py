"""What the domain target answers, and whether the queries it was asked are any good."""

import math
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from spec_kd import generate_responses, score_completions
from spec_kd.prompts.description import describe_prompts
from spec_kd.prompts.mixing import mix_prompts
from spec_kd.prompts.synthesis.pre_query import derive_pre_query
from spec_kd.vocabulary import count_real_ids

from .batches import order_by_length
from .cells import Cell
from .data import SCENARIOS, Queries, make_queries
from .models import find_models, hash_weights, load_model
from .profile import Names, Profile
from .record import Workspace, compute_hash

ID_COLUMNS = ["prompt", "completion", "prompt_ids", "completion_ids"]
NUM_JUDGED = 128  # queries whose perplexity is measured
NUM_TIMED = 64  # queries whose answers are timed
NUM_SHOWN, SHOWN_CHARACTERS = 5, 400


@dataclass
class Lab:
    """A domain's models, queries and answers; each is loaded or made when it is first asked for."""

    workspace: Workspace
    domain: str
    _answers: dict[tuple[str, float], Dataset] = field(default_factory=dict, repr=False)

    @property
    def profile(self) -> Profile:
        return self.workspace.profile

    @cached_property
    def models(self) -> Names:
        return find_models(self.workspace, self.domain)

    @cached_property
    def target(self) -> PreTrainedModel:
        return load_model(self.models.domain_target, self.profile.training.dtype)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self.models.domain_target)

    @cached_property
    def build(self) -> str:
        """Which weights the domain target has, for the record."""
        return hash_weights(self.models.domain_target)

    @property
    def vocab_size(self) -> int:
        """Real ids."""
        return count_real_ids(self.tokenizer)

    @cached_property
    def folder(self) -> Path:
        """Where queries and answers are kept: a folder for each target and choice of data."""
        parts = (self.profile.data, self.profile.domains[self.domain], self.build or self.models.domain_target)
        return self.workspace.folder / "queries" / f"{self.domain}-{compute_hash(*parts)}"

    @cached_property
    def queries(self) -> Queries:
        return make_queries(self.profile, self.domain, self.target, self.tokenizer, self.folder)

    def answer(self, target: PreTrainedModel, prompts: Dataset, temperature: float, name: str) -> Dataset:
        """What a target answers, from the disk where it is there."""
        return generate_responses(
            target,
            prompts,
            processing_class=self.tokenizer,
            max_new_tokens=self.profile.data.max_new_tokens,
            temperature=temperature,
            batch_size=self.profile.training.batch_size,
            output_dir=str(self.folder / "answers" / f"{name}-t{temperature:g}"),
            show_progress=False,
        )

    def answer_scenario(self, scenario: str, temperature: float) -> Dataset:
        """All answers to the queries of a scenario, or of a mix of scenarios, without repetition."""
        if scenario in SCENARIOS:
            return self.answer(self.target, self.queries.scenarios[scenario], temperature, scenario)
        weights = self.profile.plan.mixes[scenario]
        parts = {name: self.answer_scenario(name, temperature) for name in weights}
        return mix_prompts(parts, weights=weights).dataset

    def choose_rows(self, cell: Cell) -> Dataset:
        """The rows that a cell learns from, with the teacher's signal where its teacher is cached.

        Raises:
            `ValueError`: The scenario has fewer queries than the cell wants.
        """
        rows = self.answer_scenario(cell.scenario, cell.completion_temperature)
        if len(rows) < cell.num_prompts:
            raise ValueError(
                f"{cell.domain} has {len(rows)} {cell.scenario} queries, but a cell wants {cell.num_prompts}. Lower "
                "the plan's sizes, or raise `num_synthetic` or `max_prompt_tokens`."
            )
        rows = rows.shuffle(seed=cell.seed).select(range(cell.num_prompts)).select_columns(ID_COLUMNS)
        training = self.profile.training
        if cell.domain in training.length_ordered:
            lengths = [len(row["prompt_ids"]) + len(row["completion_ids"]) for row in rows]
            rows = rows.select(order_by_length(lengths, training.options["per_device_train_batch_size"], cell.seed))
        if cell.signal is None:
            return rows
        signal = training.signals[cell.signal]
        return score_completions(
            self.target,
            rows,
            processing_class=self.tokenizer,
            teacher_signal=signal["method"],
            num_draws=signal.get("num_draws"),
            signal_top_k=signal.get("top_k"),
            sampling_temperature=cell.completion_temperature,
            max_new_tokens=self.profile.data.max_new_tokens,
            batch_size=training.batch_size,
            seed=cell.seed,
            show_progress=False,
        )

    def list_texts(self, split: str) -> dict[str, tuple[float, Dataset]]:
        """What the domain target answers to the prompts of a split, by setting: its temperature and the texts."""
        prompts = {"test": self.queries.test, "validation": self.queries.validation}[split]
        return {
            setting: (temperature, self.answer(self.target, prompts, temperature, split))
            for setting, temperature in SETTINGS.items()
        }


SETTINGS = {"greedy": 0.0, "t1": 1.0}


def make_answers(lab: Lab) -> None:
    """Makes a domain's queries and answers; the record gets how good the queries are and what an answer takes."""
    record, queries = lab.workspace.record, lab.queries
    for split in ("test", "validation"):
        lab.list_texts(split)
    for scenario in SCENARIOS:
        answers = lab.answer_scenario(scenario, 1.0)
        key = f"{lab.folder.name}/{scenario}"
        if record.find("queries", key, lab.build) is None:
            prompts = queries.scenarios[scenario]
            record.append(
                "queries", key, build=lab.build, domain=lab.domain, scenario=scenario,
                **judge_queries(lab, prompts, answers), made=queries.report if scenario != "curated" else {},
            )  # fmt: skip
    key = lab.folder.name
    if record.find("completion_seconds", key, lab.build) is None:
        seconds = time_answers(lab)
        record.append("completion_seconds", key, build=lab.build, domain=lab.domain, seconds_per_completion=seconds)


def judge_queries(lab: Lab, prompts: Dataset, answers: Dataset) -> dict[str, Any]:
    """Statistics, overlap with the test prompts, perplexity of the last user message under the target, samples."""
    judged = prompts.select(range(min(NUM_JUDGED, len(prompts))))
    sample = answers.select(range(min(NUM_SHOWN, len(answers))))
    report = describe_prompts(prompts, lab.tokenizer, other=lab.queries.test, show_progress=False)
    return {
        "report": report.to_dict(),
        "perplexity": compute_perplexity(lab.target, lab.tokenizer, judged["prompt"]),
        "judged": len(judged),
        "mean_completion_tokens": sum(map(len, answers["completion_ids"])) / len(answers),
        "samples": [
            {"query": row["prompt"][-1]["content"][:SHOWN_CHARACTERS],
             "answer": row["completion"][0]["content"][:SHOWN_CHARACTERS]}
            for row in sample
        ],
    }  # fmt: skip


@torch.no_grad()
def compute_perplexity(
    target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[dict[str, str]]]
) -> float:
    """exp of the mean negative log-likelihood of the last user messages' tokens, given what stands before them."""
    total, count = 0.0, 0
    for prompt in prompts:
        system = prompt[0]["content"] if prompt[0]["role"] == "system" else None
        earlier = prompt[1 if system is not None else 0 : -1]
        start = len(derive_pre_query(tokenizer, system_prompt=system, messages=earlier))
        ids = torch.tensor([tokenizer.apply_chat_template(prompt, return_dict=False)], device=target.device)  # (1, T)
        log_q = target(ids).logits[0, start - 1 : -1].float().log_softmax(-1)  # (N, V)
        total -= log_q.gather(-1, ids[0, start:, None]).sum().item()
        count += ids.shape[1] - start
    return math.exp(total / count)


def time_answers(lab: Lab) -> float:
    """Seconds that one answer at temperature 1 takes, in batches."""
    historical = lab.queries.scenarios["historical"]
    prompts = historical.select(range(min(NUM_TIMED, len(historical))))
    started = time.perf_counter()
    generate_responses(
        lab.target,
        prompts,
        processing_class=lab.tokenizer,
        max_new_tokens=lab.profile.data.max_new_tokens,
        temperature=1.0,
        batch_size=lab.profile.training.batch_size,
        show_progress=False,
    )
    return (time.perf_counter() - started) / len(prompts)
