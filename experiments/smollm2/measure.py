"""Tokens per second of llama-server with a draft and without it, prompt by prompt, beside what replay predicts.

    python -m experiments.smollm2.measure --domain function_calling --run 192x8-seed0 --choose
    python -m experiments.smollm2.measure --domain function_calling --run 192x8-seed0 --part test --num_draft_tokens 3

The first command times rounds of the server and replays the draft on the 50 validation responses: it prints the
predicted speed-up for each number of drafted tokens and each `--p_min`. The second asks the test prompts, once. Two
servers share the same cores and answer each prompt in turn, so that other work on the machine slows both. The answers
lie in `<work_dir>/<domain>/measured`, where a killed run continues.
"""

import argparse
import gzip
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.serving.llama_cpp import find_tools, run_llama_server
from benchmarks.serving.prompts import build_call_schema, read_tools
from experiments.smollm2.conversations import DOMAINS, KEPT
from experiments.smollm2.conversations import MAX_NEW_TOKENS as MAX_RESPONSE_TOKENS
from experiments.smollm2.keep_draft import find_models, make_gguf
from experiments.smollm2.score_text import load_responses
from spec_kd import (
    Observation,
    ServingCosts,
    compare_observed,
    measure_server_costs,
    observe_serving,
    save_observed,
)
from spec_kd.evaluation.metrics import bootstrap_median
from spec_kd.evaluation.recommendations import list_thresholds
from spec_kd.evaluation.response_replay import score_responses
from spec_kd.serving import find_serving_engine
from spec_kd.serving.engine import EarlyEnd

MAX_NEW_TOKENS = 128
CONTEXT_LENGTHS = {"function_calling": 448, "biology": 128, "general": 128}  # tokens of the middle prompt and text
METRICS = ["--metrics"]  # without it a server does not tell its rounds
SPECULATION: dict[str, Sequence[str]] = {
    "draft": (),
    # What followed the last earlier occurrence of the last two tokens
    "ngram": ("--spec-type", "ngram-simple", "--spec-ngram-simple-size-n", "2", "--spec-ngram-simple-size-m", "{n}"),
}
"""Flags of llama-server for each way to propose tokens; those of a draft come from the engine's record."""


def load_prompts(arguments: argparse.Namespace, folder: Path) -> Dataset:
    """The first prompts of the part, and with `--json_schema` the calls that each allows."""
    prompts = load_responses(folder, arguments.part).select_columns(["prompt"])
    prompts = prompts.select(range(min(arguments.num_prompts, len(prompts))))
    if not arguments.json_schema:
        return prompts
    schemas = [build_call_schema(read_tools(messages)) for messages in prompts["prompt"]]
    formats = [json.dumps({"type": "json_schema", "json_schema": {"schema": schema}}) for schema in schemas]
    return prompts.add_column("response_format", formats)


def time_rounds(arguments: argparse.Namespace, gammas: Sequence[int], output: Path) -> list[ServingCosts]:
    """Costs of a round in the server, with the cores and threads that it is measured with."""
    folder = arguments.work_dir / arguments.domain
    target, draft = (make_gguf(model, folder, arguments.quantization) for model in find_models(arguments))
    return measure_server_costs(
        draft,
        target,
        server=str(find_tools() / "bin" / "llama-server"),
        server_flags=f"--threads {arguments.threads} --threads-batch {arguments.threads} {arguments.server_flags}",
        context_length=CONTEXT_LENGTHS[arguments.domain],
        gammas=gammas,
        measure_draft_step=True,
        output_dir=output,
    )


def choose(arguments: argparse.Namespace) -> dict[str, Any]:
    """Predicted speed-up on the validation responses, by number of drafted tokens.

    By `p_min` there are two, the lowest and the highest: how long a draft is after a refused token is not known.
    """
    folder = arguments.work_dir / arguments.domain
    output = (
        folder / "measured" / f"{arguments.run}-{arguments.phase}-{arguments.quantization}-{arguments.threads}t-costs"
    )
    (costs,) = time_rounds(arguments, arguments.num_draft_tokens, output)
    _, draft = find_models(arguments)
    model = AutoModelForCausalLM.from_pretrained(draft, dtype="float32")
    responses, limit = load_responses(folder, "validation"), MAX_RESPONSE_TOKENS[arguments.domain]
    scores = score_responses(model, None, responses, temperature=0.0, max_new_tokens=limit, serving_engine="llama.cpp")
    early_end = cast(EarlyEnd, find_serving_engine("llama.cpp").early_end)
    found = {}
    for gamma in arguments.num_draft_tokens:
        metrics = scores.replay(gamma, limit)
        ways = list_thresholds(scores, gamma, early_end, limit)
        found[gamma] = {
            "alpha": metrics.alpha and list(metrics.alpha),
            "block_efficiency": list(metrics.block_efficiency),
            "round_cost": costs.find_round_cost(gamma),
            "predicted_speedup": costs.predict_speedup(metrics.block_efficiency.value, gamma),
            "predicted_by_p_min": {
                way.threshold: [metrics.tokens.sum() / cost.sum() for cost in reversed(way.price(costs))]
                for way in ways
            },
        }
    return {"costs": asdict(costs), "by_num_draft_tokens": found}


