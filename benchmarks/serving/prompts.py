"""Real prompts for the serving engines, and where each comes from: the data itself is not this project's to ship."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

DOMAINS = ("function_calling", "biology", "general")
PROMPTS_PER_DOMAIN = 16
NUM_MANY = 300
# So that a recording stays quick on one core
MAX_PROMPT_TOKENS = 512
MAX_SHORT_TOKENS = 64


@dataclass(frozen=True)
class Prompt:
    """A prompt in the target's chat template, as token ids.

    Args:
        domain (`str`): Folder of the data file.
        split (`str`): Name of the data file without its suffix.
        line (`int`): Line of the data file, from 0.
        messages (sequence of `dict`): The conversation that the ids say.
        ids (sequence of `int`): Token ids, with the generation prompt at the end.
    """

    domain: str
    split: str
    line: int
    messages: Sequence[dict[str, str]]
    ids: Sequence[int]

    def describe(self) -> dict[str, Any]:
        """What a recording says about the prompt: enough to find it again, and to check that it is the same."""
        place = {"domain": self.domain, "split": self.split, "line": self.line}
        return {**place, "num_tokens": len(self.ids), "sha256": hash_ids(self.ids)}


def hash_ids(ids: Sequence[int]) -> str:
    """SHA-256 of the ids, written as decimal numbers with a space between them."""
    return hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()


def read_prompts(
    data_dir: Path, domain: str, tokenizer: PreTrainedTokenizerBase, split: str = "test", max_tokens: int | None = None
) -> Iterator[Prompt]:
    """The prompts of `<data_dir>/<domain>/<split>.jsonl` with at most `max_tokens` tokens, in the order of the file."""
    with (data_dir / domain / f"{split}.jsonl").open(encoding="utf-8") as file:
        for line, row in enumerate(map(json.loads, file)):
            text = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            if max_tokens is None or len(ids) <= max_tokens:
                yield Prompt(domain, split, line, row["prompt"], ids)


@dataclass(frozen=True)
class SelectedPrompts:
    """The prompts that every engine is asked.

    Args:
        mixed (list of `Prompt`): 16 of each domain.
        calls (list of `Prompt`): 48 of function calling, for structured output.
        many (list of `Prompt`): 300 short ones of the other two domains, for what chance decides.
    """

    mixed: list[Prompt]
    calls: list[Prompt]
    many: list[Prompt]

    def get(self, setting: str) -> list[Prompt]:
        """The prompts that are asked in a setting."""
        short = sorted(self.mixed, key=lambda prompt: len(prompt.ids))[: len(self.mixed) // 2]
        chosen = {"schema": self.calls, "probabilistic": self.many, "parallel": short}
        return chosen.get(setting.split("-")[0], self.mixed)


def select_prompts(data_dir: Path, tokenizer: PreTrainedTokenizerBase) -> SelectedPrompts:
    """The first prompts of each domain that are short enough."""

    def take(domain: str, count: int, max_tokens: int = MAX_PROMPT_TOKENS) -> list[Prompt]:
        return list(islice(read_prompts(data_dir, domain, tokenizer, max_tokens=max_tokens), count))

    calls = take("function_calling", PROMPTS_PER_DOMAIN * len(DOMAINS))
    others = DOMAINS[1:]
    mixed = [prompt for domain in others for prompt in take(domain, PROMPTS_PER_DOMAIN)]
    many = [prompt for domain in others for prompt in take(domain, NUM_MANY // len(others), MAX_SHORT_TOKENS)]
    return SelectedPrompts(calls[:PROMPTS_PER_DOMAIN] + mixed, calls, many)


def find_prompt(data_dir: Path, place: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """The prompt that a recording describes; raises `ValueError` if the data or the tokenizer is another one."""
    for prompt in read_prompts(data_dir, place["domain"], tokenizer, place["split"]):
        if prompt.line == place["line"]:
            if prompt.describe() != place:
                raise ValueError(
                    f"Line {place['line']} of {place['domain']}/{place['split']}.jsonl gives other token ids than were "
                    "recorded: the data file, the tokenizer or its chat template is not the same."
                )
            return prompt
    raise ValueError(f"{data_dir / place['domain'] / place['split']}.jsonl has no line {place['line']}.")


def read_tools(messages: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
    """The tools that the system message of a function-calling prompt lists, as JSON schemas."""
    content = messages[0]["content"]
    return json.JSONDecoder().raw_decode(content, content.index("\n[") + 1)[0]


def build_call_schema(tools: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """JSON schema of a list of calls of `tools`: objects with one of the names, and arguments that are an object."""
    properties = {"name": {"enum": [tool["name"] for tool in tools]}, "arguments": {"type": "object"}}
    call = {
        "type": "object",
        "properties": properties,
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }
    return {"type": "array", "items": call, "minItems": 1}
