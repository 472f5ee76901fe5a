"""What vLLM on the CPU accepts of a draft's tokens, beside what replay predicts on the texts that it wrote.

    python -m experiments.smollm2.measure_vllm --domain function_calling --run 192x8-seed0
    python -m experiments.smollm2.measure_vllm --domain function_calling --plain \\
        --run parallel/white_box-completions-4-seed0 --phase trained --num_draft_tokens 4

A draft may be autoregressive or parallel. With `--plain` each prompt is sent to a server without the draft as well, on
the same cores, one request after the other: tokens per second, of a build that nobody serves with. The answers lie in
`<work_dir>/<domain>/measured`, where a killed run continues.
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks.serving.run_commands import list_places, start, wait_for_server
from experiments.smollm2.conversations import DOMAINS, KEPT
from experiments.smollm2.keep_draft import find_models
from experiments.smollm2.measure import MAX_NEW_TOKENS, keep
from experiments.smollm2.score_text import load_responses
from spec_kd import compare_observed, observe_serving, serving_commands
from spec_kd.parallel import read_parallel_drafting

PORT, PLAIN_PORT = 8124, 8125
# In float32, where the texts and the counts have to be those of replay
FLAGS = (
    "--served-model-name target --port {port} --dtype float32 --enforce-eager --max-model-len 1024 --max-num-seqs 8 "
    "--no-enable-prefix-caching --generation-config vllm"
)
COUNTS = "--per-request-spec-decode-metrics detailed"  # refused without a draft


@contextmanager
def serve(command: str, port: int, cores: str, folder: Path) -> Iterator[str]:
    """Starts a server on some cores; returns its address when it answers."""
    url, log = f"http://127.0.0.1:{port}", folder / f"server-{port}.log"
    command = f"taskset -c {cores} {command} {FLAGS.format(port=port)}"
    with start(command, list_places()["vllm"], folder, log) as process:
        wait_for_server(process, url, log)
        yield url


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domain", choices=DOMAINS, required=True)
    parser.add_argument("--run", required=True, help="Folder of the draft's run, such as 192x8-seed0.")
    parser.add_argument("--phase", default="train", help="Phase after which the draft is measured (default: train).")
    parser.add_argument("--num_prompts", type=int, default=100, help="Number of test prompts (default: 100).")
    parser.add_argument("--num_draft_tokens", type=int, default=3)
    parser.add_argument("--plain", action="store_true", help="Ask a server without the draft as well, in turn.")
    parser.add_argument("--cores", default="0", help="Cores of the server, such as 0,1 (default: 0).")
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/smollm2"))
    arguments = parser.parse_args()

    folder = arguments.work_dir / arguments.domain
    target, draft = find_models(arguments)
    tokenizer = AutoTokenizer.from_pretrained(target)
    prompts = load_responses(folder, "test").select_columns(["prompt"])
    prompts = prompts.select(range(min(arguments.num_prompts, len(prompts))))
    name = f"{arguments.run}-{arguments.phase}-{arguments.num_draft_tokens}".replace("/", "-")
    name += "-plain" * arguments.plain
    output = folder / "measured" / f"vllm-{name}"
    output.mkdir(parents=True, exist_ok=True)
    is_parallel = read_parallel_drafting(AutoConfig.from_pretrained(draft)) is not None
    names = str(draft.resolve()), str(target.resolve())
    command = serving_commands(*names, arguments.num_draft_tokens, is_parallel=is_parallel)["vllm"]
    plain = serve(f"vllm serve {names[1]}", PLAIN_PORT, arguments.cores, output) if arguments.plain else nullcontext()
    with plain as plain_url, serve(f"{command} {COUNTS}", PORT, arguments.cores, output) as url:
        observation = observe_serving(
            url,
            prompts,
            processing_class=tokenizer,
            plain_url=plain_url,
            model="target",
            max_new_tokens=MAX_NEW_TOKENS,
            concurrency=1 if arguments.plain else 8,
            num_assistant_tokens=arguments.num_draft_tokens,
            output_dir=output / "requests",
        )
    model = AutoModelForCausalLM.from_pretrained(draft, dtype="float32")
    # vLLM counts tokens past the end of a text, which only the target knows
    whole = AutoModelForCausalLM.from_pretrained(target, dtype="float32")
    report = compare_observed(observation, model, whole, processing_class=tokenizer)
    found = {
        "name": name,
        "requests": len(observation.requests),
        "metrics": {one.name: [list(one.observed), one.predicted and list(one.predicted)] for one in report.metrics},
        "prompts_with_equal_counts": sum(
            (one.drafted, one.accepted) == (one.predicted_drafted, one.predicted_accepted) for one in report.prompts
        ),
    }
    if arguments.plain:
        found |= {"equal_texts": observation.num_equal_completions, "speedup": list(observation.speedup)}
    keep(found, output / "requests" / "requests.jsonl", KEPT / arguments.domain / "vllm")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
