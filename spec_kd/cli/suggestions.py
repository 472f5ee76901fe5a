"""Words for people who mistyped something."""

import difflib
import sys
from collections.abc import Iterable, Mapping

MAX_LISTED = 20


def suggest(name: str, known: Iterable[str]) -> str:
    """A sentence with the nearest known name, or all of them where they are few; begins with a space."""
    known = list(dict.fromkeys(known))
    if nearest := difflib.get_close_matches(name, known, n=1):
        return f" Did you mean {nearest[0]}?"
    if len(known) <= MAX_LISTED:
        return f" There is {', '.join(known)}."
    return " `--help` lists what there is."


def tell_choices(command: str, kind: str, choices: Mapping[str, str], is_asked: bool) -> int:
    """Prints [`describe_choices`]: on stdout where help is asked for, else as an error; returns the exit status."""
    print(describe_choices(command, kind, choices), file=sys.stdout if is_asked else sys.stderr)
    return 0 if is_asked else 2


def describe_choices(command: str, kind: str, choices: Mapping[str, str]) -> str:
    """The help of a command whose first argument is one of several."""
    width = max(map(len, choices))
    lines = [f"usage: spec-kd {command} {kind} [--config FILE.yaml] [--OPTION VALUE ...]", ""]
    lines += [f"  {name:<{width}}  {text}" for name, text in choices.items()]
    return "\n".join([*lines, "", f"`spec-kd {command} {kind} --help` lists the options of one."])
