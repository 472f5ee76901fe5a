"""llama.cpp for benchmarks: its tools found, and `llama-server` started and stopped.

`benchmarks/serving/build_llama_cpp.sh` builds the tools; LLAMA_CPP names another folder with the same layout.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spec_kd.serving import llama_server as server
from spec_kd.serving.llama_server import LlamaServer

DEFAULT_FOLDER = Path.home() / ".cache" / "spec_kd" / "tools" / "llama.cpp"


def find_tools() -> Path:
    """The folder with bin/llama-server; raises `FileNotFoundError` with the command that builds it."""
    folder = Path(os.environ.get("LLAMA_CPP", DEFAULT_FOLDER))
    if not (folder / "bin" / "llama-server").exists():
        raise FileNotFoundError(
            f"There is no bin/llama-server in {folder}. Run benchmarks/serving/build_llama_cpp.sh, or set LLAMA_CPP."
        )
    return folder


@contextmanager
def run_llama_server(
    target: Path,
    log: Path,
    *,
    threads: int = 1,
    cores: Sequence[int] | None = None,
    flags: Sequence[str] = (),
    **options: Any,
) -> Iterator[LlamaServer]:
    """Starts the `llama-server` that was built here, with `threads` on `cores`; see [`server.run_llama_server`]."""
    count = ["--threads", str(threads), "--threads-batch", str(threads)]
    wrapper = [] if cores is None else ["taskset", "-c", ",".join(map(str, cores))]
    program = find_tools() / "bin" / "llama-server"
    with server.run_llama_server(program, target, log, flags=[*count, *flags], wrapper=wrapper, **options) as started:
        yield started
