"""YAML files with options, read strictly: every key is a name and stands once."""

from collections.abc import Mapping
from pathlib import Path

import yaml

from spec_kd.open_types import Argument, JsonObject


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
    for key in values:
        if not isinstance(key, str):
            raise ValueError(f"{where} has the key {key!r}, but keys must be names. Put it in quotes if it is one.")


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
