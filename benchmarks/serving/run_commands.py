"""Runs the commands that spec_kd prints for a draft, as they are printed, in every engine that this machine has.

    python -m benchmarks.serving.run_commands --data_dir DATA --work_dir outputs/serving [--engines llama.cpp vllm]

A server that is started has to answer real prompts and to draft, which `observe_serving` finds out where the server
tells it. Other servers, and snippets of Python, have to write text. The scripts beside this one install the engines.
The result is written as JSON.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.serving import prompts as real
from benchmarks.serving.models import make_pair
from benchmarks.serving.record_vllm import WORKER as VLLM
from benchmarks.serving.worker import TOOLS
from spec_kd import observe_serving, serving_commands
from spec_kd.serving import SERVING_ENGINES

RESULT = Path("benchmarks/results/serving/commands.json")
NUM_DRAFT_TOKENS = 4
MAX_NEW_TOKENS = 32
START_TIMEOUT = 1800.0  # seconds; vLLM reads and compiles for minutes on a busy core


@dataclass(frozen=True)
class Place:
    """Where the command of an engine is run.

    Args:
        bin (`Path`): Folder that comes first on the PATH.
        cwd (`Path`, *optional*): Folder to run it in; a temporary one by default.
        port (`int`, *optional*): Port that the server listens on if nobody says another; `None` for a snippet.
        environment (`dict`, *optional*): More variables of the environment.
    """

    bin: Path
    cwd: Path | None = None
    port: int | None = None
    environment: dict[str, str] = field(default_factory=dict)


def list_places() -> dict[str, Place]:
    """Engines that can run here, installed or not."""
    llama = TOOLS / "llama.cpp"
    return {
        "transformers": Place(Path(sys.executable).parent),
        "llama.cpp": Place(llama / "bin", (llama / "convert_hf_to_gguf.py").resolve().parent, 8080),
        "vllm": Place(TOOLS / "vllm" / ".venv" / "bin", None, 8000, dict(VLLM.environment)),
        "mlx-lm": Place(TOOLS / "mlx" / ".venv" / "bin", None, 8080),
        "openvino": Place(TOOLS / "openvino" / ".venv" / "bin"),
    }


@contextmanager
def start(command: str, place: Place, folder: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a command in a shell of its own, and stops all that it started at the end."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | place.environment
    environment["PATH"] = f"{place.bin}:{environment['PATH']}"
    if not (place.bin / "python").exists():  # the converter of llama.cpp has a Python of its own
        environment["PATH"] = f"{place.bin.parent / '.venv' / 'bin'}:{environment['PATH']}"
    with log.open("w") as file:
        process = subprocess.Popen(
            ["bash", "-e", "-c", command], cwd=place.cwd or folder, env=environment, stdout=file, stderr=file,
            start_new_session=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):  # a snippet has ended by itself
            os.killpg(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(60)
            os.killpg(process.pid, signal.SIGKILL)


def wait_for_server(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Waits until the server lists its models; raises `RuntimeError` with the end of its log if it ends."""
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"The command ended with status {process.returncode}:\n{log.read_text()[-3000:]}")
        try:
            with urllib.request.urlopen(f"{url}/v1/models", timeout=5) as response:
                response.read()
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(1)
    raise RuntimeError(f"The server does not answer after {START_TIMEOUT:.0f} s:\n{log.read_text()[-3000:]}")


def complete(url: str) -> str:
    """What a server without counters writes after a word."""
    body = json.dumps({"prompt": "Hello", "max_tokens": MAX_NEW_TOKENS, "temperature": 0}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=START_TIMEOUT) as response:
        text: str = json.load(response)["choices"][0]["text"]
    if not text:
        raise RuntimeError("The server answered without text.")
    return text


def run_engine(engine: str, place: Place, pair: tuple[Path, Path], prompts: list[Any], folder: Path) -> dict[str, Any]:
    """What came of the command of one engine."""
    draft, target = (str(path.resolve()) for path in pair)
    command = serving_commands(draft, target, NUM_DRAFT_TOKENS)[engine]
    log = folder / f"{engine}.log"
    found: dict[str, Any] = {"engine": engine, "command": serving_commands("DRAFT", "TARGET", NUM_DRAFT_TOKENS)[engine]}
    if place.port is None:
        script = folder / "snippet.py"
        script.write_text(command)
        with start(f"python {script}", place, folder, log) as process:
            found["status"] = process.wait(START_TIMEOUT)
        printed = log.read_text().splitlines()
        if found["status"] or not printed:
            raise RuntimeError(f"The snippet ended with status {found['status']}:\n{log.read_text()[-3000:]}")
        return found | {"printed": printed[-1][:200]}
    url = f"http://127.0.0.1:{place.port}"
    with start(command, place, folder, log) as process:
        wait_for_server(process, url, log)
        if SERVING_ENGINES[engine].observer is None:
            return found | {"printed": complete(url)[:200]}
        observation = observe_serving(
            url,
            prompts,
            processing_class=AutoTokenizer.from_pretrained(target),
            serving_engine=engine,
            max_new_tokens=MAX_NEW_TOKENS,
            num_assistant_tokens=NUM_DRAFT_TOKENS,
        )
    counts = observation.totals  # of the server's counters, which the command need not be changed to see
    drafted, accepted = (
        (counts.drafted, counts.accepted)
        if counts is not None
        else (int(observation.drafted.sum()), int(observation.accepted.sum()))
    )
    return found | {
        "prompts": len(observation.requests),
        "tokens": sum(len(one.completion_ids) for one in observation.requests),
        "drafted": drafted,
        "accepted": accepted,
    }


def main() -> None:
    places = list_places()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="Folder with <domain>/test.jsonl.")
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/serving"))
    parser.add_argument("--engines", nargs="+", choices=places, default=list(places))
    parser.add_argument("--num_prompts", type=int, default=4, help="Prompts that a server is asked (default: 4).")
    arguments = parser.parse_args()

    target, draft = make_pair(arguments.work_dir)
    mixed = real.select_prompts(arguments.data_dir, AutoTokenizer.from_pretrained(target)).mixed
    prompts = [list(prompt.messages) for prompt in mixed[:: len(mixed) // arguments.num_prompts]]
    found = {one["engine"]: one for one in json.loads(RESULT.read_text())} if RESULT.exists() else {}
    for engine in arguments.engines:
        with tempfile.TemporaryDirectory() as folder:
            found[engine] = run_engine(engine, places[engine], (draft, target), prompts, Path(folder))
        print(json.dumps(found[engine]), flush=True)
        RESULT.write_text(json.dumps(list(found.values()), indent=1) + "\n")


if __name__ == "__main__":
    main()