def list_request_speedups(observation: Observation) -> np.ndarray:
    """Seconds of a whole request without the draft over those with it, prompt included, for each prompt `(P,)`."""
    plain = {one.row: one.request_seconds for one in observation.plain_requests}
    return np.array([plain[one.row] / one.request_seconds for one in observation.requests])


def keep(found: dict[str, Any], requests: Path, folder: Path) -> None:
    """Writes the result and the raw answers where the project keeps them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{found['name']}.json").write_text(json.dumps(found, indent=1) + "\n")
    with (
        (folder / f"{found['name']}.jsonl.gz").open("wb") as file,
        gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed,
    ):
        packed.write(requests.read_bytes())


def measure(arguments: argparse.Namespace, kind: str, num_draft_tokens: int) -> dict[str, Any]:
    """Asks both servers all prompts of the part; returns the medians over prompts."""
    folder = arguments.work_dir / arguments.domain
    target, draft = find_models(arguments)
    files = [make_gguf(model, folder, arguments.quantization) for model in (target, draft)]
    tokenizer = AutoTokenizer.from_pretrained(target)
    name = f"{arguments.run}-{arguments.phase}" if kind == "draft" else kind
    name = f"{name}-{arguments.quantization}-{num_draft_tokens}-{arguments.threads}t-{arguments.part}"
    name += f"-pmin{arguments.p_min:g}" if kind == "draft" and arguments.p_min else ""
    name += "-schema" * arguments.json_schema
    name += f"-batch{arguments.batch}" * (arguments.batch > 1)
    output = folder / "measured" / name
    options = {"threads": arguments.threads, "parallel": arguments.batch}
    files_of_draft = {"draft": files[1], "num_draft_tokens": num_draft_tokens} if kind == "draft" else {}
    shared = [*METRICS, *arguments.server_flags.split()]
    flags = [flag.format(n=num_draft_tokens) for flag in SPECULATION[kind]]
    if kind == "draft" and arguments.p_min:
        flags += ["--spec-draft-p-min", f"{arguments.p_min:g}"]
    with (
        run_llama_server(files[0], output / "plain.log", flags=shared, **options) as plain,
        run_llama_server(
            files[0], output / "draft.log", flags=[*shared, *flags], **files_of_draft, **options
        ) as drafting,
    ):
        observation = observe_serving(
            drafting.url,
            load_prompts(arguments, folder),
            processing_class=tokenizer,
            plain_url=plain.url,
            serving_engine="llama.cpp",
            model=arguments.domain,
            max_new_tokens=MAX_NEW_TOKENS,
            num_assistant_tokens=num_draft_tokens,
            concurrency=arguments.batch,
            assistant_confidence_threshold=arguments.p_min if kind == "draft" else 0.0,
            server_kwargs={"extra_body": {"cache_prompt": False}, "timeout": 600},
            output_dir=output / "requests",
        )
    found = {
        "name": name,
        "requests": len(observation.requests),
        "equal_texts": observation.num_equal_completions,
        "speedup": list(observation.speedup),
        "request_speedup": list(bootstrap_median(list_request_speedups(observation))),
    }
    if kind == "draft":
        model = AutoModelForCausalLM.from_pretrained(draft, dtype="float32")
        costs = time_rounds(arguments, range(1, num_draft_tokens + 1), output / "costs")
        report = compare_observed(observation, model, None, costs=costs, processing_class=tokenizer)
        save_observed(report, output)
        found["predicted_speedup"] = report.predicted_speedup and list(report.predicted_speedup)
        found["metrics"] = {
            one.name: [list(one.observed), one.predicted and list(one.predicted)] for one in report.metrics
        }
    keep(found, output / "requests" / "requests.jsonl", KEPT / arguments.domain / "measured")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domain", choices=DOMAINS, required=True)
    parser.add_argument("--run", required=True, help="Folder of the draft's run, such as 192x4-seed0.")
    parser.add_argument("--phase", default="train", help="Phase after which the draft is measured (default: train).")
    parser.add_argument("--kinds", nargs="+", choices=SPECULATION, default=["draft"])
    parser.add_argument("--choose", action="store_true", help="Predict on the validation responses, and ask nothing.")
    parser.add_argument("--part", choices=("validation", "test"), default="test")
    parser.add_argument("--num_prompts", type=int, default=1000, help="Number of prompts, the first ones.")
    parser.add_argument("--num_draft_tokens", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--quantization", choices=("f16", "bf16", "Q8_0"), default="f16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--server_flags", default="", help="More flags of both servers, such as --no-repack.")
    parser.add_argument(
        "--p_min", type=float, default=0.0, help="Probability below which a draft ends (default: 0, nowhere)."
    )
    parser.add_argument("--batch", type=int, default=1, help="Requests at a time (default: 1).")
    parser.add_argument("--json_schema", action="store_true", help="Hold completions to calls of the prompt's tools.")
    parser.add_argument("--cores", type=int, nargs="+", default=[0])
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/smollm2"))
    arguments = parser.parse_args()
    os.sched_setaffinity(0, arguments.cores)
    if arguments.choose:
        print(json.dumps(choose(arguments), indent=1))
        return
    for kind in arguments.kinds:
        for num_draft_tokens in arguments.num_draft_tokens:
            print(json.dumps(measure(arguments, kind, num_draft_tokens)), flush=True)


if __name__ == "__main__":
    main()
