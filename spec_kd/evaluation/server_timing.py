"""Times rounds of llama-server at an acceptance that is known.

The server accepts drafted tokens by chance where it is told to (`SYNTHETIC_FLAG`). All else is what it does for a real
request: draft steps, verification with its rows of logits, sampling, rolled back caches, the draft's second pass over
the tokens.
"""

import itertools
import json
import math
import os
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict
from pathlib import Path

from spec_kd.evaluation.cost import MeasurementError
from spec_kd.evaluation.server_options import ServerTimingOptions, TimedSetting
from spec_kd.files import alone_in, explain_full_disk, read_json_object, write_text
from spec_kd.open_types import JsonObject
from spec_kd.options import read_path
from spec_kd.progress import RowProgress
from spec_kd.serving.llama_cpp import OBSERVER, SYNTHETIC_FLAG, write_rates
from spec_kd.serving.llama_server import LlamaServer, find_llama_server, run_llama_server

RECORD = "timings.json"
PLAIN_STEPS = 4  # for each round that is timed: about as long
LEAST_DRAFTED = 0.9  # of what rounds draft that no limit cuts short
TEXT = (
    "The cell is the basic unit of life. Every living thing is made of one or more cells, and every cell comes from "
    "another cell. A membrane separates the inside of a cell from the outside and lets some substances pass. Inside, "
    "proteins do most of the work: they build structures, carry signals and speed up reactions. The instructions for "
    "making them are stored in the nucleus, in long molecules that are copied each time the cell divides. "
)


