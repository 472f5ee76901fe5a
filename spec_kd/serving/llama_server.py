"""A `llama-server` of one's own: started on a free port, asked, and stopped at the end."""

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from spec_kd.open_types import Argument, JsonObject
from spec_kd.serving.llama_cpp import list_draft_flags

START_TIMEOUT = 600.0  # seconds
SHOWN_LOG = 2000  # characters


class LlamaServerError(RuntimeError):
    """`llama-server` did not start, ended, or refused a request. The message has the end of its log."""


@dataclass(frozen=True)
class LlamaServer:
    """A server that runs.

    Args:
        url (`str`): Its address, without a path.
        process (`subprocess.Popen`): The server's process.
        log (`Path`): What it prints.
        command (`Sequence[str]`): The command that started it.
    """

    url: str
    process: "subprocess.Popen[bytes]"
    log: Path
    command: Sequence[str]

    def get(self, path: str, timeout: float = 60.0) -> str:
        """The answer to a GET request, as text."""
        with urllib.request.urlopen(self.url + path, timeout=timeout) as response:
            text: str = response.read().decode()
        return text

    def post(self, path: str, body: JsonObject, timeout: float = 3600.0) -> JsonObject:
        """The JSON answer to a POST request.

        Raises:
            LlamaServerError: The server ended meanwhile.
            OSError: It refused the request, or did not answer in time.
        """
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                answer: JsonObject = json.load(response)
        except urllib.error.HTTPError:
            raise
        except OSError as error:
            try:  # a dying server closes its connections some moments before it is gone
                status = self.process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                raise error from None
            raise LlamaServerError(self.describe_end(f"ended with status {status} during a request")) from error
        return answer

    def complete(self, prompt_ids: Sequence[int], max_new_tokens: int, **options: Argument) -> JsonObject:
        """One greedy completion of token ids; the answer has `tokens`, `stop_type` and `timings`."""
        body = {"prompt": list(prompt_ids), "n_predict": max_new_tokens, "temperature": 0.0, "return_tokens": True}
        return self.post("/completion", {**body, "cache_prompt": False, **options})

    def describe_end(self, what: str) -> str:
        """A sentence with the end of the log."""
        return f"llama-server {what}. The end of `{self.log}`:\n{self.log.read_text(errors='replace')[-SHOWN_LOG:]}"


def find_llama_server(path: str | os.PathLike[str]) -> str:
    """The program at this path, or of this name on the PATH; raises `FileNotFoundError` if there is none."""
    found = shutil.which(os.path.expanduser(path))
    if found is None:
        raise FileNotFoundError(
            f"`{os.fspath(path)}` is no program. Give the path of `llama-server`, such as build/bin/llama-server."
        )
    return found


@contextmanager
def run_llama_server(
    program: str | os.PathLike[str],
    target: Path,
    log: Path,
    *,
    draft: Path | None = None,
    num_draft_tokens: int = 4,
    parallel: int = 1,
    context_length: int = 2048,
    flags: Sequence[str] = (),
    wrapper: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Iterator[LlamaServer]:
    """Starts `llama-server` on a free port and stops it at the end.

    Args:
        program (`str` or `os.PathLike`): `llama-server`.
        target (`Path`): The target's GGUF file.
        log (`Path`): File for what the server prints.
        draft (`Path`, *optional*): The draft's GGUF file; without it the server decodes plainly.
        num_draft_tokens (`int`, *optional*, defaults to `4`): Tokens that the draft proposes in a round.
        parallel (`int`, *optional*, defaults to `1`): Requests that are served at once.
        context_length (`int`, *optional*, defaults to `2048`): Tokens of prompt and completion for each request.
        flags (`Sequence[str]`, *optional*): More flags of llama-server.
        wrapper (`Sequence[str]`, *optional*): Command before that of the server, such as `taskset -c 1`.
        environment (`Mapping[str, str]`, *optional*): Variables of its environment, beside the inherited ones.

    Raises:
        FileNotFoundError: There is no such program.
        LlamaServerError: The server did not start.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*wrapper, find_llama_server(program), "-m", str(target), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--parallel", str(parallel), "--ctx-size", str(context_length * parallel), "--no-webui", *flags]
    if draft is not None:
        command += list_draft_flags(str(draft), num_draft_tokens)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **(environment or {})}
        )
    server = LlamaServer(f"http://127.0.0.1:{port}", process, log, command)
    try:
        _wait_until_ready(server)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(server: LlamaServer) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline and server.process.poll() is None:
        try:
            server.get("/health", timeout=5)
            return
        except OSError:
            time.sleep(0.1)
    raise LlamaServerError(server.describe_end("did not start"))
