"""Command lines and YAML into dataclasses: TRL's parser, with errors that name what was meant."""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from trl import TrlParser
from typing_extensions import override

from spec_kd.checks import read_path
from spec_kd.open_types import Argument, JsonObject, Record
from spec_kd.options import suggest

CONFIG_HELP = "YAML file with options of this command; those on the command line win."
# Options that name a file, a folder or something on the Hub: `~` is the home folder, and no text at all is refused.
PATH_OPTIONS = frozenset(
    ("chat_template_path", "costs", "dataset", "deepspeed", "drafts", "model_name_or_path", "output_dir", "parts",
     "paths", "prompts", "recipe", "ref_model_name_or_path", "responses", "resume_from_checkpoint", "target",
     "teacher_model_name_or_path", "test_sets", "texts_dir", "tokenizer", "tool_catalog")
)  # fmt: skip
# Options that are pairs: `NAME=VALUE ...` on a command line (JSON too), a mapping in YAML.
PAIR_OPTIONS = frozenset(("chat_template_kwargs", "drafts", "engine_kwargs", "fail_under", "parts", "weights"))


class Parser(TrlParser):
    """TRL's parser without abbreviations. All errors are `ValueError`s, and name the nearest option that exists.

    Args:
        command (`str`): Such as `"train white_box"`.
        description (`str`): What it does, for `--help`.
        dataclass_types (`Sequence[type]`): Whose fields are the options.

    Attributes:
        chosen (`dict[str, Any]`): After parsing, the options whose value is not the default.
    """

    def __init__(self, command: str, description: str, dataclass_types: Sequence[type]):
        super().__init__(dataclass_types, prog=f"spec-kd {command}", description=description, allow_abbrev=False)
        self.usage = "%(prog)s [--config FILE.yaml] [--OPTION VALUE ...]"
        self.add_argument("--config", metavar="FILE", help=CONFIG_HELP)
        for action in self._actions:
            if action.dest in PAIR_OPTIONS:
                action.nargs, action.metavar = "+", "NAME=VALUE"
        self._texts = {field.name for kind in dataclass_types if is_ours(kind) for field in fields(kind)}
        self._defaults = {name: action.default for name, action in self._first_actions.items()}
        self.chosen: JsonObject = {}

    @property
    def _first_actions(self) -> dict[str, argparse.Action]:
        actions: dict[str, argparse.Action] = {}
        for action in self._actions:
            if action.dest not in ("help", "config"):
                actions.setdefault(action.dest, action)  # the first: behind a switch comes its `--no_...`
        return actions

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:
        """As argparse's, with paths as they are meant; notes what is `chosen`."""
        namespace, unused = super().parse_known_args(args, namespace)
        for name, value in vars(namespace).items():
            if name in PATH_OPTIONS and value is not None and value != self._defaults.get(name):
                setattr(namespace, name, read_paths(name, value))
        self.chosen = {n: value for n, value in vars(namespace).items() if value != self._defaults.get(n)}
        return namespace, unused

    def parse(self, argv: Sequence[str]) -> tuple[Any, ...]:
        """A command line, with the YAML file it may name.

        Raises:
            ValueError: For an unknown option or key, or a value that does not fit; also what the dataclasses raise.
            OSError: For a file that cannot be read.
        """
        files = _ConfigParser()
        named, argv = files.parse_known_args(list(argv))
        self._check_option_names(argv)
        if named.config is not None:
            config = read_path("config", named.config)
            read_yaml(config)  # TRL reads it again, and has no word on what is wrong with it
            argv = ["--config", config, *argv]
        *values, _, unused = self.parse_args_and_config(argv, return_remaining_strings=True)
        if unused:
            raise ValueError(self._describe_unused(unused))
        return tuple(values)

    def parse_values(self, values: Record) -> tuple[Any, ...]:
        """A mapping from YAML, converted as on a command line; raises as `parse`."""
        self.set_defaults_with_config(**values)
        *values, _ = self.parse_args_into_dataclasses([], look_for_args_file=False)
        return tuple(values)

    def set_defaults_with_config(self, **values: Argument) -> list[str]:
        """As TRL's, for known names and fitting values only."""
        actions = self._first_actions
        for name, value in values.items():
            if name not in actions:
                raise ValueError(f"there is no option `{name}`.{suggest(str(name), actions)}")
            values[name] = _fit(actions[name], value, name in self._texts)
        return super().set_defaults_with_config(**values)

    @override
    def error(self, message: str) -> None:
        raise ValueError(message)

    def _check_option_names(self, argv: Sequence[str]) -> None:
        # before argparse does, which misses the required options first and says nothing of the one that was mistyped
        for text in argv:
            name = text.split("=")[0]
            if text.startswith("--") and name != "--" and name not in self._option_string_actions:
                raise ValueError(f"there is no option {name}.{suggest(name, self._option_string_actions)}")

    def _describe_unused(self, unused: list[str]) -> str:
        names = [text.split("=")[0] for text in unused if text.startswith("-")]
        if not names:
            return f"{unused[0]!r} belongs to no option."
        return f"there is no option {names[0]}.{suggest(names[0], self._option_string_actions)}"


