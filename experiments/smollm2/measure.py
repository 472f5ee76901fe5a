"""Tokens per second of llama-server with a draft and without it, prompt by prompt, beside what replay predicts.

    python -m experiments.smollm2.measure --domain function_calling --run 192x4-seed0 --part validation
    python -m experiments.smollm2.measure --domain function_calling --run 192x4-seed0 --part test --num_draft_tokens 3

Two servers share the same cores and answer each prompt in turn, so that other work on the machine slows both. Shape,
drafted tokens and threads are chosen on the 50 validation prompts; the test prompts are asked once. The answers lie in
`<work_dir>/<domain>/measured`, where a killed run continues.
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.serving.llama_cpp import find_tools, run_llama_server
from experiments.smollm2.score_text import load_responses
from spec_kd import compare_observed, export_gguf, measure_server_costs, observe_serving, save_observed

MAX_NEW_TOKENS = 128
CONTEXT_LENGTH = 448  # tokens of the middle prompt
SPECULATION: dict[str, Sequence[str]] = {
    "draft": (),
    # What followed the last earlier occurrence of the last two tokens
    "ngram": ("--spec-type", "ngram-simple", "--spec-ngram-simple-size-n", "2", "--spec-ngram-simple-size-m", "{n}"),
}
"""Flags of llama-server for each way to propose tokens; those of a draft come from the engine's record."""


def measure(arguments: argparse.Namespace, kind: str, num_draft_tokens: int) -> dict[str, Any]:
    """Asks both servers all prompts of the part; returns the medians over prompts."""
    folder = arguments.work_dir / arguments.domain
    target = arguments.work_dir / "target" if arguments.domain == "general" else folder / "target"
    draft = folder / arguments.run / arguments.phase
    files = [
        export_gguf(
            model,
            model.with_name(f"{model.name}-{arguments.quantization}.gguf"),
            llama_cpp_dir=find_tools(),
            quantization=arguments.quantization,
        )
        for model in (target, draft)
    ]
    tokenizer = AutoTokenizer.from_pretrained(target)
    prompts = load_responses(folder, arguments.part).select_columns(["prompt"])
    prompts = prompts.select(range(min(arguments.num_prompts, len(prompts))))
    name = f"{arguments.run}-{arguments.phase}" if kind == "draft" else kind
    name = f"{name}-{arguments.quantization}-{num_draft_tokens}-{arguments.threads}t-{arguments.part}"
    output = folder / "measured" / name
    options = {"threads": arguments.threads}
    flags = [flag.format(n=num_draft_tokens) for flag in SPECULATION[kind]]
    with (
        run_llama_server(files[0], output / "plain.log", **options) as plain,
        run_llama_server(
            files[0],
            output / "draft.log",
            draft=files[1] if kind == "draft" else None,
            num_draft_tokens=num_draft_tokens,
            flags=flags,
            **options,
        ) as drafting,
    ):
        observation = observe_serving(
            drafting.url,
            prompts,
            processing_class=tokenizer,
            plain_url=plain.url,
            serving_engine="llama.cpp",
            max_new_tokens=MAX_NEW_TOKENS,
            num_assistant_tokens=num_draft_tokens,
            server_kwargs={"extra_body": {"cache_prompt": False}, "timeout": 600},
            output_dir=output / "requests",
        )
    found = {"name": name, "speedup": list(observation.speedup), "requests": len(observation.requests)}
    if kind == "draft":
        model = AutoModelForCausalLM.from_pretrained(draft, dtype="float32")
        costs = measure_server_costs(
            files[1],
            files[0],
            server=str(find_tools() / "bin" / "llama-server"),
            server_flags=f"--threads {arguments.threads} --threads-batch {arguments.threads}",
            context_length=CONTEXT_LENGTH,
            gammas=[num_draft_tokens],
            output_dir=output / "costs",
        )
        report = compare_observed(observation, model, None, costs=costs, processing_class=tokenizer)
        save_observed(report, output)
        found["predicted_speedup"] = report.predicted_speedup and list(report.predicted_speedup)
        found["metrics"] = {
            one.name: [list(one.observed), one.predicted and list(one.predicted)] for one in report.metrics
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domain", choices=("function_calling", "biology", "general"), required=True)
    parser.add_argument("--run", required=True, help="Folder of the draft's run, such as 192x4-seed0.")
    parser.add_argument("--phase", default="train", help="Phase after which the draft is measured (default: train).")
    parser.add_argument("--kinds", nargs="+", choices=SPECULATION, default=["draft"])
    parser.add_argument("--part", choices=("validation", "test"), required=True)
    parser.add_argument("--num_prompts", type=int, default=1000, help="Number of prompts, the first ones.")
    parser.add_argument("--num_draft_tokens", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--quantization", choices=("f16", "Q8_0"), default="f16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cores", type=int, nargs="+", default=[0])
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/smollm2"))
    arguments = parser.parse_args()
    os.sched_setaffinity(0, arguments.cores)
    for kind in arguments.kinds:
        for num_draft_tokens in arguments.num_draft_tokens:
            print(json.dumps(measure(arguments, kind, num_draft_tokens)), flush=True)


if __name__ == "__main__":
    main()
