import json

import pytest

from spec_kd.sampling.response_format import ResponseFormat

SCHEMA = {"type": "object", "properties": {"b": {}, "a": {}}}
GRAMMAR = 'root ::= "x"'


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        ({"type": "text"}, None),
        ({"type": "json_object"}, ("json_schema", '{"type": "object"}')),
        ({"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}, ("json_schema", json.dumps(SCHEMA))),
        ({"type": "json_schema", "schema": SCHEMA}, ("json_schema", json.dumps(SCHEMA))),
        ({"type": "grammar", "grammar": GRAMMAR}, ("grammar", GRAMMAR)),
    ],
)
def test_requests_are_read_as_objects_and_as_text(value, expected):
    expected = expected and ResponseFormat(*expected)
    assert ResponseFormat.of_request(value) == expected
    if value is not None:
        assert ResponseFormat.of_request(json.dumps(value)) == expected
    if expected is not None:
        assert ResponseFormat.of_request(expected.to_request()) == expected


def test_options_name_a_text_or_a_file(tmp_path):
    schema, grammar = tmp_path / "schema.json", tmp_path / "calls.gbnf"
    schema.write_text(json.dumps(SCHEMA, indent=2))
    grammar.write_text(GRAMMAR)
    for value in (SCHEMA, json.dumps(SCHEMA), str(schema)):
        assert ResponseFormat.of_options(value, None) == ResponseFormat("json_schema", json.dumps(SCHEMA))
    for value in (GRAMMAR, str(grammar)):
        assert ResponseFormat.of_options(None, value) == ResponseFormat("grammar", GRAMMAR)
    assert ResponseFormat.of_options(None, None) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((SCHEMA, GRAMMAR), "exclude each other"),
        (("missing.json", None), "`json_schema` is 'missing.json', which is no file"),
        ((None, "missing.gbnf"), "`grammar` is 'missing.gbnf', which is no file"),
        (("{no json", None), "`json_schema` is no JSON"),
        (([SCHEMA], None), "JSON schema of `json_schema` is .* must be an object"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ResponseFormat.of_options(*options)


@pytest.mark.parametrize("value", [{"type": "xml"}, {}, [1], "[1]", {"type": "grammar"}, 3])
def test_bad_requests_are_named(value):
    with pytest.raises(ValueError, match=r"row 7 is .* must have the `type` text, json_object, json_schema"):
        ResponseFormat.of_request(value, "`response_format` of row 7")
