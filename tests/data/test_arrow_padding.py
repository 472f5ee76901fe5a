"""`None` that somebody wrote is told from `None` that Arrow put for a missing key."""

import json

import pytest
from datasets import Dataset, Features, IterableDataset, Json, List

from spec_kd.data.arrow_padding import iterate_rows, remove_padding
from spec_kd.prompts.mixing import mix_prompts
from spec_kd.prompts.unified_columns import unify_columns

USER = {"role": "user", "content": "Hi"}


def call(**arguments):
    return {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}


def schema(**city):
    return [{"name": "f", "parameters": {"type": "object", "properties": {"city": {"type": "string", **city}}}}]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER, call(unit=None, city="Rome")]},
        {"prompt": [USER, call(place={"x": None}, items=[{"y": None, "z": 1}])]},
        {"prompt": [USER], "tools": schema(default=None)},
        {"prompt": [USER], "tools": [{"name": "f", "input_schema": {"default": None}}]},
    ],
)
def test_null_inside_of_arguments_and_parameters_stays(row):
    assert list(iterate_rows(Dataset.from_list([row] * 2))) == [row] * 2


def test_keys_of_other_rows_and_other_messages_go():
    rows = [
        {"prompt": [USER, call(city="Rome")], "tools": schema(enum=["Rome"]), "n": 1},
        {"prompt": [USER, {"role": "tool", "content": "7", "name": "f"}], "tools": schema(), "n": None},
    ]
    assert list(iterate_rows(Dataset.from_list(rows))) == [rows[0], {k: v for k, v in rows[1].items() if k != "n"}]


def test_null_of_clients_goes():
    """OpenAI's client writes `null` for what a message does not have."""
    message = {**USER, "tool_calls": None, "function_call": None}
    (row,) = iterate_rows(Dataset.from_list([{"prompt": [message]}]))
    assert row == {"prompt": [USER]}


def test_what_is_json_stays_as_it_is():
    rows = [{"prompt": [USER, call(a=None)]}, {"prompt": [{**USER, "name": None}]}]
    dataset = Dataset.from_list(rows, features=Features({"prompt": List(Json())}))
    assert list(iterate_rows(dataset)) == rows
    assert list(iterate_rows(IterableDataset.from_generator(lambda: iter(rows)))) == rows
    assert remove_padding(json.dumps(schema(default=None)), dataset.features["prompt"]) is not None


def test_columns_brought_to_one_type_keep_null():
    tools = schema(default=None)
    parts = {
        "list": Dataset.from_list([{"prompt": [USER, call(unit=None)], "tools": tools}]),
        "text": Dataset.from_list([{"prompt": [USER, call(unit="C")], "tools": json.dumps(tools)}]),
        "other": Dataset.from_list([{"prompt": [USER, call(unit=3)], "tools": None}]),
    }
    unified = unify_columns(parts)
    assert [json.loads(unified[name][0]["tools"]) for name in ("list", "text")] == [tools, tools]
    del parts["other"]
    mixed = mix_prompts(parts, order="curriculum").dataset
    arguments = [row["prompt"][1]["tool_calls"][0]["function"]["arguments"] for row in iterate_rows(mixed)]
    assert arguments == [{"unit": None}, {"unit": "C"}]
