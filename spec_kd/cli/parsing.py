"""Parses command lines and YAML into dataclasses with TRL's parser; errors name what was meant."""

import argparse
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import fields
from types import UnionType
from typing import NoReturn, Union, cast, get_args, get_origin, get_type_hints

from trl import TrlParser

from spec_kd.cli.paths import PATH_OPTIONS, read_paths
from spec_kd.cli.yaml_files import describe_pairs, read_pairs, read_yaml, refuse_old_names
from spec_kd.open_types import Argument, JsonObject, Record
from spec_kd.options import read_path, suggest

COMMON = "common options"
OF_LIBRARIES = "options of TRL and transformers"
CONFIG_HELP = "YAML file with options of this command; options on the command line replace those of the file."
METAVARS = {"int": "INT", "float": "FLOAT", "string_to_bool": "BOOL"}
HELP_WIDTH = 80


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the default of every option, and the lines of a description as they are."""


class Parser(TrlParser):
    """TRL's parser without abbreviations. All errors are `ValueError`s, and name the nearest option that exists.

    Args:
        command (`str`): Name of the command, such as `"train white_box"`.
        description (`str`): What the command does, for `--help`.
        groups (`Mapping[str, type]`):
            Dataclasses whose fields are the options, by the title that `--help` has for them. Fields that a class
            inherits from another library come last.
        common (`Sequence[str]`, *optional*, defaults to `()`): Options that `--help` shows first.
        epilog (`str`, *optional*): Text after the options; none by default.
        first (`str`, *optional*):
            Option that names a file and may also be the first argument, or `--config`; by default `--config` names a
            YAML file with options.

    Attributes:
        chosen (`dict[str, Any]`): After parsing, the options whose value is not the default.
    """

    def __init__(
        self,
        command: str,
        description: str,
        groups: Mapping[str, type],
        common: Sequence[str] = (),
        epilog: str | None = None,
        first: str | None = None,
    ):
        super().__init__(
            cast(Argument, tuple(groups.values())), prog=f"spec-kd {command}",
            description=textwrap.fill(description, HELP_WIDTH), epilog=epilog, allow_abbrev=False,
            formatter_class=HelpFormatter,
        )  # fmt: skip
        self.usage = "%(prog)s [--config FILE.yaml] [--OPTION VALUE ...]"
        self._first = first
        self.add_argument("--config", metavar="FILE")
        self._groups, self._common = dict(groups), tuple(common)
        self._ours, self._pairs = set(), set()
        self._takes_address = {
            field.name for kind in groups.values() for field in fields(kind) if field.metadata.get("takes_address")
        }
        for kind in groups.values():
            self._ours |= {field.name for field in fields(kind) if is_ours(kind, field.name)}
            pairs = {name for name, hint in get_type_hints(kind).items() if _holds_pairs(hint)}
            self._pairs |= {field.name for field in fields(kind)} & (pairs - (PATH_OPTIONS - self._ours))
        for name, action in self._first_actions.items():
            # without those that only have hyphens in place of underscores; the parser knows them all the same
            action.option_strings = [text for text in action.option_strings if "-" not in text[2:]]
            if name in self._pairs:
                action.nargs, action.metavar, action.type = "+", describe_pairs(name), str
            elif action.choices is None:
                metavar = METAVARS.get(getattr(action.type, "__name__", ""), "TEXT")
                action.metavar = "PATH" if name in PATH_OPTIONS else metavar
        self._defaults = {name: action.default for name, action in self._first_actions.items()}
        self.chosen: JsonObject = {}

    def add_argument(self, *names: Argument, **options: Argument) -> argparse.Action:
        """As argparse's, without what else the metadata of a field says."""
        options.pop("takes_address", None)
        return super().add_argument(*names, **options)

    @property
    def _first_actions(self) -> dict[str, argparse.Action]:
        actions: dict[str, argparse.Action] = {}
        for action in self._actions:
            if action.dest not in ("help", "config"):
                actions.setdefault(action.dest, action)  # the first: a switch is followed by its `--no_...`
        return actions

    def group_options(self) -> dict[str, list[argparse.Action]]:
        """The options, each once, by the title of their group, in the order of `--help`."""
        titles = {
            field.name: title if field.name in self._ours else OF_LIBRARIES
            for title, kind in self._groups.items()
            for field in fields(kind)
        }
        grouped: dict[str, list[argparse.Action]] = {name: [] for name in (COMMON, *self._groups, OF_LIBRARIES)}
        for name, action in self._first_actions.items():
            grouped[COMMON if name in self._common else titles[name]].append(action)
        grouped[COMMON].sort(key=lambda action: self._common.index(action.dest))
        return {title: actions for title, actions in grouped.items() if actions}

    def format_help(self) -> str:
        """The text of `--help`: as argparse's, but with each option once and the common ones first."""
        shown = argparse.ArgumentParser(
            prog=self.prog, usage=self.usage, description=self.description, epilog=self.epilog, add_help=False,
            formatter_class=HelpFormatter,
        )  # fmt: skip
        for title, actions in self.group_options().items():
            group = shown.add_argument_group(title)
            for action in actions:
                group.add_argument(
                    *action.option_strings, nargs=action.nargs, metavar=action.metavar, choices=action.choices,
                    help=f"{action.help} (required)" if action.required else action.help,
                    default=argparse.SUPPRESS if action.default is None else action.default,
                )  # fmt: skip
        others = shown.add_argument_group("options of every command")
        config_help = CONFIG_HELP if self._first is None else f"Another name of `{self._first}`."
        others.add_argument("--config", metavar="FILE", help=config_help, default=argparse.SUPPRESS)
        others.add_argument("-h", "--help", action="help", help="Print this text.", default=argparse.SUPPRESS)
        return shown.format_help()

    def parse_known_args(  # type: ignore[override]  # argparse has overloads
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parses as argparse does, reads pairs and paths, and notes what is `chosen`."""
        parsed, unused = super().parse_known_args(args, namespace)
        values = vars(parsed)
        for name in values.keys() & {*self._pairs, *PATH_OPTIONS}:
            if values[name] is not None and values[name] != self._defaults.get(name):
                value = read_pairs(values[name], name) if name in self._pairs else values[name]
                is_path, takes_address = name in PATH_OPTIONS, name in self._takes_address
                values[name] = read_paths(name, value, takes_address) if is_path else value
        self.chosen = {name: value for name, value in values.items() if value != self._defaults.get(name)}
        return parsed, unused

    def parse(self, argv: Sequence[str]) -> tuple[Argument, ...]:
        """Parses a command line and the YAML file that it may name.

        Returns:
            `tuple`: An instance of each dataclass.

        Raises:
            ValueError: An option or key is unknown, or a value does not fit; also what the dataclasses raise.
            OSError: A file cannot be read.
        """
        named, argv = _ConfigParser().parse_known_args(list(argv))
        if self._first is not None and argv and not argv[0].startswith("-"):
            argv = [f"--{self._first}", *argv]
        self._check_option_names(argv)
        if self._first is not None and named.config is not None:
            argv = [f"--{self._first}", named.config, *argv]
        elif named.config is not None:
            config = read_path("config", named.config)
            refuse_old_names(config, read_yaml(config))  # TRL reads the file again, without saying what is wrong in it
            argv = ["--config", config, *argv]
        *values, _, unused = self.parse_args_and_config(argv, return_remaining_strings=True)
        if unused:
            raise ValueError(f"{unused[0]!r} belongs to no option.")
        return tuple(values)

    def parse_values(self, values: Record) -> tuple[Argument, ...]:
        """Parses a mapping from YAML as a command line is parsed; returns and raises as `parse`."""
        self.set_defaults_with_config(**values)
        *parsed, _ = self.parse_args_into_dataclasses([], look_for_args_file=False)
        return tuple(parsed)

    def set_defaults_with_config(self, **values: Argument) -> list[str]:
        """As TRL's, for known names and fitting values only."""
        actions = self._first_actions
        for name, value in values.items():
            if name not in actions:
                raise ValueError(f"there is no option `{name}`.{suggest(str(name), actions)}")
            if name not in self._pairs:
                values[name] = _fit(actions[name], value, name in self._ours)
        return super().set_defaults_with_config(**values)

    def error(self, message: str) -> NoReturn:
        """Raises the message as `ValueError`, where argparse would end the process."""
        raise ValueError(message)

    def _check_option_names(self, argv: Sequence[str]) -> None:
        # before argparse, which would name the required options that are missing instead of the mistyped one
        for text in argv:
            name = text.split("=")[0]
            if text.startswith("--") and name != "--" and name not in self._option_string_actions:
                raise ValueError(f"there is no option {name}.{suggest(name, self._option_string_actions)}")


class _ConfigParser(argparse.ArgumentParser):
    def __init__(self) -> None:
        super().__init__(add_help=False, allow_abbrev=False)
        self.add_argument("--config")

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def is_ours(kind: type, name: str) -> bool:
    """Whether a field of a dataclass is declared first by this package, not by a library that it inherits from."""
    owner = next(base for base in reversed(kind.__mro__) if name in vars(base).get("__annotations__", {}))
    return owner.__module__.startswith("spec_kd")


def _holds_pairs(hint: Argument) -> bool:
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return any(kind is dict or get_origin(kind) is dict for kind in kinds)


def _fit(action: argparse.Action, value: Argument, is_ours: bool) -> Argument:
    """A value of YAML as argparse wants it, which converts text alone and looks at no choices."""
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
        return [action.type(item) if isinstance(item, str) and callable(action.type) else item for item in value]
    return value


_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "string_to_bool": "true or false",
    "str": "text: put it in quotes",
}
