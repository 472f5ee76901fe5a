"""Bundled function-calling conversations, generated from a catalog of tools: deterministic for a seed, no network.

A row is a prompt-completion conversation: the system message lists 2-4 tools as JSON schemas, the user asks for
something in one of several phrasings, and the completion is the JSON list of calls. Tools of the test split never
occur in the train split, not even as distractors, and neither do their schemas.
"""

import json
import random
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from string import Formatter

import yaml

from .values import COMPANIES, VALUES, make_word

CATALOG = Path(__file__).with_name("function_calling_tools.yaml")
INSTRUCTION = "Reply only with a JSON list of calls. Tools:\n"
# What people say around a request; the most frequent is nothing at all.
WRAPPERS = ("{}",) * 6 + (
    "Hi! {}",
    "Hello, {}",
    "Hey. {}",
    "{} Thanks!",
    "{} Thank you.",
    "{} It is urgent.",
    "Good morning! {}",
    "Quick question: {}",
    "One more thing: {}",
    "Could you help me? {}",
    "{} Please be quick.",
    "Sorry to bother you. {}",
)
SECOND_REQUESTS = ("{} Also: {}", "{} And then: {}", "{} After that: {}", "First: {} Second: {}")


@dataclass(frozen=True)
class Tool:
    """A tool of the catalog.

    Args:
        area (`str`): The area of life it belongs to.
        name (`str`): Its name, in snake case; `render_name` writes it in other styles.
        description (`str`): One line for the schema.
        arguments (`dict`): Argument name to a kind of value, a list (an enum) or a map of booleans to words.
        requests (`list[str]`): Phrasings of a request; an argument that one of them leaves out is optional.
        held_out (`bool`): In test conversations only.
    """

    area: str
    name: str
    description: str
    arguments: dict[str, str | list[str] | dict[bool, str]] = field(hash=False)
    requests: list[str] = field(hash=False)
    held_out: bool = False

    def json_type(self, argument: str) -> str:
        """`string`, `integer`, `number` or `boolean`."""
        kind = self.arguments[argument]
        if isinstance(kind, list):
            return "string"
        return "boolean" if isinstance(kind, dict) else VALUES[kind][0]

    def schema(self, name: str) -> dict:
        """The JSON schema of the tool under `name`."""
        properties = {}
        for argument, kind in self.arguments.items():
            properties[argument] = {"type": self.json_type(argument)}
            if isinstance(kind, list):
                properties[argument]["enum"] = kind
        mentioned = [{slot for _, slot, _, _ in Formatter().parse(request) if slot} for request in self.requests]
        required = [argument for argument in self.arguments if all(argument in slots for slots in mentioned)]
        parameters = {"type": "object", "properties": properties, "required": required}
        return {"name": name, "description": self.description, "parameters": parameters}

    def draw_call(self, rng: random.Random) -> tuple[str, dict]:
        """A request in words and the arguments it asks for."""
        request = rng.choice(self.requests)
        words, arguments = {}, {}
        for argument, kind in self.arguments.items():
            if f"{{{argument}}}" not in request:
                continue
            if isinstance(kind, dict):
                value = rng.random() < 0.5
                words[argument] = kind[value]
            else:
                value = rng.choice(kind) if isinstance(kind, list) else VALUES[kind][1](rng)
                words[argument] = value
            arguments[argument] = value
        return request.format(**words), arguments


@cache
def load_tools(catalog: Path = CATALOG) -> tuple[Tool, ...]:
    """All tools of the catalog, in its order."""
    areas = yaml.safe_load(catalog.read_text(encoding="utf-8"))
    return tuple(Tool(area=area, **tool) for area, tools in areas.items() for tool in tools)


def render_name(tool: Tool, rng: random.Random) -> str:
    """The tool's name in one of the styles of real APIs: snake or camel case, with an area, a vendor or a version.

    A name that is not always the same must be read from the prompt: a model cannot learn it by heart.
    """
    first, *rest = tool.name.split("_")
    camel = first + "".join(part.title() for part in rest)
    styles = (
        tool.name,
        tool.name,
        camel,
        f"{tool.area}.{tool.name}",
        f"{rng.choice(COMPANIES).lower()}_{tool.name}",
        f"{make_word(rng)}.{camel}",
        f"{tool.name}_v{rng.randint(2, 9)}",
    )
    return rng.choice(styles)


def draw_conversation(tools: list[Tool], rng: random.Random) -> dict:
    """One row over 2-4 of `tools`, with one call or (one row in eight) two."""
    listed = rng.sample(tools, rng.choices((2, 3, 4), weights=(15, 4, 1))[0])
    names = {tool.name: render_name(tool, rng) for tool in listed}
    calls = rng.sample(listed, 2) if rng.random() < 0.125 else [rng.choice(listed)]
    drawn = [(tool, *tool.draw_call(rng)) for tool in calls]
    requests = [request for _, request, _ in drawn]
    text = rng.choice(SECOND_REQUESTS).format(*requests) if len(drawn) == 2 else requests[0]
    answer = [{"name": names[tool.name], "arguments": arguments} for tool, _, arguments in drawn]
    return {
        "prompt": [
            {"role": "system", "content": INSTRUCTION + json.dumps([tool.schema(names[tool.name]) for tool in listed])},
            {"role": "user", "content": rng.choice(WRAPPERS).format(text)},
        ],
        "completion": [{"role": "assistant", "content": json.dumps(answer)}],
    }


def generate_conversations(split: str, num_rows: int, seed: int = 0) -> list[dict]:
    """Distinct function-calling rows of a split.

    Args:
        split (`str`): `"train"` (tools that are not held out) or `"test"` (held-out tools only).
        num_rows (`int`): How many rows.
        seed (`int`): The same seed gives the same rows.

    Returns:
        `list[dict]`: Rows with `prompt` (system and user message) and `completion` (assistant message).
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}.")
    tools = [tool for tool in load_tools() if tool.held_out == (split == "test")]
    rng = random.Random(f"function-calling/{split}/{seed}")
    rows: dict[str, dict] = {}
    while len(rows) < num_rows:
        row = draw_conversation(tools, rng)
        rows.setdefault(json.dumps(row["prompt"]), row)
    return list(rows.values())


def score_answers(answers: list[str], rows: list[dict]) -> dict[str, float]:
    """How well answers agree with the completions of `rows`.

    Args:
        answers (`list[str]`): One answer a row.
        rows (`list[dict]`): Rows of `generate_conversations`.

    Returns:
        `dict[str, float]`: Shares of answers that are JSON (`is_json`), call the right tools (`has_right_tools`) and
        are equal to the completion (`is_exact`).
    """
    hits = {"is_json": 0, "has_right_tools": 0, "is_exact": 0}
    for answer, row in zip(answers, rows, strict=True):
        wanted = json.loads(row["completion"][0]["content"])
        try:
            calls = json.loads(answer)
        except json.JSONDecodeError:
            continue
        hits["is_json"] += 1
        names = [call.get("name") for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
        hits["has_right_tools"] += names == [call["name"] for call in wanted]
        hits["is_exact"] += calls == wanted
    return {name: round(count / len(rows), 4) for name, count in hits.items()}
