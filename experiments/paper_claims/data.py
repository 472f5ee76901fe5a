"""Conversations of a domain: which train its target, which ask questions, and the queries of the three scenarios.

A share of each domain's conversations trains its target. Of the rest, those that the profile's role covers play
historical queries, the others curated data; the test prompts are historical queries of the test file. The queries of
the third scenario are written by the target.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.build_models import read_rows
from examples.made_up.models import build_stage
from spec_kd.prompts.curated import load_curated_prompts
from spec_kd.prompts.filters import TextFilter
from spec_kd.prompts.logs.query_logs import load_query_logs
from spec_kd.prompts.synthesis.synthesis import SyntheticQueries, synthesize_queries

from .profile import Data, Profile

SCENARIOS = ("historical", "curated", "synthetic")
QUERY_COLUMNS = ["prompt", "scenario", "source", "conversation_id"]


@dataclass(frozen=True)
class DomainRows:
    """Conversations of a domain, each with `prompt` and `completion`.

    Args:
        target (`list[dict]`): That its target is trained on.
        historical, curated (`list[dict]`): That ask questions; their answers are not used.
        held_out (`list[dict]`): All of the test file, for the target's curve.
        test (`list[dict]`): Those of them that play historical queries.
    """

    target: list[dict]
    historical: list[dict]
    curated: list[dict]
    held_out: list[dict]
    test: list[dict]


def read_domain(profile: Profile, domain: str) -> DomainRows:
    """Splits the conversations of a domain."""
    folder, role = Path(profile.data.folder) / domain, profile.domains[domain].historical
    target, others = split_rows(read_rows(folder, "train"), profile.data)
    held_out = read_rows(folder, "test")
    return DomainRows(
        target=target,
        historical=[row for row in others if role.covers(row["prompt"])],
        curated=[row for row in others if not role.covers(row["prompt"])],
        held_out=held_out,
        test=[row for row in held_out if role.covers(row["prompt"])],
    )


def split_rows(rows: list[dict], data: Data) -> tuple[list[dict], list[dict]]:
    """Rows for the target and the others; conversations that begin with the same question stay together."""
    parts: tuple[list[dict], list[dict]] = ([], [])
    for row in rows:
        first = next(message["content"] for message in row["prompt"] if message["role"] == "user")
        place = int.from_bytes(hashlib.sha256(first.encode()).digest()[:4], "big") / 2**32
        parts[place >= data.share_for_target].append(row)
    return parts


@dataclass(frozen=True)
class Queries:
    """Prompt sets of a domain, with `prompt`, `scenario`, `source` and `conversation_id`.

    Args:
        scenarios (`dict[str, Dataset]`): By the names of `SCENARIOS`, to train on.
        validation, test (`Dataset`): Historical queries that nothing is trained on.
        report (`dict`): What reading the logs and writing queries reported.
    """

    scenarios: dict[str, Dataset]
    validation: Dataset
    test: Dataset
    report: dict[str, Any]


def make_queries(
    profile: Profile, domain: str, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> Queries:
    """Makes the prompt sets of a domain, or opens what an earlier call left in `folder`.

    Args:
        profile (`Profile`): Roles, limits and options of the synthesis.
        domain (`str`): Name.
        target (`PreTrainedModel`): The domain target, which writes the synthetic queries.
        tokenizer (`PreTrainedTokenizerBase`): Its own.
        folder (`Path`): Where the sets are kept.

    Raises:
        `ValueError`: No query of a kind is left within the limits.
    """
    rows, data = read_domain(profile, domain), profile.data
    logs = {
        name: load_query_logs(
            _write_logs(folder / f"{name}_logs", getattr(rows, name)),
            folder / name,
            format="trl",
            processing_class=tokenizer,
            max_tokens=data.max_prompt_tokens,
            test_fraction=fraction,
            show_progress=False,
        )
        for name, fraction in (("historical", data.validation_fraction), ("test", 0.0))
    }
    curated = load_curated_prompts(Dataset.from_list([{"prompt": row["prompt"]} for row in rows.curated]))

    def has_room(row: dict[str, Any]) -> bool:
        ids = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        return len(ids) <= data.max_prompt_tokens

    test = _draw(logs["test"].train, data.num_test)
    synthetic = write_queries(profile, domain, target, tokenizer, rows.target, test, folder / "synthetic")
    return Queries(
        scenarios={
            "historical": _draw(logs["historical"].train, data.max_queries),
            "curated": _draw(curated.filter(has_room, load_from_cache_file=False), data.max_queries),
            "synthetic": synthetic.dataset.select_columns(QUERY_COLUMNS),
        },
        validation=_draw(logs["historical"].test, data.num_validation),
        test=test,
        report={"logs": logs["historical"].report.to_dict(), "synthesis": synthetic.report.to_dict()},
    )


def write_queries(
    profile: Profile,
    domain: str,
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict],
    test: Dataset,
    folder: Path,
) -> SyntheticQueries:
    """The target's own queries; where it reads tools in its system prompt, over tools of its training data."""
    options = dict(profile.domains[domain].synthesis)
    pattern = options.pop("tools_pattern", None)
    if "text_filter" in options:
        options["text_filter"] = TextFilter(**options["text_filter"])
    if pattern is not None:
        options |= {"tool_catalog": collect_tools(rows, pattern), "keep_system_prompt": True}
    return synthesize_queries(
        target,
        num_queries=profile.domains[domain].num_synthetic,
        processing_class=tokenizer,
        max_completion_tokens=profile.data.max_new_tokens,
        test_set=test,
        batch_size=profile.training.batch_size,
        output_dir=str(folder),
        show_progress=False,
        **options,
    )


def collect_tools(rows: list[dict], pattern: str) -> list[dict]:
    """Schemas of all tools, the first of each name, in the JSON list after `pattern` in system prompts."""
    tools: dict[str, dict] = {}
    for row in rows:
        found = re.search(pattern, row["prompt"][0]["content"])
        if found is None:
            continue
        listed, _ = json.JSONDecoder().raw_decode(row["prompt"][0]["content"][found.end() :])
        for tool in listed:
            tools.setdefault(tool["name"], tool)
    if not tools:
        raise ValueError(f"No system prompt has tools after `tools_pattern={pattern!r}`.")
    return list(tools.values())


def _write_logs(folder: Path, rows: list[dict]) -> Path:
    """The rows as a log file, written once, since its time of change says whether it was read already."""

    def write(partial: Path) -> None:
        text = "".join(json.dumps({"prompt": row["prompt"]}, ensure_ascii=False) + "\n" for row in rows)
        (partial / "logs.jsonl").write_text(text, encoding="utf-8")

    return build_stage(folder, write) / "logs.jsonl"


def _draw(queries: Dataset, count: int) -> Dataset:
    """Queries at random, since files are often sorted by where their rows are from."""
    return queries.shuffle(seed=0).select(range(min(count, len(queries)))).select_columns(QUERY_COLUMNS)
