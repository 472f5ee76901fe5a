import json

import pytest
import yaml

from spec_kd.queries.tool_catalogue import dump_tools, load_tool_catalogue, wrap_tool

BARE = {"name": "get_time", "description": "Die Zeit für eine Stadt.", "parameters": {"type": "object"}}
TOOLS = [BARE, {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tools.json", json.dumps(TOOLS)),
        ("tools.jsonl", "\n\n".join(map(json.dumps, TOOLS))),
        ("tools.yaml", yaml.safe_dump(TOOLS, allow_unicode=True)),
        ("tools.yml", yaml.safe_dump(TOOLS)),
    ],
)
def test_files_of_all_kinds_hold_the_same(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    assert load_tool_catalogue(path) == load_tool_catalogue(str(path)) == load_tool_catalogue(TOOLS) == TOOLS


def test_templates_get_openai_schemas_and_text_stays_readable():
    assert [wrap_tool(tool) for tool in TOOLS] == [{"type": "function", "function": BARE}, TOOLS[1]]
    assert json.loads(dump_tools(TOOLS)) == TOOLS
    assert "für" in dump_tools(TOOLS)


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ([], "at least one tool schema"),
        ({"name": "add"}, "must be a list"),
        ([BARE, {"description": "?"}], "no name for tool 1"),
        (["add"], "no name for tool 0"),
        ([BARE, BARE], "'get_time' more than once"),
    ],
)
def test_catalogues_that_are_none_are_refused(tools, message):
    with pytest.raises(ValueError, match=message):
        load_tool_catalogue(tools)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [("a.json", "[{", "cannot be read"), ("a.yaml", "- [", "cannot be read"), ("a.txt", "[]", "must end in .yaml")],
)
def test_files_that_are_none_are_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_tool_catalogue(tmp_path / name)


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"`no/tools.json` does not exist"):
        load_tool_catalogue("no/tools.json")
