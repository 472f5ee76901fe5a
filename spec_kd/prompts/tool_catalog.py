"""Reads and checks tool schemas: catalogs for synthetic queries, and the tools of logs and datasets."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import yaml

Tool = dict[str, object]
START = re.compile(r"[^\s,]")  # of a schema that stands after another one
READERS: dict[str, Callable[[str], object]] = {
    ".yaml": yaml.safe_load,
    ".yml": yaml.safe_load,
    ".json": json.loads,
    ".jsonl": lambda text: [json.loads(line) for line in text.splitlines() if line.strip()],
}


def load_tool_catalog(source: str | Path | Sequence[Mapping[str, object]]) -> list[Tool]:
    """Tool schemas from a list or a file.

    Args:
        source (`str`, `Path` or `list[dict]`):
            Schemas, or a file with a list of them: YAML (`.yaml`, `.yml`), JSON, or one schema per line (`.jsonl`). A
            schema is OpenAI's (`{"type": "function", "function": {"name": ...}}`) or only its inner part.

    Returns:
        `list[dict]`: The schemas, unchanged.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is of another kind or cannot be read, there is no tool, a schema has no name, or two tools
            have the same name.
    """
    tools = _read(Path(source)) if isinstance(source, str | Path) else source
    where = f"`{source}`" if isinstance(source, str | Path) else "The tool catalog"
    return check_tools(tools, where)


def check_tools(tools: object, where: str = "`tools`", *, unique_names: bool = True) -> list[Tool]:
    """Checks that a chat template can print schemas as tools, and returns them.

    Args:
        tools (`list[dict]`): Schemas, OpenAI's or only their inner part.
        where (`str`, *optional*, defaults to ``"`tools`"``): Name of the schemas in the error.
        unique_names (`bool`, *optional*, defaults to `True`): Whether two tools with the same name are refused.

    Returns:
        `list[dict]`: The schemas, unchanged.

    Raises:
        ValueError: The value is no list or an empty one, a schema has no name or has parameters or a description of
            another type, or two tools have the same name.
    """
    if not isinstance(tools, Sequence) or isinstance(tools, str | bytes) or not tools:
        raise ValueError(f"{where} must be a list of at least one tool schema, got {tools!r:.80}.")
    names = set()
    for number, tool in enumerate(tools):
        inner = tool.get("function", tool) if isinstance(tool, Mapping) else None
        name = inner.get("name") if isinstance(inner, Mapping) else None
        if not isinstance(inner, Mapping) or not isinstance(name, str) or not name:
            raise ValueError(
                f"{where} has no name for tool {number} ({tool!r:.80}). A schema is {{'name': ..., 'description': ..., "
                "'parameters': ...}, alone or as the `function` of {'type': 'function', ...}."
            )
        for key, type_, kind in (("description", str, "text"), ("parameters", Mapping, "a JSON schema")):
            if inner.get(key) is not None and not isinstance(inner[key], type_):
                raise ValueError(f"{where} has a tool {name!r} whose `{key}` is not {kind}: {inner[key]!r:.80}.")
        if name in names and unique_names:
            raise ValueError(f"{where} has the tool {name!r} more than once (number {number}): give each its own name.")
        names.add(name)
    return [dict(tool) for tool in tools]


def read_tools(value: object, where: str = "`tools`") -> list[Tool] | None:
    """Reads tools from a log or a column.

    Args:
        value (`list[dict]`, `dict`, `str` or `None`):
            Schemas, one schema, or JSON text of them, also one schema after the other. Two tools may have the same
            name, as servers allow it.
        where (`str`, *optional*, defaults to ``"`tools`"``): Name of the value in the error.

    Returns:
        `list[dict]` or `None`: The schemas; `None` if there are none.

    Raises:
        ValueError: A text is not JSON, or [`check_tools`] refuses the schemas.
    """
    if isinstance(value, str):
        value = _decode_all(value, where)
        if len(value) == 1 and not isinstance(value[0], Mapping):
            value = value[0]
    if value is None or (isinstance(value, Sequence | Mapping) and not value):
        return None
    return check_tools([value] if isinstance(value, Mapping) else value, where, unique_names=False)


def _decode_all(text: str, where: str) -> list[object]:
    """The JSON values in a text, which stand one after the other."""
    decoder, values, position = json.JSONDecoder(), [], 0
    while start := START.search(text, position):
        try:
            value, position = decoder.raw_decode(text, start.start())
        except (ValueError, RecursionError) as error:
            shown = text[start.start() :][:60]
            raise ValueError(f"{where} must be tool schemas as a list or as JSON, got the text {shown!r}.") from error
        values.append(value)
    return values


def dump_tools(tools: Sequence[Tool]) -> str:
    """The schemas as JSON text, the form of the `tools` column of a prompt set."""
    return json.dumps(tools, ensure_ascii=False)


def wrap_tool(tool: Tool) -> Tool:
    """The schema in OpenAI's form, which chat templates expect."""
    return tool if "function" in tool else {"type": "function", "function": tool}


def _read(path: Path) -> object:
    if not path.is_file():
        raise FileNotFoundError(f"The tool catalog `{path}` does not exist.")
    if path.suffix not in READERS:
        raise ValueError(f"The tool catalog `{path}` must end in {', '.join(READERS)}.")
    try:
        return READERS[path.suffix](path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        raise ValueError(f"The tool catalog `{path}` cannot be read: {error}") from error
