"""`spec-kd COMMAND ...`: finds the command, runs it, and prints its result as one line of JSON.

Everything else goes to stderr: progress, logs, what libraries print. A command that is repeated with the same arguments
continues where it was stopped, and does nothing if it is finished.

Exit status: 0; 2 for wrong arguments or input, with one line that says what and why; 3 if a metric lies below a
threshold of `--fail_under`; 1, with a traceback, for a bug.
"""

import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import TextIO, cast

from spec_kd import __version__
from spec_kd.cli.steps import is_main_process, to_json
from spec_kd.escaping import to_one_line
from spec_kd.open_types import Argument, Call, JsonObject
from spec_kd.options import suggest
from spec_kd.secrets import hide_secrets

USAGE_EXIT_STATUS = 2
FAILED_EXIT_STATUS = 3  # of an evaluation whose gates did not all pass, and of a draft that cannot be served
INTERRUPTED_EXIT_STATUS = 130  # as shells have it for SIGINT
TRACEBACK_VARIABLE = "SPEC_KD_TRACEBACK"

COMMANDS = {
    "init": "Write a commented recipe for your target, and your draft if you have one.",
    "run": "Run all steps of a recipe, leaving out what is finished.",
    "prompts": "Make a prompt set from query logs or from a curated dataset, or mix several.",
    "synthesize": "Let the target write a prompt set.",
    "respond": "Let the target complete a prompt set, and store its teacher signal if asked.",
    "score": "Let the target read text that it did not write, and store its teacher signal.",
    "plan-draft": "Compare shapes of a draft: what they cost, which acceptance they need, and what they reach.",
    "init-draft": "Make a draft from the target, or from another donor, before any training.",
    "train": "Train a draft: white_box, black_box or online_gkd.",
    "evaluate": "Measure acceptance, tokens per target pass and predicted speed-up of drafts, as a report.",
    "check-serving": "Find what would make a serving engine refuse a draft, write wrong text, or not draft.",
    "export": "Save a draft as servers load it, with what they need to know, and GGUF files for llama.cpp.",
    "observe": "Ask a running server the test prompts: what it drafted, accepted and wrote a second.",
    "measure-costs": "Time what a round costs in your llama-server, for `evaluate --costs`.",
    "convert": "Convert a recipe or a folder that an earlier version wrote.",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and prints its result.

    Args:
        argv (`Sequence[str]`, *optional*): Command and arguments, by default those of the process.

    Returns:
        `int`: The exit status.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(describe_commands(), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else USAGE_EXIT_STATUS
    if argv[0] == "--version":
        print(__version__)
        return 0
    command = argv[0]
    try:
        run, arguments = parse_command(argv)
        with stop_as_interruption(), output_to_stderr() as stdout:
            result = run(*arguments)
            if is_main_process():
                print(json.dumps(to_json({"command": command, **result}), ensure_ascii=False), file=stdout, flush=True)
    except SystemExit as error:  # of `--help`
        return cast(int, error.code)
    except KeyboardInterrupt:
        print(f"spec-kd {command}: interrupted; the same command continues from here.", file=sys.stderr)
        return INTERRUPTED_EXIT_STATUS
    except Exception as error:
        # what the package raises for wrong input, and its own errors, such as that of a server that does not respond
        is_own = type(error).__module__.partition(".")[0] == "spec_kd"
        if not is_own and not isinstance(error, (ValueError, OSError, ImportError)):
            raise
        message = to_one_line(hide_secrets(str(error)))  # whatever a library wrote
        is_whole = os.environ.get(TRACEBACK_VARIABLE)
        print(traceback.format_exc() if is_whole else f"spec-kd {command}: error: {message}", file=sys.stderr)
        return USAGE_EXIT_STATUS
    return FAILED_EXIT_STATUS if result.get("has_passed") is False else 0


def parse_command(argv: Sequence[str]) -> tuple[Call[JsonObject], tuple[Argument, ...]]:
    """Finds a command and parses its options.

    Args:
        argv (`Sequence[str]`): Command and arguments.

    Returns:
        `tuple[Callable, tuple]`: The function that runs the command, and its arguments.

    Raises:
        ValueError: There is no such command, or an option is wrong.
        OSError: A file with options cannot be read.
        SystemExit: Help was asked for.
    """
    command, *options = argv
    if command not in COMMANDS:
        raise ValueError(f"there is no command {command!r}.{suggest(command, COMMANDS)}")
    from spec_kd.cli.commands import parse

    return parse(command, options)


def describe_commands() -> str:
    """The text of `spec-kd --help`."""
    width = max(map(len, COMMANDS))
    return "\n".join(
        [
            "usage: spec-kd COMMAND [options]",
            "",
            "Distill draft models for speculative decoding.",
            "",
            *(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()),
            "",
            "`spec-kd COMMAND --help` lists the options of a command. `--config FILE.yaml` reads them from a file.",
            "A command that is repeated continues where it was stopped, or ends at once if it is finished.",
            "The last line on stdout is the result as JSON. Everything else goes to stderr.",
            f"Exit status: 0; 2 for wrong input ({TRACEBACK_VARIABLE}=1 shows where); 3 below a `--fail_under`, "
            "or for a draft that cannot be served.",
        ]
    )


@contextmanager
def stop_as_interruption() -> Iterator[None]:
    """Lets SIGTERM end the command as Ctrl+C does, so that servers and other processes that it started are stopped."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def output_to_stderr() -> Iterator[TextIO]:
    """Redirects to stderr what this process and its children print; yields the real stdout."""
    stdout = sys.stdout
    try:
        is_real = stdout.fileno() == 1
    except (OSError, ValueError):  # replaced by a stream without a descriptor, as in tests and notebooks
        is_real = False
    if not is_real:
        with redirect_stdout(sys.stderr):
            yield stdout
        return
    stdout.flush()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as copy, redirect_stdout(sys.stderr):
        os.dup2(2, 1)
        try:
            yield copy
        finally:
            os.dup2(copy.fileno(), 1)
