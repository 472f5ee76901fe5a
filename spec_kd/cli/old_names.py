"""Names of earlier versions, in recipes and in folders of steps; `old_names.yaml` has the table."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path

from spec_kd.cli.yaml_files import read_yaml
from spec_kd.open_types import JsonObject, JsonValue, Record


@cache
def load_old_names() -> JsonObject:
    """Loads the table: `keys`, `values`, `defaults` and `folders`."""
    return read_yaml(Path(__file__).with_suffix(".yaml"))


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
    found = []
    for key, value in values.items():
        found += [f"`{key}`"] if key in names["keys"] else []
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
