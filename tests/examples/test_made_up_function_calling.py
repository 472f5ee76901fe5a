"""The bundled conversations: held-out tools stay held out, answers fit their schemas, and rows vary."""

import json

import pytest
from made_up import function_calling as corpus
from made_up import general

JSON_TYPES = {"string": str, "integer": int, "number": (int, float), "boolean": bool}
NUM_ROWS = 1500


@pytest.fixture(scope="module")
def rows():
    return {split: corpus.generate_conversations(split, NUM_ROWS, seed=0) for split in ("train", "test")}


def read_tools(row):
    return json.loads(row["prompt"][0]["content"].removeprefix(corpus.INSTRUCTION))


def read_calls(row):
    return json.loads(row["completion"][0]["content"])


def describe_schema(schema):
    """A schema without its name and words."""
    return json.dumps(schema["parameters"]["properties"], sort_keys=True)


def test_catalog_is_large_and_varied():
    tools = corpus.load_tools()
    assert len(tools) >= 80
    assert len({tool.area for tool in tools}) >= 12
    assert len({tool.name for tool in tools}) == len(tools)
    assert all(1 <= len(tool.arguments) <= 4 and len(tool.requests) >= 2 for tool in tools)
    types = {tool.json_type(argument) for tool in tools for argument in tool.arguments}
    assert types == {"string", "integer", "number", "boolean"}
    assert sum(tool.held_out for tool in tools) >= 20


def test_test_tools_and_schemas_never_occur_in_training(rows):
    seen = {split: [tool for row in rows[split] for tool in read_tools(row)] for split in rows}
    for describe in (describe_schema, lambda tool: tool["name"], lambda tool: tool["description"]):
        assert not {describe(tool) for tool in seen["train"]} & {describe(tool) for tool in seen["test"]}
    names = {split: {tool.name for tool in corpus.load_tools() if tool.held_out == (split == "test")} for split in rows}
    assert not names["train"] & names["test"]


def test_calls_name_a_listed_tool_and_fit_its_schema(rows):
    for row in rows["train"] + rows["test"]:
        tools = {tool["name"]: tool["parameters"] for tool in read_tools(row)}
        calls = read_calls(row)
        assert 2 <= len(tools) <= 4 and 1 <= len(calls) <= 2
        for call in calls:
            parameters = tools[call["name"]]
            assert set(parameters["required"]) <= set(call["arguments"]) <= set(parameters["properties"])
            for argument, value in call["arguments"].items():
                schema = parameters["properties"][argument]
                assert isinstance(value, JSON_TYPES[schema["type"]])
                assert isinstance(value, bool) == (schema["type"] == "boolean")
                assert value in schema.get("enum", [value])


def test_values_are_in_the_request(rows):
    for row in rows["train"][:300]:
        request = row["prompt"][1]["content"]
        for call in read_calls(row):
            for value in call["arguments"].values():
                assert isinstance(value, bool) or str(value) in request


def test_generation_is_deterministic_and_follows_the_seed(rows):
    assert corpus.generate_conversations("test", 100, seed=0) == rows["test"][:100]
    assert corpus.generate_conversations("test", 100, seed=1) != rows["test"][:100]
    assert general.generate_conversations(50, 10, 3) == general.generate_conversations(50, 10, 3)
    assert general.generate_conversations(50, 10, 3) != general.generate_conversations(50, 10, 4)


def test_rows_are_distinct_and_use_every_tool(rows):
    for split in rows:
        assert len({json.dumps(row["prompt"]) for row in rows[split]}) == NUM_ROWS
        used = {tool["description"] for row in rows[split] for tool in read_tools(row)}
        assert used == {tool.description for tool in corpus.load_tools() if tool.held_out == (split == "test")}
    assert len({call["name"] for row in rows["train"] for call in read_calls(row)}) > 300
    assert 0.05 < sum(len(read_calls(row)) == 2 for row in rows["train"]) / NUM_ROWS < 0.25


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'train' or 'test'"):
        corpus.generate_conversations("validation", 1)


def test_general_rows_have_no_json_and_disjoint_splits():
    train, test = general.generate_conversations(4000, 300, seed=0)
    questions = [{row["prompt"][0]["content"] for row in part} for part in (train, test)]
    assert len(questions[0]) == 4000 and len(questions[1]) == 300
    assert not questions[0] & questions[1]
    assert not any(set("{}[]") & set(m["content"]) for row in train + test for m in row["prompt"] + row["completion"])
    assert len({row["completion"][0]["content"] for row in train}) > 2500


def test_scores_of_answers():
    rows = corpus.generate_conversations("test", 3, seed=0)
    right = [row["completion"][0]["content"] for row in rows]
    assert corpus.score_answers(right, rows) == {"is_json": 1.0, "has_right_tools": 1.0, "is_exact": 1.0}
    wrong_value = json.loads(right[0])
    wrong_value[0]["arguments"] = {}
    scores = corpus.score_answers([json.dumps(wrong_value), "no JSON", "3"], rows)
    assert scores == {"is_json": 0.6667, "has_right_tools": 0.3333, "is_exact": 0.0}
