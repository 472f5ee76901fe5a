"""Formats that completions must have: a JSON schema or a grammar, as options, rows and requests name them."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from spec_kd.open_types import JsonObject, JsonValue
from spec_kd.options import refuse

if TYPE_CHECKING:
    JsonSchema = JsonObject | str | None
else:
    JsonSchema = str | None  # the form that a command line and a recipe can give

JSON_SCHEMA_HELP = (
    "JSON schema that the server holds every completion to: a file, in Python also the schema itself. The "
    "`response_format` of a row comes first. By default completions are free text."
)
GRAMMAR_HELP = (
    "Grammar in GBNF, llama.cpp's notation, that the server holds every completion to: a file, in Python also its "
    "text. The `response_format` of a row comes first. By default completions are free text."
)
JSON_SCHEMA, GRAMMAR = "json_schema", "grammar"


@dataclass(frozen=True)
class ResponseFormat:
    """What a server holds a completion to.

    Args:
        kind (`str`): `"json_schema"` or `"grammar"`.
        text (`str`): The schema as JSON, or the grammar in GBNF, whose first rule is `root`.
    """

    kind: str
    text: str

    @classmethod
    def of_options(cls, json_schema: JsonSchema, grammar: str | None) -> "ResponseFormat | None":
        """The format that two options name, of which one may be given; `None` without any.

        Raises:
            ValueError: Both are given, a file is missing, or a schema is no JSON object.
        """
        if json_schema is not None and grammar is not None:
            raise ValueError("`json_schema` and `grammar` exclude each other. Give one of them.")
        if grammar is not None:
            return cls(GRAMMAR, grammar if "::=" in grammar else _read_file("grammar", grammar))
        if json_schema is None:
            return None
        if isinstance(json_schema, str):
            is_text = json_schema.lstrip().startswith("{")
            json_schema = _parse(json_schema if is_text else _read_file("json_schema", json_schema), "`json_schema`")
        return cls._of_schema(json_schema, "`json_schema`")

    @classmethod
    def of_request(cls, value: JsonValue, name: str = "`response_format`") -> "ResponseFormat | None":
        """The format that a `response_format` of OpenAI's requests names, an object or JSON text; `None` for free text.

        Beside OpenAI's types `text`, `json_object` and `json_schema` there is `{"type": "grammar", "grammar": ...}`.

        Args:
            value: The object, or its JSON text.
            name (`str`, *optional*, defaults to `` "`response_format`" ``): What it is called in errors.

        Raises:
            ValueError: It is none of these.
        """
        if value is None:
            return None
        value = _parse(value, name) if isinstance(value, str) else value
        kind = value.get("type") if isinstance(value, Mapping) else None
        if kind == "text":
            return None
        if kind == "json_object":
            return cls._of_schema({"type": "object"}, name)
        if kind == JSON_SCHEMA:
            return cls._of_schema((value.get(JSON_SCHEMA) or value).get("schema"), name)
        if kind == GRAMMAR and isinstance(value.get(GRAMMAR), str):
            return cls(GRAMMAR, value[GRAMMAR])
        raise ValueError(
            f"{name} is {value!r:.80}, but must have the `type` text, json_object, json_schema (with `json_schema`) or "
            "grammar (with `grammar`)."
        )

    def to_request(self) -> JsonObject:
        """The format as [`of_request`] reads it."""
        if self.kind == GRAMMAR:
            return {"type": GRAMMAR, GRAMMAR: self.text}
        return {"type": JSON_SCHEMA, JSON_SCHEMA: {"name": "response", "schema": json.loads(self.text)}}

    @classmethod
    def _of_schema(cls, schema: JsonValue, name: str) -> "ResponseFormat":
        if not isinstance(schema, Mapping):
            raise ValueError(f"The JSON schema of {name} is {schema!r:.80}, but must be an object.")
        return cls(JSON_SCHEMA, json.dumps(schema))


def hash_formats(formats: Sequence[ResponseFormat | None]) -> str:
    """SHA-256 of what rows are held to."""
    return hashlib.sha256(json.dumps([one and one.to_request() for one in formats]).encode()).hexdigest()


def _read_file(option: str, path: str) -> str:
    file = Path(path).expanduser()
    refuse((not file.is_file(), f"`{option}` is {path!r:.80}, which is no file."))
    return file.read_text(encoding="utf-8")


def _parse(text: str, name: str) -> JsonValue:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name} is no JSON ({error}): {text!r:.80}.") from None
