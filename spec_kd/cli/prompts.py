"""`spec-kd prompts KIND`: prompt sets from logs and datasets, and mixes of them."""

from collections.abc import Sequence
from importlib import import_module

from spec_kd.cli.choices import tell_choices
from spec_kd.open_types import Argument, Call, JsonObject
from spec_kd.options import suggest

KINDS = {
    "logs": "Makes a prompt set of what users asked the target, from its logs.",
    "curated": "Makes a prompt set of the questions of a dataset, without its completions.",
    "mix": "Mixes several prompt sets, and writes a report.",
}


def parse(argv: Sequence[str]) -> tuple[Call[JsonObject], tuple[Argument, ...]]:
    """Parses the kind, which comes first, and its options; returns the function that runs it, and its arguments.

    Raises:
        ValueError: There is no such kind, or an option is wrong.
        SystemExit: The kind is missing, or help was asked for.
    """
    if not argv or argv[0] in ("-h", "--help"):
        raise SystemExit(tell_choices("prompts", "KIND", KINDS, is_asked=bool(argv)))
    if argv[0] not in KINDS:
        raise ValueError(f"there is no kind of prompts {argv[0]!r}.{suggest(argv[0], KINDS)}")
    module = import_module(f"spec_kd.cli.{argv[0]}")
    return module.run, module.build_parser().parse(argv[1:])