class _ConfigParser(argparse.ArgumentParser):
    def __init__(self) -> None:
        super().__init__(add_help=False, allow_abbrev=False)
        self.add_argument("--config")

    @override
    def error(self, message: str) -> None:
        raise ValueError(message)


def read_yaml(path: str | Path) -> JsonObject:
    """The mapping in a YAML file; raises `ValueError` for anything else, `OSError` where there is no file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file `{path}`.")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"`{path}` is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"`{path}` must hold `name: value` pairs, but holds {type(values).__name__}.")
    check_keys(values, f"`{path}`")
    return values


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, of which YAML keeps the last without a word."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen and key.value != "<<":
                message = f"the key {key.value!r} is there twice"
                raise yaml.composer.ComposerError(None, None, message, key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return node


def check_keys(values: Mapping[Any, Any], where: str) -> None:
    """Raises `ValueError` for a key that is no text, such as a number, or `on`, which YAML reads as true."""
    for key in values:
        if not isinstance(key, str):
            raise ValueError(f"{where} has the key {key!r}, but keys must be names. Put it in quotes if it is one.")


def is_ours(kind: type) -> bool:
    """Whether a dataclass of options belongs to this package's command line."""
    return kind.__module__.startswith("spec_kd.cli")


def read_paths(name: str, value: Any) -> Any:
    """The value of a path option, also in a list or behind `NAME=`, with the home folder in place of `~`.

    Raises:
        `ValueError`: For an empty path.
    """
    if isinstance(value, list):
        return [read_paths(name, item) for item in value]
    if isinstance(value, Mapping):
        return {key: read_paths(f"{name}: {key}", item) for key, item in value.items()}
    if isinstance(value, bool):  # `resume_from_checkpoint: true`
        return value
    if isinstance(value, str) and name in PAIR_OPTIONS and "=" in value:
        key, _, path = value.partition("=")
        return f"{key}={read_path(name, path)}"
    return read_path(name, value)


def read_pairs(value: Any, name: str, example: str = "name=1") -> JsonObject:
    """Pairs as a dictionary: `NAME=VALUE` texts, a mapping (YAML), or JSON text.

    A VALUE on a command line is read as in YAML: `4` is a number, `true` a boolean, `[1, 2]` a list, `float16` text.

    Args:
        value: One text or several, a mapping, or `None` for no pairs.
        name (`str`): Name of the option, for messages.
        example (`str`, *optional*): A pair, for messages.

    Raises:
        ValueError: For anything else, and for a name that is there twice.
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
        if not equals or not key:
            raise ValueError(f"`{name}` is {text!r}, but must be NAME=VALUE pairs, such as {example}.")
        if key in pairs:
            raise ValueError(f"`{name}` has {key!r} twice.")
        try:
            pairs[key] = yaml.safe_load(item)
        except yaml.YAMLError:
            pairs[key] = item
    return pairs


def write_pairs(value: Any, name: str, example: str) -> list[str] | None:
    """Pairs as `NAME=VALUE` texts; of a list the items stay as they are.

    Raises:
        ValueError: For what is neither a list of texts nor a mapping.
    """
    if isinstance(value, list) and len(value) == 1 and not isinstance(value[0], str):
        value = value[0]
    if isinstance(value, Mapping):
        return [f"{key}={item}" for key, item in value.items()]
    if value is not None and not (isinstance(value, list) and all(isinstance(text, str) for text in value)):
        raise ValueError(f"`{name}` is {value!r}, but must be NAME=VALUE pairs, such as {example}.")
    return value


def _fit(action: argparse.Action, value: Any, is_ours: bool) -> Any:
    """A value of YAML as argparse wants it, which converts text alone and looks at no choices."""
    if action.dest in PAIR_OPTIONS:
        return value if isinstance(value, list) or value is None else [value]
    if action.nargs == "+" and not isinstance(value, list) and value is not None:
        value = [value]
    items = value if action.nargs == "+" and value is not None else [value]
    kind = getattr(action.type, "__name__", "")
    is_wrong = {
        "int": lambda item: isinstance(item, bool) or not isinstance(item, int),
        "float": lambda item: isinstance(item, bool) or not isinstance(item, int | float),
        "string_to_bool": lambda item: not isinstance(item, bool),
        "str": lambda item: is_ours and isinstance(item, bool | int | float),
    }.get(kind, lambda item: False)
    for item in items:
        if item is not None and not isinstance(item, str) and is_wrong(item):
            raise ValueError(f"`{action.dest}` is {item!r}, but must be {_KINDS[kind]}.")
    if action.choices is not None and value is not None:
        value = "no" if value is False and "no" in action.choices else value  # as YAML reads `no`
        if value not in action.choices:
            raise ValueError(f"`{action.dest}` is {value!r}.{suggest(str(value), map(str, action.choices))}")
    if isinstance(value, list) and action.nargs == "+":
        # argparse converts a default that is text, not the items of a list
        return [action.type(item) if isinstance(item, str) and action.type is not None else item for item in value]
    return value


_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "string_to_bool": "true or false",
    "str": "text: put it in quotes",
}
