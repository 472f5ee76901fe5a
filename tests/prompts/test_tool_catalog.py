import json

import pytest
import yaml

from spec_kd.prompts.tool_catalog import dump_tools, load_tool_catalog, read_tools, wrap_tool

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
    assert load_tool_catalog(path) == load_tool_catalog(str(path)) == load_tool_catalog(TOOLS) == TOOLS


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
def test_catalogs_that_are_none_are_refused(tools, message):
    with pytest.raises(ValueError, match=message):
        load_tool_catalog(tools)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [("a.json", "[{", "cannot be read"), ("a.yaml", "- [", "cannot be read"), ("a.txt", "[]", "must end in .yaml")],
)
def test_files_that_are_none_are_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_tool_catalog(tmp_path / name)


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"`no/tools.json` does not exist"):
        load_tool_catalog("no/tools.json")


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path):
    path = tmp_path / "tools.json"
    path.write_text(json.dumps(TOOLS), encoding="utf-8-sig")
    assert load_tool_catalog(path) == TOOLS


@pytest.mark.parametrize(
    "value",
    [
        TOOLS,
        json.dumps(TOOLS),
        "\n\n".join(map(json.dumps, TOOLS)),  # one after the other, as some ShareGPT sets have them
        ", ".join(json.dumps(tool, indent=1) for tool in TOOLS),
    ],
)
def test_tools_of_a_record_are_read(value):
    assert read_tools(value) == TOOLS


@pytest.mark.parametrize("value", [None, "", " ", [], "[]", "null", {}])
def test_a_record_may_have_no_tools(value):
    assert read_tools(value) is None


def test_one_schema_is_a_list_of_one_and_names_may_repeat_in_a_log():
    assert read_tools(BARE) == read_tools(json.dumps(BARE)) == [BARE]
    assert read_tools([BARE, BARE]) == [BARE, BARE]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("get_weather: tells the weather", "must be tool schemas as a list or as JSON, got the text 'get_weather"),
        ('{"name": "a"} get_weather', "got the text 'get_weather"),
        ('"get_weather"', "must be a list of at least one"),
        ("[" * 100_000, "must be tool schemas"),
        ('["get_weather"]', "no name for tool 0"),
        (["{}"], "no name for tool 0"),
        (7, "must be a list"),
        (b"[]", "must be a list"),
        ([{"type": "web_search"}], "no name for tool 0"),
        ([{"name": "add", "parameters": "x: int"}], "'add' whose `parameters` is not a JSON schema"),
        ([{"function": {"name": "add", "description": ["Adds."]}}], "'add' whose `description` is not text"),
    ],
)
def test_what_is_no_tool_is_refused(value, message):
    with pytest.raises(ValueError, match=message):
        read_tools(value)
