"""A program with the flags, the pages and the rounds of llama-server, whose times are made up.

A round that drafts k tokens takes `ROUND[k]` steps, and `ACCEPTED` more for each accepted token. A step of a model in a
file `draft.gguf` takes `DRAFT_STEP` of them. Each further request
at a time makes all slower by `SLOWER`. Traits come from the environment as JSON in FAKE_LLAMA_SERVER: `paces` (a step
takes so many times longer in the first, second, ... start of the program, counted in the file `starts`), `lacks` (a
flag that this build does not know), `dies` (at the first completion), `drafts` (the part of the drafted tokens that it
proposes), `silent` (answers without `timings`).
"""

import json
import os
import random
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

STEP = 20.0  # milliseconds, of one request at a time
ROUND = {k: 1.3 + 0.2 * k + 0.05 * k * k for k in range(1, 17)} | {0: 1.1}
ACCEPTED = 0.02
DRAFT_STEP = 0.125
SLOWER = 0.25  # for each further request at a time
WAIT = 0.2  # seconds in which requests meet
TRAITS = json.loads(os.environ.get("FAKE_LLAMA_SERVER", "{}"))
VALUED = ("-m", "--port", "--spec-draft-n-max", "--spec-synth-rates", "--ctx-size", "--parallel")
FLAGS = ("-md", "--spec-type", "--host", "--no-webui", "--threads", "--threads-batch", *VALUED)


def read_flags(argv: list[str]) -> dict[str, str]:
    known = [flag for flag in FLAGS if flag != TRAITS.get("lacks")]
    if "--help" in argv:
        print("\n".join(known))
        raise SystemExit(0)
    for word in argv:
        if word.startswith("-") and word not in known and not word[1:].isdigit():
            print(f"error: invalid argument: {word}", file=sys.stderr)
            raise SystemExit(1)
    return {flag: argv[argv.index(flag) + 1] for flag in VALUED if flag in argv}


def complete(body: dict, gamma: int, rates: list[float], pace: float, context: int) -> dict:
    """Rounds as `server_slot` makes them, with drafted tokens that are accepted by chance."""
    assert body["return_tokens"] and body["ignore_eos"] and body["temperature"] == 0 and body["cache_prompt"]
    limit, written, steps, drafted, accepted = body["n_predict"], 1, 0.0, 0, 0
    assert len(body["prompt"]) + limit + gamma + 1 < context
    chance = random.Random(body["seed"])
    chances = [rate / before if before else 0.0 for before, rate in zip([1.0, *rates], rates, strict=False)]
    while written < limit:
        k = int(min(gamma, limit - written - 1) * TRAITS.get("drafts", 1))
        a = next((j for j in range(k) if chance.random() >= chances[j]), k)
        steps += (ROUND[k] if gamma else 1.0) + ACCEPTED * a
        written, drafted, accepted = written + a + 1, drafted + k, accepted + a
    timings = {"predicted_ms": steps * STEP * pace, "predicted_n": written}
    timings |= {"draft_n": drafted, "draft_n_accepted": accepted} if drafted else {}
    answer = {"tokens": [7] * written, "stop_type": "limit"}
    return answer if TRAITS.get("silent") else {**answer, "timings": timings}


def main() -> None:
    flags = read_flags(sys.argv[1:])
    starts = Path(TRAITS.get("starts", os.devnull))
    number = len(starts.read_text().split()) if starts.is_file() else 0
    with starts.open("a") as file:
        print("start", file=file)
    paces = TRAITS.get("paces", [1.0])
    pace = paces[number % len(paces)] * (DRAFT_STEP if Path(flags["-m"]).name == "draft.gguf" else 1)
    gamma, rates = int(flags.get("--spec-draft-n-max", 0)), flags.get("--spec-synth-rates", "")
    chances = [float(rate) for rate in rates.split(",")] if rates else [0.0] * gamma
    assert len(chances) == gamma
    parallel = int(flags["--parallel"])
    context = int(flags["--ctx-size"]) // parallel
    arrivals: list[float] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send({"status": "ok"})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/tokenize":
                self.send({"tokens": [len(word) for word in body["content"].split()]})
                return
            assert self.path == "/completion"
            if TRAITS.get("dies"):
                print("GGML_ASSERT(false) failed", flush=True)
                os._exit(134)
            arrived = time.monotonic()
            arrivals.append(arrived)
            time.sleep(WAIT if parallel > 1 else 0)
            together = sum(abs(other - arrived) < WAIT / 2 for other in arrivals) if parallel > 1 else 1
            load = 1 + SLOWER * (together - 1)
            self.send(complete(body, gamma, chances, pace * load, context))

        def send(self, answer: dict) -> None:
            data = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None: ...

    ThreadingHTTPServer(("127.0.0.1", int(flags["--port"])), Handler).serve_forever()


if __name__ == "__main__":
    main()
