"""Engines with a Python environment of their own: a worker script runs there, and its answers come back as lines."""

import argparse
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.serving import prompts as real
from benchmarks.serving.models import make_pair
from benchmarks.serving.recordings import Recording, pack, summarize

TOOLS = Path.home() / ".cache" / "spec_kd" / "tools"
POLL_INTERVAL = 0.5  # seconds


@dataclass(frozen=True)
class Worker:
    """A script of this folder, and the environment that it runs in.

    Args:
        script (`str`): Name of the script, which takes a file with a job and one for its answers.
        tool (`str`): Folder of the environment below ~/.cache/spec_kd/tools.
        variable (`str`): Environment variable that names another folder with the same layout.
        build (`str`): Script that makes the environment.
        environment (mapping of `str` to `str`, *optional*): Variables of the worker.
    """

    script: str
    tool: str
    variable: str
    build: str
    environment: Mapping[str, str] = field(default_factory=dict)

    def find_python(self) -> Path:
        """The Python of the environment; raises `FileNotFoundError` with the command that makes it."""
        python = Path(os.environ.get(self.variable, TOOLS / self.tool)) / ".venv" / "bin" / "python"
        if not python.exists():
            raise FileNotFoundError(
                f"There is no {python}. Run benchmarks/serving/{self.build}, or set {self.variable} to its folder."
            )
        return python

    def run(self, job: Mapping[str, Any], folder: Path, cores: Sequence[int] | None) -> Iterator[dict[str, Any]]:
        """Runs the job and yields the answers, in the order of its prompts, as they come.

        Args:
            job (mapping of `str` to `Any`): What the script is told, as JSON values.
            folder (`Path`): Folder for its files and its log.
            cores (sequence of `int`, *optional*): Cores that it may use.
        """
        folder.mkdir(parents=True, exist_ok=True)
        job_file, answers, log = (
            folder.resolve() / f"{self.tool}-{name}" for name in ("job.json", "answers.jsonl", "log.txt")
        )
        job_file.write_text(json.dumps(job))
        answers.write_text("")
        command = [self.find_python(), Path(__file__).with_name(self.script).resolve(), job_file, answers]
        if cores is not None:
            command = ["taskset", "-c", ",".join(map(str, cores)), *command]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | self.environment
        with log.open("w") as output, answers.open() as lines:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
            line = ""
            while True:
                has_ended = process.poll() is not None
                while part := lines.readline():
                    line += part
                    if line.endswith("\n"):
                        yield json.loads(line)
                        line = ""
                if has_ended:
                    break
                time.sleep(POLL_INTERVAL)
        if process.returncode:
            end = log.read_text(errors="replace")[-3000:]
            raise RuntimeError(f"{self.script} failed with status {process.returncode}:\n{end}")


def record_all(
    engine: str,
    text: str | None,
    worker: Worker,
    settings: Mapping[str, dict[str, Any]],
    describe: Callable[[dict[str, Any]], dict[str, Any]],
) -> None:
    """The command of an engine whose worker answers one prompt at a time.

    Args:
        engine (`str`): Name of its record.
        text (`str`): What the command does.
        worker (`Worker`): Who answers.
        settings (mapping of `str` to `dict`): What the worker is told in each setting, beside models and prompts.
        describe (`Callable`): Puts an answer under the names of a recording.
    """
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="Folder with <domain>/test.jsonl.")
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/serving"))
    parser.add_argument("--settings", nargs="+", choices=settings, default=list(settings))
    parser.add_argument("--cores", nargs="+", type=int, help="Cores that the engine may use (default: all).")
    parser.add_argument("--pack", action="store_true", help="Write the compressed recording into the project.")
    arguments = parser.parse_args()

    target, draft = make_pair(arguments.work_dir)
    prompts = real.select_prompts(arguments.data_dir, AutoTokenizer.from_pretrained(target))
    recording = Recording(arguments.work_dir / "recordings" / f"{worker.tool}.jsonl")
    for setting in arguments.settings:
        missing = [one for one in prompts.get(setting) if not recording.has(setting, one.describe())]
        missing.sort(key=lambda one: len(one.ids))  # so that a run that is stopped early has the most prompts
        models = {"target": str(target.resolve()), "draft": str(draft.resolve())}
        job = {**models, **settings[setting], "prompts": [list(one.ids) for one in missing]}
        for prompt, answer in zip(missing, worker.run(job, recording.path.parent, arguments.cores), strict=True):
            facts = {"setting": setting, "prompt": prompt.describe(), "request": settings[setting], "engine": engine}
            recording.append({**facts, **describe(answer)})
            print(f"{setting}: {answer['accepted']} accepted, {len(answer['completion_ids'])} tokens", flush=True)
    for setting, total in summarize(recording.path).items():
        print(setting, total)
    if arguments.pack:
        print(pack(recording.path))
