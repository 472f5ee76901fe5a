"""Values of options that are more than one text or number: paths, and pairs of a name and a value."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import yaml

from spec_kd.checks import read_path
from spec_kd.cli.rows import looks_like_path
from spec_kd.cli.yaml_files import check_keys
from spec_kd.open_types import Argument, JsonObject, Record

# Options that name a file, a folder or something on the Hub: `~` is the home folder, and empty text is refused.
PATH_OPTIONS = frozenset(
    ("accelerator_config", "chat_template_path", "costs", "dataset", "deepspeed", "draft", "drafts", "fsdp_config",
     "model_name_or_path", "output", "output_dir", "parts", "path", "paths", "prompts", "recipe",
     "ref_model_name_or_path", "responses", "resume_from_checkpoint", "target", "teacher_model_name_or_path",
     "responses_dir", "test_sets", "tokenizer", "tool_catalog")
)  # fmt: skip
FILES_ONLY = ("paths", "tool_catalog", "deepspeed")  # never a name on the Hub


def read_paths(name: str, value: Argument) -> Argument:
    """The value of a path option, also in a list or in pairs, with the home folder in place of `~`.

    Raises:
        ValueError: A path is empty or no text.
    """
    if isinstance(value, list):
        return [read_paths(name, item) for item in value]
    if isinstance(value, Mapping):
        return {key: read_paths(name, item) for key, item in value.items()}
    return value if isinstance(value, bool) else read_path(name, value)  # `resume_from_checkpoint: true`


def place_paths(values: Record, folder: str) -> JsonObject:
    """The options of a section of a recipe, with its relative paths placed in the folder of the recipe.

    A name that may be one on the Hub is a path if the folder has a file or folder of that name.

    Args:
        values (`Mapping`): Options by name.
        folder (`str`): Folder of the recipe; `""` for the working directory.
    """

    def place(name: str, value: Argument) -> Argument:
        if isinstance(value, list):
            return [place(name, item) for item in value]
        if not isinstance(value, str) or os.path.isabs(os.path.expanduser(value)) or not value.strip():
            return value
        path = os.path.join(folder, value)
        is_path = name in FILES_ONLY or looks_like_path(value) or os.path.exists(path)
        return path if is_path else value

    return {name: place(name, value) if name in PATH_OPTIONS else value for name, value in values.items()}


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
