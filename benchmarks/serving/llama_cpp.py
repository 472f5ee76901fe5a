"""llama.cpp for benchmarks: its tools found, and `llama-server` started and stopped.

`benchmarks/serving/build_llama_cpp.sh` builds the tools; LLAMA_CPP names another folder with the same layout.
"""

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEFAULT_FOLDER = Path.home() / ".cache" / "spec_kd" / "tools" / "llama.cpp"
START_TIMEOUT = 300.0  # seconds


def find_tools() -> Path:
    """The folder with bin/llama-server; raises `FileNotFoundError` with the command that builds it."""
    folder = Path(os.environ.get("LLAMA_CPP", DEFAULT_FOLDER))
    if not (folder / "bin" / "llama-server").exists():
        raise FileNotFoundError(
            f"There is no bin/llama-server in {folder}. Run benchmarks/serving/build_llama_cpp.sh, or set LLAMA_CPP."
        )
    return folder


@dataclass(frozen=True)
class LlamaServer:
    """A server that runs.

    Args:
        url (`str`): Its address, without a path.
        process (`subprocess.Popen`): The server's process.
        log (`Path`): What it prints.
        command (sequence of `str`): The command that started it.
    """

    url: str
    process: subprocess.Popen
    log: Path
    command: Sequence[str]

    def post(self, path: str, body: dict[str, Any], timeout: float = 600.0) -> dict[str, Any]:
        """The JSON answer to a POST request."""
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return json.load(response)

    def get(self, path: str, timeout: float = 60.0) -> str:
        """The answer to a GET request, as text."""
        with urllib.request.urlopen(self.url + path, timeout=timeout) as response:
            return response.read().decode()

    def complete(self, prompt_ids: Sequence[int], max_new_tokens: int, **options: Any) -> dict[str, Any]:
        """One greedy completion of token ids; the answer has `tokens`, `stop_type` and `timings`."""
        body = {"prompt": list(prompt_ids), "n_predict": max_new_tokens, "temperature": 0.0, "return_tokens": True}
        return self.post("/completion", {**body, "cache_prompt": False, **options})


@contextmanager
def run_llama_server(
    target: Path,
    log: Path,
    *,
    draft: Path | None = None,
    num_draft_tokens: int = 4,
    threads: int = 1,
    parallel: int = 1,
    context_length: int = 2048,
    cores: Sequence[int] | None = None,
    flags: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Iterator[LlamaServer]:
    """Starts llama-server on a free port and stops it at the end.

    Args:
        target (`Path`): The target's GGUF file.
        log (`Path`): File for what the server prints.
        draft (`Path`, *optional*): The draft's GGUF file; without it the server decodes plainly.
        num_draft_tokens (`int`, *optional*, defaults to 4): Tokens that the draft proposes in a round.
        threads (`int`, *optional*, defaults to 1): CPU threads, of the target and of the draft.
        parallel (`int`, *optional*, defaults to 1): Requests that are served at once.
        context_length (`int`, *optional*, defaults to 2048): Tokens of prompt and completion for each request.
        cores (sequence of `int`, *optional*): Cores that the server may use; all by default.
        flags (sequence of `str`, *optional*): More flags of llama-server.
        environment (mapping of `str` to `str`, *optional*): Variables of its environment, beside the inherited ones.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        str(find_tools() / "bin" / "llama-server"),
        "-m",
        str(target),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    command += ["--threads", str(threads), "--threads-batch", str(threads), "--parallel", str(parallel)]
    command += ["--ctx-size", str(context_length * parallel), "--no-webui", *flags]
    if draft is not None:
        command += ["-md", str(draft), "--spec-type", "draft-simple", "--spec-draft-n-max", str(num_draft_tokens)]
    if cores is not None:
        command = ["taskset", "-c", ",".join(map(str, cores)), *command]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **(environment or {})}
        )
    server = LlamaServer(f"http://127.0.0.1:{port}", process, log, command)
    try:
        wait_until_ready(server)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until_ready(server: LlamaServer) -> None:
    """Returns once the server answers; raises `RuntimeError` with the end of its log if it ends or takes too long."""
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline and server.process.poll() is None:
        try:
            with urllib.request.urlopen(server.url + "/health", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)
    raise RuntimeError(f"llama-server did not start:\n{server.log.read_text(errors='replace')[-3000:]}")
