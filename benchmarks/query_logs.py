"""Reads, deduplicates and splits a log of a million lines: memory, time, and the duplicates that were found.

    python -m benchmarks.query_logs

The log is generated here: chat requests of several loggers, ShareGPT conversations and TRL prompts, in plain, gzip and
zstd files, with known shares of exact duplicates, near-duplicates, malformed lines and conversations of several
requests.
`load_query_logs` runs in a process of its own, and its peak memory is the kernel's VmHWM.
"""

import argparse
import gzip
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from benchmarks.harness import describe_machine

RESULTS = Path(__file__).parent / "results"
LIMIT = 2**30
SHARES = {"exact": 0.1, "near": 0.1, "follow_up": 0.1, "malformed": 0.005}  # the rest is new
FORMATS = {"openai": 0.4, "litellm": 0.3, "sharegpt": 0.15, "trl": 0.15}
FILES = {"openai": "openai.jsonl", "litellm": "litellm.jsonl.gz", "sharegpt": "sharegpt.jsonl.zst", "trl": "trl.jsonl"}
SYSTEM_PROMPTS = [
    None,
    "You are a helpful assistant.",
    "You answer questions about our products. " + "Be polite. " * 40,
]
TOOLS = [
    {"type": "function", "function": {"name": "search", "parameters": {"properties": {"query": {"type": "string"}}}}}
]
WINDOW = 5
CHILD = """
import json, resource, sys, time
def read_peak():
    return 1024 * int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])
from spec_kd.prompts.logs.query_logs import load_query_logs
imported = read_peak()
start = time.monotonic()
result = load_query_logs(sys.argv[1], sys.argv[2], show_progress=False, **json.loads(sys.argv[3]))
seconds = time.monotonic() - start
print(json.dumps({"seconds": seconds, "peak_bytes": read_peak(), "peak_bytes_of_imports": imported,
                  "peak_bytes_of_getrusage": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
                  "report": result.report.to_dict()}))
"""


Key = tuple[str, int]
"""Of a prompt: its conversation and number of messages."""


@dataclass
class Planted:
    """A prompt of the log.

    Attributes:
        kind (`str`): A key of `SHARES`, or `"new"`.
        original (`Key`, *optional*): Of a duplicate.
        similarity (`float`): To the original, exactly.
    """

    kind: str
    original: Key | None = None
    similarity: float = 1.0


