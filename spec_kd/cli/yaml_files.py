"""YAML files and `NAME=VALUE` pairs of users, read strictly: every key is a name and stands once.

`old_names.yaml` has the names of earlier versions, which are refused with the command that converts the file.
"""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import yaml

from spec_kd.cli.paths import PATH_OPTIONS
from spec_kd.open_types import Argument, JsonObject, JsonValue, Record
from spec_kd.options import refuse


def read_yaml(path: str | Path) -> JsonObject:
    """Reads the mapping in a YAML file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no YAML, holds no mapping, or has a key twice.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file `{path}`.")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)  # a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"`{path}` is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"`{path}` must hold `name: value` pairs, but holds {type(values).__name__}.")
    check_keys(values, f"`{path}`")
    return values


def check_keys(values: Mapping[object, object], where: str) -> None:
    """Raises `ValueError` for a key that is no text, such as a number, or `on`, which YAML reads as true."""
    fix = "but keys must be names. Put it in quotes if it is one."
    refuse(*((not isinstance(key, str), f"{where} has the key {key!r}, {fix}") for key in values))


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping. YAML would keep the last one silently."""

    def compose_mapping_node(self, anchor: Argument) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen and key.value != "<<":
                message = f"the key {key.value!r} is there twice"
                raise yaml.composer.ComposerError(None, None, message, key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return node


def read_pairs(value: Argument, name: str) -> JsonObject:
    """Pairs as a dictionary: `NAME=VALUE` texts, a mapping (YAML), or JSON text.

    A VALUE on a command line is read as in YAML: `4` is a number, `true` a boolean, `[1, 2]` a list, `float16` text.
    The value of a path option is text. One of `drafts` may stand alone, and is then named by its last folder.

    Args:
        value: One text or several, a mapping, or `None` for no pairs.
        name (`str`): Name of the option.

    Raises:
        ValueError: The value is none of these, or a name is there twice.
    """
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | Mapping):
        value = value[0]
    if value is None or value in ("", []):
        return {}
    if isinstance(value, str) and value.lstrip().startswith(("{", "[")):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"`{name}` is {value!r}, which is no JSON ({error}).") from error
    if isinstance(value, Mapping):
        check_keys(value, f"`{name}`")
        return dict(value)
    pairs: JsonObject = {}
    for text in value if isinstance(value, list) else [value]:
        key, equals, item = text.partition("=") if isinstance(text, str) else ("", "", "")
        if name == "drafts" and key and not equals:
            key, item = Path(key).name, key
        elif not equals or not key:
            raise ValueError(f"`{name}` is {text!r}, but must be {describe_pairs(name)} pairs.")
        if key in pairs:
            raise ValueError(f"`{name}` has {key!r} twice. Give each its own name: {describe_pairs(name)}.")
        pairs[key] = item if name in PATH_OPTIONS else _read_value(item)
    return pairs


def describe_pairs(name: str) -> str:
    """How a pair of an option is written."""
    return "NAME=PATH" if name in PATH_OPTIONS else "NAME=VALUE"


def _read_value(text: str) -> Argument:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


@cache
def load_old_names() -> JsonObject:
    """Loads the table: `keys`, `values`, `defaults` and `folders`."""
    return read_yaml(Path(__file__).with_name("old_names.yaml"))


def refuse_old_names(path: str | Path, values: Record) -> None:
    """Raises `ValueError` for a recipe or a file of options that has names of an earlier version."""
    if found := find_old_names(values):
        raise ValueError(
            f"`{path}` was written for an earlier version: it has {', '.join(found)}. Convert it: "
            f"`spec-kd convert {path}`."
        )


def find_old_names(values: JsonValue) -> list[str]:
    """The keys and values of an earlier version, each once."""
    names = load_old_names()
    if isinstance(values, list):
        return list(dict.fromkeys(name for value in values for name in find_old_names(value)))
    if not isinstance(values, Mapping):
        return []
    found = [f"`{key}`" for key in values if key in names["keys"]]
    for key, value in values.items():
        is_old = isinstance(value, str) and value in names["values"].get(key, ())
        found += [f"`{key}: {value}`"] if is_old else find_old_names(value)
    return list(dict.fromkeys(found))


def rename(values: JsonValue) -> JsonValue:
    """The values with today's names for keys and values of an earlier version."""
    names = load_old_names()
    if isinstance(values, list):
        return [rename(value) for value in values]
    if not isinstance(values, Mapping):
        return values
    return {
        names["keys"].get(key, key): names["values"].get(key, {}).get(value, value)
        if isinstance(value, str)
        else rename(value)
        for key, value in values.items()
    }
