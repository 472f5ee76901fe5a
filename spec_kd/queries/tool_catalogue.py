"""Tool schemas to draw from, so that synthetic queries are about tools that exist."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

Tool = dict[str, object]


def load_tool_catalogue(source: str | Path | Sequence[Mapping[str, object]]) -> list[Tool]:
    """Tool schemas from a list or a file.

    Args:
        source (`str`, `Path` or `list[dict]`):
            Schemas, or a file with a list of them: YAML (`.yaml`, `.yml`), JSON, or one schema a line (`.jsonl`). A
            schema is OpenAI's (`{"type": "function", "function": {"name": ...}}`) or its inner part alone.

    Returns:
        `list[dict]`: The schemas as they came.

    Raises:
        `FileNotFoundError`: There is no such file.
        `ValueError`: A file of another kind or that cannot be read, no tool at all, a schema without a name, two tools
            of the same name.
    """
    tools = _read(Path(source)) if isinstance(source, str | Path) else source
    where = f"`{source}`" if isinstance(source, str | Path) else "The tool catalogue"
    if not isinstance(tools, Sequence) or isinstance(tools, str) or not tools:
        raise ValueError(f"{where} must be a list of at least one tool schema, got {tools!r:.80}.")
    names = set()
    for number, tool in enumerate(tools):
        inner = tool.get("function", tool) if isinstance(tool, Mapping) else None
        name = inner.get("name") if isinstance(inner, Mapping) else None
        if not isinstance(name, str) or not name:
            raise ValueError(
                f"{where} has no name for tool {number} ({tool!r:.80}). A schema is {{'name': ..., 'description': ..., "
                "'parameters': ...}, alone or as the `function` of {'type': 'function', ...}."
            )
        if name in names:
            raise ValueError(f"{where} has the tool {name!r} more than once (number {number}): give each its own name.")
        names.add(name)
    return [dict(tool) for tool in tools]


def dump_tools(tools: Sequence[Tool]) -> str:
    """The schemas as JSON text, as the `tools` column of a prompt data set has them."""
    return json.dumps(tools, ensure_ascii=False)


def wrap_tool(tool: Tool) -> Tool:
    """The schema in OpenAI's form, which chat templates expect."""
    return tool if "function" in tool else {"type": "function", "function": tool}


def _read(path: Path) -> object:
    if not path.is_file():
        raise FileNotFoundError(f"The tool catalogue `{path}` does not exist.")
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix in (".yaml", ".yml"):
            return yaml.safe_load(text)
        if path.suffix == ".json":
            return json.loads(text)
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        raise ValueError(f"The tool catalogue `{path}` cannot be read: {error}") from error
    raise ValueError(f"The tool catalogue `{path}` must end in .yaml, .yml, .json or .jsonl.")
