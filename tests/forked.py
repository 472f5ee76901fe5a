"""Processes that are forked from one which has imported everything: a start takes a tenth of a second, not seconds.

They share its hash seed, and the environment that libraries read when they are imported.
"""

import contextlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def start(function: Callable[..., None], *arguments: Any) -> multiprocessing.Process:
    """Starts a function of a module in a process of its own.

    Args:
        function (`Callable`): What to call.
        arguments: What to call it with; they are pickled.

    Returns:
        The process.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preloaded"])
    process = context.Process(target=function, args=arguments)
    with _paths_in_environment():
        process.start()
    return process


def run(
    program: str | Path, *arguments: Any, timeout: float = 300.0, **environment: str
) -> subprocess.CompletedProcess:
    """Runs a Python program as `subprocess.run([sys.executable, ...], capture_output=True, text=True)` does.

    Args:
        program (`str` or `Path`): Code, or the file of a script.
        arguments: `sys.argv[1:]` of the program, as `str` writes them.
        timeout (`float`, *optional*, defaults to `300.0`): Seconds.
        environment: Variables to set for it.

    Returns:
        What the process wrote, and its exit status: the number of the signal that ended it, below zero.

    Raises:
        `subprocess.TimeoutExpired`: It took longer, and was killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        written = [Path(folder) / name for name in ("stdout", "stderr")]
        process = start(_run_program, program, [str(argument) for argument in arguments], environment, written)
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(str(program), timeout)
        texts = [path.read_text() if path.exists() else "" for path in written]
        return subprocess.CompletedProcess([str(program)], process.exitcode, *texts)


def _run_program(program: str | Path, arguments: list[str], environment: dict[str, str], written: list[Path]) -> None:
    for descriptor, path in enumerate(written, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.update(environment)
    sys.argv = [str(program), *arguments]
    if isinstance(program, Path):
        sys.path.insert(0, str(program.parent))
        runpy.run_path(str(program), run_name="__main__")
    else:
        exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})


@contextlib.contextmanager
def _paths_in_environment() -> Iterator[None]:
    """The process that others are forked from looks for its modules there."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