def time_settings(
    draft: str | os.PathLike[str],
    target: str | os.PathLike[str],
    settings: Sequence[TimedSetting],
    options: ServerTimingOptions,
    output_dir: str | os.PathLike[str] | None,
    show_progress: bool,
) -> dict[tuple[TimedSetting, int], list[float]]:
    """Seconds of a round (of a step, where nothing is drafted) in each repetition, by setting and batch size.

    The settings take turns, each in a server of its own, so that the pace of the machine may change. By default all
    servers run until the end, and a turn is a request. With an
    `output_dir` every one is kept as it comes, and a killed run continues.
    """
    pair = [Path(read_path(name, path)) for name, path in (("draft", draft), ("target", target))]
    for name, path in zip(("draft", "target"), pair, strict=True):
        if not path.is_file():
            raise FileNotFoundError(f"`{name}` is `{path}`, which is no file. Convert the model to GGUF first.")
    program = find_llama_server(options.server)
    known = subprocess.run([program, "--help"], capture_output=True, text=True, check=False)
    if SYNTHETIC_FLAG not in known.stdout + known.stderr:
        raise ValueError(
            f"`{program}` has no {SYNTHETIC_FLAG}, with which rounds are timed. Build a llama.cpp that has it (October "
            "2026 or later)."
        )
    states = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in pair]
    kept = {name: value for name, value in asdict(options).items() if name != "repeats"}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary if output_dir is None else read_path("output_dir", output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        with alone_in(folder), explain_full_disk(folder, "what is finished is kept"):
            record = _Record(folder / RECORD, {"files": states, **kept})
            turns = list(itertools.product(range(options.repeats), dict.fromkeys(settings)))
            num_done = sum(turn in record for turn in turns)
            with (
                RowProgress(len(turns), "Server costs", show_progress, num_done, unit="settings") as progress,
                ExitStack() as running,
            ):
                servers: dict[TimedSetting, LlamaServer] = {}
                for repeat, rates in turns:
                    if (repeat, rates) in record:
                        continue
                    if rates not in servers:
                        if not options.keep_servers:
                            running.close()
                            servers.clear()
                        servers[rates] = running.enter_context(_run_server(program, pair, rates, options, folder))
                    record.add(repeat, rates, _time_setting(servers[rates], rates, options, repeat))
                    progress.advance()
    return {
        (rates, size): [record.get(repeat, rates)[size] for repeat in range(options.repeats)]
        for rates in settings
        for size in options.batch_sizes
    }


class _Record:
    """Seconds by batch size of each setting and repetition, in a file that is written again after each of them."""

    def __init__(self, path: Path, fingerprint: JsonObject):
        self._path, self._fingerprint = path, json.loads(json.dumps(fingerprint))
        self._seconds: dict[str, dict[str, float]] = {}
        if path.exists():
            found = read_json_object(path, "Choose another folder.", ("fingerprint", "seconds"))
            before = found["fingerprint"]
            if changed := [name for name, value in self._fingerprint.items() if before.get(name) != value]:
                raise ValueError(
                    f"`{path.parent}` holds timings with other {', '.join(changed)}. Choose another folder, or repeat "
                    "the call as it was to continue it."
                )
            self._seconds = found["seconds"]

    def __contains__(self, turn: tuple[int, TimedSetting]) -> bool:
        return _name(*turn) in self._seconds

    def get(self, repeat: int, rates: TimedSetting) -> dict[int, float]:
        return {int(size): seconds for size, seconds in self._seconds[_name(repeat, rates)].items()}

    def add(self, repeat: int, rates: TimedSetting, seconds: dict[int, float]) -> None:
        self._seconds[_name(repeat, rates)] = {str(size): value for size, value in seconds.items()}
        whole = {"fingerprint": self._fingerprint, "seconds": self._seconds}
        write_text(self._path, json.dumps(whole, indent=1) + "\n")


def _name(repeat: int, rates: TimedSetting) -> str:
    setting = "draft alone" if rates is None else ",".join(f"{rate:g}" for rate in rates) or "plain"
    return f"{setting} #{repeat + 1}"


def _count_tokens(rates: TimedSetting, options: ServerTimingOptions) -> tuple[int, int]:
    """Tokens of a short and of a long request.

    The limit leaves fewer drafted tokens to the last rounds, which both have in common.
    """
    short = len(rates or ()) + 2
    return short, short + round(options.num_rounds * (1 + sum(rates) if rates else PLAIN_STEPS))


def _run_server(
    program: str, pair: Sequence[Path], rates: TimedSetting, options: ServerTimingOptions, folder: Path
) -> AbstractContextManager[LlamaServer]:
    """A server of this setting, with room for the long request."""
    gamma, name = len(rates or ()), "draft" if rates is None else "plain"
    room = options.context_length + _count_tokens(rates, options)[1] + gamma + 2
    return run_llama_server(
        program,
        pair[0] if rates is None else pair[1],
        folder / f"llama-server-{f'{gamma}-{sum(rates):g}' if rates else name}.log",
        draft=pair[0] if rates else None,
        num_draft_tokens=gamma,
        parallel=max(options.batch_sizes),
        context_length=256 * math.ceil(room / 256),
        flags=[
            *shlex.split(options.server_flags or ""),
            *([SYNTHETIC_FLAG, write_rates(rates)] if rates else []),
        ],
    )


def _time_setting(
    server: LlamaServer, rates: TimedSetting, options: ServerTimingOptions, repeat: int
) -> dict[int, float]:
    """Seconds of a round by batch size."""
    short, long = _count_tokens(rates, options)
    slots = max(options.batch_sizes)
    ids: list[int] = server.post("/tokenize", {"content": TEXT})["tokens"]
    ids = ids * math.ceil((options.context_length + slots) / len(ids))
    prompts = [ids[slot : slot + options.context_length] for slot in range(slots)]
    seconds = {}
    for size in options.batch_sizes:
        # The first requests leave the prompts in the caches, so that those that are timed begin together
        _, begun, whole = (_ask(server, prompts[:size], n, len(rates or ()), repeat) for n in (2, short, long))
        seconds[size] = (whole[0] - begun[0]) / max(whole[1] - begun[1], 1)
        if seconds[size] <= 0:
            raise MeasurementError(
                f"A request of {long} tokens took no longer than one of {short}, as on a busy machine. Repeat it "
                "when the machine is idle, or raise `num_rounds`."
            )
    return seconds


def _ask(
    server: LlamaServer, prompts: Sequence[list[int]], num_tokens: int, gamma: int, repeat: int
) -> tuple[float, int]:
    """Seconds and rounds after the first token, summed over requests that run together."""

    def ask(slot: int) -> tuple[float, int]:
        own: JsonObject = {"id_slot": slot, "seed": 1000 * repeat + slot, "ignore_eos": True, "cache_prompt": True}
        answer = server.complete(prompts[slot], num_tokens, **own)
        counts, seconds = OBSERVER.read_counts(answer), OBSERVER.read_decoding_seconds(answer)
        if counts is None or seconds is None:
            raise MeasurementError(f"An answer of {server.command[0]} has no `timings`. Is it llama-server?")
        drafted, accepted = counts.drafted or 0, counts.accepted or 0
        rounds = len(answer["tokens"]) - 1 - accepted
        if drafted < LEAST_DRAFTED * gamma * (rounds - gamma - 1):
            raise MeasurementError(
                f"llama-server drafted {drafted} tokens in {rounds} rounds, where each should draft {gamma}. Take "
                "`--spec-draft-p-min` out of `server_flags`."
            )
        return seconds, rounds

    with ThreadPoolExecutor(len(prompts)) as pool:
        each = list(pool.map(ask, range(len(prompts))))
    return sum(seconds for seconds, _ in each), sum(rounds for _, rounds in each)
