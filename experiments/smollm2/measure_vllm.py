"""What vLLM on the CPU accepts of a draft's tokens, beside what replay predicts on the texts that it wrote.

    python -m experiments.smollm2.measure_vllm --domain function_calling --run 192x8-seed0

Acceptance alone: nobody serves with its CPU build, so its speed says nothing. The answers lie in
`<work_dir>/<domain>/measured`, where a killed run continues.
"""

import argparse
import json
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.serving.run_commands import list_places, start, wait_for_server
from experiments.smollm2.conversations import DOMAINS, KEPT
from experiments.smollm2.keep_draft import find_models
from experiments.smollm2.measure import MAX_NEW_TOKENS, keep
from experiments.smollm2.score_text import load_responses
from spec_kd import compare_observed, observe_serving, serving_commands

PORT = 8124
# In float32, where the texts and the counts have to be those of replay
FLAGS = (
    "--served-model-name target --port {port} --dtype float32 --enforce-eager --max-model-len 1024 --max-num-seqs 8 "
    "--no-enable-prefix-caching --generation-config vllm --per-request-spec-decode-metrics detailed"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domain", choices=DOMAINS, required=True)
    parser.add_argument("--run", required=True, help="Folder of the draft's run, such as 192x8-seed0.")
    parser.add_argument("--phase", default="train", help="Phase after which the draft is measured (default: train).")
    parser.add_argument("--num_prompts", type=int, default=100, help="Number of test prompts (default: 100).")
    parser.add_argument("--num_draft_tokens", type=int, default=3)
    parser.add_argument("--cores", default="0", help="Cores of the server, such as 0,1 (default: 0).")
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/smollm2"))
    arguments = parser.parse_args()

    folder = arguments.work_dir / arguments.domain
    target, draft = find_models(arguments)
    tokenizer = AutoTokenizer.from_pretrained(target)
    prompts = load_responses(folder, "test").select_columns(["prompt"])
    prompts = prompts.select(range(min(arguments.num_prompts, len(prompts))))
    name = f"{arguments.run}-{arguments.phase}-{arguments.num_draft_tokens}"
    output = folder / "measured" / f"vllm-{name}"
    output.mkdir(parents=True, exist_ok=True)
    command = serving_commands(str(draft.resolve()), str(target.resolve()), arguments.num_draft_tokens)["vllm"]
    command = f"taskset -c {arguments.cores} {command} {FLAGS.format(port=PORT)}"
    url, log = f"http://127.0.0.1:{PORT}", output / "server.log"
    with start(command, list_places()["vllm"], output, log) as process:
        wait_for_server(process, url, log)
        observation = observe_serving(
            url,
            prompts,
            processing_class=tokenizer,
            model="target",
            max_new_tokens=MAX_NEW_TOKENS,
            concurrency=8,
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
    }
    keep(found, output / "requests" / "requests.jsonl", KEPT / arguments.domain / "vllm")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