class LogWriter:
    """Writes the log and remembers what was planted.

    Attributes:
        planted (`dict[Key, Planted]`): Every prompt.
    """

    def __init__(self, folder: Path, seed: int):
        self._rng = random.Random(seed)
        letters = "etaoinshrdlucmfwypvbgkjqxz"
        weights = [1 / (n + 2) for n in range(26)]
        self._words = ["".join(self._rng.choices(letters, weights, k=self._rng.randint(2, 9))) for _ in range(50_000)]
        self._cumulative = []
        total = 0.0
        for n in range(len(self._words)):  # as frequent as words are, by Zipf's law
            total += 1 / (n + 10)
            self._cumulative.append(total)
        self._stack = ExitStack()
        openers = {
            "openai": lambda path: path.open("wb"),
            "litellm": lambda path: gzip.GzipFile(path, "wb", compresslevel=1),
            "sharegpt": lambda path: pa.CompressedOutputStream(str(path), "zstd"),
            "trl": lambda path: path.open("wb"),
        }
        self._files = {
            name: self._stack.enter_context(opener(folder / FILES[name])) for name, opener in openers.items()
        }
        self._recent: list[tuple[str, list, list | None, str]] = []
        self.planted: dict[Key, Planted] = {}
        self.num_bytes = 0

    def write_line(self, number: int) -> None:
        kind = self._rng.choices([*SHARES, "new"], [*SHARES.values(), 1 - sum(SHARES.values())])[0]
        if kind == "malformed":
            line = self._rng.choice([b'{"messages": [{"role": "user", "content": "cut', b'{"error": {}}', b"\xff\xfe"])
            self._write(self._rng.choice(list(FILES)), line)
            return
        name, planted = f"c{number}", Planted(kind)
        if kind == "new" or not self._recent:
            messages, tools = self._start_conversation()
        else:
            before, messages, tools, text = self._rng.choice(self._recent)
            if kind != "follow_up":
                planted.original = (before, len(messages))
            if kind == "near":
                edited = self._edit(text)
                planted.similarity = compute_similarity(normalize(text), normalize(edited))
                messages = [*messages[:-1], {"role": "user", "content": edited}]
            elif kind == "follow_up":
                name = before
                messages = [*messages, {"role": "assistant", "content": self._compose(20)}]
                messages += [{"role": "user", "content": self._compose(15)}]
        format = self._rng.choices(list(FORMATS), FORMATS.values())[0]
        if (format in ("sharegpt", "trl") and (tools or kind == "exact")) or kind == "follow_up":
            format = "openai"  # the same tools, and a conversation's requests in one file
        self._write(format, json.dumps(self._dress(format, messages, tools, name, number)).encode())
        self.planted[name, len(messages)] = planted
        if kind in ("new", "follow_up"):
            # a follow-up continues the last request of its conversation, so that is forgotten
            self._recent = [entry for entry in self._recent if entry[0] != name][-499:]
            self._recent.append((name, messages, tools, messages[-1]["content"]))

    def close(self) -> None:
        self._stack.close()

    def _start_conversation(self) -> tuple[list, list | None]:
        system = self._rng.choice(SYSTEM_PROMPTS)
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": self._compose(self._rng.choice([12, 25, 50, 100]))})
        return messages, TOOLS if self._rng.random() < 0.2 else None

    def _compose(self, num_words: int) -> str:
        return " ".join(self._rng.choices(self._words, cum_weights=self._cumulative, k=num_words))

    def _edit(self, text: str) -> str:
        """Case, spaces and punctuation, and one word in twelve or fewer replaced."""
        words = text.split()
        for position in self._rng.sample(range(len(words)), self._rng.randint(0, max(1, len(words) // 12))):
            words[position] = self._rng.choice(self._words)
        text = self._rng.choice([" ", "  "]).join(words) + self._rng.choice(["", ".", "!"])
        return text.capitalize() if self._rng.random() < 0.5 else text

    def _dress(self, format: str, messages: list, tools: list | None, name: str, number: int) -> dict:
        answer = {"role": "assistant", "content": self._compose(20), "refusal": None}
        response = {"id": f"chatcmpl-{number}", "created": 1_700_000_000 + number, "choices": [{"message": answer}]}
        if format == "openai":
            request = {
                "model": "target",
                "messages": messages,
                "user": f"u{number % 997}",
                **({"tools": tools} if tools else {}),
            }
            return {"conversation_id": name, "request": request, "response": response}
        if format == "litellm":
            return {
                "id": f"chatcmpl-{number}", "trace_id": f"t{number}", "call_type": "acompletion", "status": "success",
                "startTime": 1.7e9 + number, "endTime": 1.7e9 + number + 2, "end_user": f"u{number % 997}",
                "metadata": {"session_id": name}, "model_parameters": {"temperature": 1.0, "tools": tools},
                "messages": messages, "response": response,
            }  # fmt: skip
        if format == "sharegpt":
            names = {"system": "system", "user": "human", "assistant": "gpt"}
            turns = [{"from": names[m["role"]], "value": m["content"]} for m in [*messages, answer]]
            return {"id": name, "conversations": turns}
        return {
            "conversation_id": name,
            "prompt": messages,
            "completion": [{"role": "assistant", "content": answer["content"]}],
        }

    def _write(self, format: str, line: bytes) -> None:
        self._files[format].write(line + b"\n")
        self.num_bytes += len(line) + 1


def normalize(text: str) -> str:
    return " ".join(text.casefold().split())


def compute_similarity(first: str, second: str) -> float:
    """Jaccard similarity of the windows, exactly."""
    a, b = ({(t + "\0" * (WINDOW - 1))[start : start + WINDOW] for start in range(len(t))} for t in (first, second))
    return len(a & b) / len(a | b)


def judge(planted: dict, output_dir: Path) -> dict:
    """What became of each kind of planted prompt, and whether a conversation is in both splits."""
    from datasets import Dataset

    kept, names = set(), {}
    for split in ("train", "test"):
        dataset = Dataset.from_file(str(output_dir / f"{split}.arrow"))
        names[split] = set()
        for batch in dataset.with_format("arrow").iter(4096):
            conversations = batch["conversation_id"].to_pylist()
            names[split].update(conversations)
            kept.update(zip(conversations, batch["prompt"].combine_chunks().value_lengths().to_pylist(), strict=True))
    # Files are read one after the other, so that the duplicate may come before its original.
    found, totals, has_kept_duplicate = Counter(), Counter(), set()
    for key, prompt in planted.items():
        if prompt.original is not None:
            kind = prompt.kind
            if kind == "near":
                low = next(low for low in (0.9, 0.85, 0.8, 0.75, 0.7, 0.0) if prompt.similarity >= low)
                kind += f"-duplicate, similarity from {low}"
            totals[kind] += 1
            found[kind] += key not in kept or prompt.original not in kept
            if key in kept:
                has_kept_duplicate.add(prompt.original)
    # A conversation of several turns in the form of ShareGPT is also a duplicate of the original's earlier turns.
    originals_by_name = {key[0]: prompt.original[0] for key, prompt in planted.items() if prompt.original is not None}
    has_kept_duplicate |= {(originals_by_name[name], length) for name, length in kept if name in originals_by_name}
    originals = {key for key, prompt in planted.items() if prompt.original is None}
    return {
        "duplicates": {kind: {"planted": totals[kind], "found": found[kind]} for kind in sorted(totals)},
        "originals": len(originals),
        "originals_lost": len(originals - kept - has_kept_duplicate),
        "conversations_in_both_splits": len(names["train"] & names["test"]),
    }


def run(log: Path, output_dir: Path, options: dict) -> dict:
    command = [sys.executable, "-c", CHILD, str(log), str(output_dir), json.dumps(options)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def write_table(record: dict, path: Path) -> None:
    run, bare = record["run"], record["run_without_near_duplicates"]
    report = run["report"]
    is_held = run["peak_bytes"] <= LIMIT
    lines = [
        "# A log of a million lines within 1 GiB",
        "",
        f"`{record['command']}`: {record['lines']:,} lines, {record['log_bytes'] / 1e9:.2f} GB of JSON "
        f"({record['file_bytes'] / 1e9:.2f} GB on disk), of four loggers in plain, gzip and zstd files; made on "
        f"the spot, so that what is a duplicate is known. {record['machine']['cpu']}, one process on one core.",
        "",
        "| | default options | `near_duplicate_threshold=None` |",
        "|---|---|---|",
        f"| peak memory (VmHWM) | {run['peak_bytes'] / 2**20:,.0f} MiB | {bare['peak_bytes'] / 2**20:,.0f} MiB |",
        f"| of it, after the imports | {run['peak_bytes_of_imports'] / 2**20:,.0f} MiB | "
        f"{bare['peak_bytes_of_imports'] / 2**20:,.0f} MiB |",
        f"| seconds | {run['seconds']:,.0f} | {bare['seconds']:,.0f} |",
        f"| lines a second | {record['lines'] / run['seconds']:,.0f} | {record['lines'] / bare['seconds']:,.0f} |",
        f"| prompts kept | {report['kept']:,} | {bare['report']['kept']:,} |",
        f"| bytes of memory a kept prompt, imports aside | {_per_prompt(run):,.0f} | {_per_prompt(bare):,.0f} |",
        "",
        f"Asked for: at most 1,024 MiB. {'Held' if is_held else 'Missed'}.",
        "",
        "## What became of it (default options)",
        "",
        "| planted | | found |",
        "|---|---|---|",
    ]
    judged = record["judged"]
    for kind, counts in judged["duplicates"].items():
        share = counts["found"] / counts["planted"]
        lines.append(f"| {kind} | {counts['planted']:,} | {counts['found']:,} ({share:.2%}) |")
    lines += [
        "",
        "A duplicate is found if it and its original are not both kept. Similarity is the exact Jaccard one of the "
        "last turns; the threshold is 0.8. Earlier turns that two prompts have in common make them more alike.",
        "",
        f"Of {judged['originals']:,} prompts that are no duplicates, {judged['originals_lost']:,} are lost: neither "
        "they nor a duplicate of theirs is kept.",
        "",
        f"Malformed: {report['malformed']:,} lines of {record['planted_malformed']:,}. Train {report['train']:,}, "
        f"test {report['test']:,}; conversations in both: {judged['conversations_in_both_splits']}.",
        "",
    ]
    path.write_text("\n".join(lines), encoding="utf-8")


def _per_prompt(run: dict) -> float:
    return (run["peak_bytes"] - run["peak_bytes_of_imports"]) / run["report"]["kept"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        log.mkdir()
        start = time.monotonic()
        writer = LogWriter(log, arguments.seed)
        for number in range(arguments.lines):
            writer.write_line(number)
        writer.close()
        print(f"written in {time.monotonic() - start:.0f} s", flush=True)
        record = {
            "command": "python -m benchmarks.query_logs",
            "machine": describe_machine(),
            "lines": arguments.lines,
            "log_bytes": writer.num_bytes,
            "file_bytes": sum(path.stat().st_size for path in log.iterdir()),
            "planted_malformed": arguments.lines - len(writer.planted),
            "run": run(log, Path(folder) / "out", {}),
            "run_without_near_duplicates": run(log, Path(folder) / "bare", {"near_duplicate_threshold": None}),
        }
        record["judged"] = judge(writer.planted, Path(folder) / "out")
    (arguments.results / "query_logs.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    write_table(record, arguments.results / "query_logs.md")
    print((arguments.results / "query_logs.md").read_text())


if __name__ == "__main__":
    main()
