"""Command lines and YAML into dataclasses: TRL's parser, with errors that name what was meant."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from trl import TrlParser

from spec_kd.cli.text import suggest

CONFIG_HELP = "YAML file with options of this command; those on the command line win."


class Parser(TrlParser):
    """TRL's parser without abbreviations. All errors are `ValueError`s, and name the nearest option that exists.

    Args:
        command (`str`): Such as `"train white-box"`.
        description (`str`): What it does, for `--help`.
        dataclass_types (`Sequence[type]`): Whose fields are the options.

    Attributes:
        chosen (`dict[str, Any]`): After parsing, the options whose value is not the default.
    """

    def __init__(self, command: str, description: str, dataclass_types: Sequence[type]):
        super().__init__(dataclass_types, prog=f"spec-kd {command}", description=description, allow_abbrev=False)
        self.usage = "%(prog)s [--config FILE.yaml] [--OPTION VALUE ...]"
        self.add_argument("--config", metavar="FILE", help=CONFIG_HELP)
        self._defaults = {name: action.default for name, action in self._first_actions.items()}
        self.chosen: dict[str, Any] = {}

    @property
    def _first_actions(self) -> dict[str, argparse.Action]:
        actions: dict[str, argparse.Action] = {}
        for action in self._actions:
            if action.dest not in ("help", "config"):
                actions.setdefault(action.dest, action)  # the first: behind a switch comes its `--no_...`
        return actions

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:
        """As argparse's; notes what is `chosen`."""
        namespace, unused = super().parse_known_args(args, namespace)
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
        if named.config is not None:
            read_yaml(named.config)  # TRL reads it again, and has no word on what is wrong with it
            argv = ["--config", named.config, *argv]
        *values, _, unused = self.parse_args_and_config(argv, return_remaining_strings=True)
        if unused:
            raise ValueError(self._describe_unused(unused))
        return tuple(values)

    def parse_values(self, values: Mapping[str, Any]) -> tuple[Any, ...]:
        """A mapping from YAML, converted as on a command line; raises as `parse`."""
        self.set_defaults_with_config(**values)
        *values, _ = self.parse_args_into_dataclasses([], look_for_args_file=False)
        return tuple(values)

    def set_defaults_with_config(self, **values: Any) -> list[str]:
        """As TRL's, for known names and fitting values only."""
        actions = self._first_actions
        for name, value in values.items():
            if name not in actions:
                raise ValueError(f"there is no option `{name}`.{suggest(str(name), actions)}")
            values[name] = _fit(actions[name], value)
        return super().set_defaults_with_config(**values)

    def error(self, message: str) -> None:
        raise ValueError(message)

    def _describe_unused(self, unused: list[str]) -> str:
        names = [text.split("=")[0] for text in unused if text.startswith("-")]
        if not names:
            return f"{unused[0]!r} belongs to no option."
        return f"there is no option {names[0]}.{suggest(names[0], self._option_string_actions)}"


class _ConfigParser(argparse.ArgumentParser):
    def __init__(self):
        super().__init__(add_help=False, allow_abbrev=False)
        self.add_argument("--config")

    def error(self, message: str) -> None:
        raise ValueError(message)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; raises `ValueError` for anything else, `OSError` where there is no file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file `{path}`.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"`{path}` is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"`{path}` must hold `name: value` pairs, but holds {type(values).__name__}.")
    return values


def read_mapping(text: str | Mapping[str, Any] | None, name: str) -> dict[str, Any]:
    """A mapping given as such (YAML) or as JSON text (command line).

    Raises:
        ValueError: For anything else.
    """
    if text is None:
        return {}
    if isinstance(text, str):
        try:
            text = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"`{name}` is {text!r}, which is no JSON ({error}).") from error
    if not isinstance(text, Mapping):
        raise ValueError(f'`{name}` must be a mapping, such as {{"name": 1}}, got {text!r}.')
    return dict(text)


def _fit(action: argparse.Action, value: Any) -> Any:
    """A value of YAML as argparse wants it, which converts text alone."""
    if action.nargs == "+" and not isinstance(value, list) and value is not None:
        value = [value]
    items = value if action.nargs == "+" and value is not None else [value]
    kind = getattr(action.type, "__name__", "")
    is_wrong = {
        "int": lambda item: isinstance(item, bool) or not isinstance(item, int),
        "float": lambda item: isinstance(item, bool) or not isinstance(item, int | float),
        "string_to_bool": lambda item: not isinstance(item, bool),
    }.get(kind, lambda item: False)
    for item in items:
        if item is not None and not isinstance(item, str) and is_wrong(item):
            raise ValueError(f"`{action.dest}` is {item!r}, but must be {_KINDS[kind]}.")
    if isinstance(value, list) and action.nargs == "+":
        # argparse converts a default that is text, not the items of a list
        return [action.type(item) if isinstance(item, str) and action.type is not None else item for item in value]
    return value


_KINDS = {"int": "a whole number", "float": "a number", "string_to_bool": "true or false"}
