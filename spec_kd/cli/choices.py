"""The help of commands whose first argument is one of several."""

import sys
from collections.abc import Mapping


def tell_choices(command: str, kind: str, choices: Mapping[str, str], is_asked: bool) -> int:
    """Prints the choices, on stdout if help was asked for and otherwise on stderr; returns the exit status."""
    print(describe_choices(command, kind, choices), file=sys.stdout if is_asked else sys.stderr)
    return 0 if is_asked else 2


def describe_choices(command: str, kind: str, choices: Mapping[str, str]) -> str:
    """The text of `--help` for a command whose first argument is one of several."""
    width = max(map(len, choices))
    lines = [f"usage: spec-kd {command} {kind} [--config FILE.yaml] [--OPTION VALUE ...]", ""]
    lines += [f"  {name:<{width}}  {text}" for name, text in choices.items()]
    return "\n".join([*lines, "", f"`spec-kd {command} {kind} --help` lists the options of one."])
