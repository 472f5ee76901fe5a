"""What quantization does to acceptance: the pair as llama-server serves it, beside what float32 replay predicts.

    python -m benchmarks.serving.quantized --data_dir DATA --work_dir outputs/serving

Draft and target are exported with `export_gguf` in each type and asked the 48 prompts of the recordings: greedy, 4
drafted tokens, the server's defaults. The prediction is replay with the float32 draft, once on the very tokens that the
quantized target wrote, and once on those that llama-server wrote with the float32 target. A killed run continues.
"""

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.serving import prompts as real
from benchmarks.serving.compare import find_recording
from benchmarks.serving.llama_cpp import run_llama_server
from benchmarks.serving.models import make_gguf_pair
from benchmarks.serving.record_llama_cpp import MAX_NEW_TOKENS
from benchmarks.serving.recordings import read_recording
from spec_kd import compare_observed, observe_serving
from spec_kd.evaluation.report.content import to_plain
from spec_kd.files import write_text

README = Path(__file__).with_name("README.md")
TABLE = re.compile(r"(?<=<!-- quantized -->\n).*?(?=<!-- end -->)", re.S)
RESULTS = Path(__file__).parents[1] / "results" / "serving" / "quantized.json"
TYPES = ("f16", "Q8_0", "Q4_0", "Q4_K_M")
NUM_DRAFT_TOKENS = 4
PARALLEL = 8
# Without repacked weights no AMX kernel runs: in virtual machines that hide the permission, those stop the server
FLAGS = ["--cache-ram", "0", "--metrics", "--no-repack"]


def measure(
    quantization: str,
    prompts: list[real.Prompt],
    float_rows: list[dict[str, Any]],
    draft: torch.nn.Module,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Observed and predicted acceptance of the pair in one type."""
    folder = arguments.work_dir / "quantized"
    tokenizer = AutoTokenizer.from_pretrained(arguments.work_dir / "target")
    target, draft_file = make_gguf_pair(arguments.work_dir, quantization)
    with run_llama_server(
        target,
        folder / f"llama-server-{quantization}.log",
        draft=draft_file,
        num_draft_tokens=NUM_DRAFT_TOKENS,
        parallel=PARALLEL,
        context_length=1024,
        cores=arguments.cores,
        flags=FLAGS,
    ) as server:
        observation = observe_serving(
            server.url,
            [prompt.messages for prompt in prompts],
            processing_class=tokenizer,
            serving_engine="llama.cpp",
            model="target",
            max_new_tokens=MAX_NEW_TOKENS,
            concurrency=PARALLEL,
            num_assistant_tokens=NUM_DRAFT_TOKENS,
            output_dir=folder / quantization,
        )
    report = compare_observed(observation, draft, None, responses=float_rows, batch_size=4, show_progress=False)
    rate = report.metrics[0]
    same = sum(
        request.completion_ids == row["completion_ids"]
        for request, row in zip(observation.requests, float_rows, strict=True)
    )
    return {
        "quantization": quantization,
        "bytes": {"target": target.stat().st_size, "draft": draft_file.stat().st_size},
        "prompts": len(report.prompts),
        "tokens": sum(one.tokens for one in report.prompts),
        "accepted": sum(one.accepted or 0 for one in report.prompts),
        "drafted": sum(one.drafted or 0 for one in report.prompts),
        "predicted_accepted": sum(one.predicted_accepted or 0 for one in report.prompts),
        "predicted_drafted": sum(one.predicted_drafted or 0 for one in report.prompts),
        "acceptance_rate": to_plain(rate),
        "prompts_with_predicted_counts": report.num_equal,
        "completions_of_the_float_target": same,
        "by_prompt": [
            [one.drafted, one.accepted, one.predicted_drafted, one.predicted_accepted] for one in report.prompts
        ],
        "notes": report.notes,
    }


def tabulate(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The table of the README: one row for each type."""
    lines = [
        "",
        "| type | target, draft (MB) | accepted / drafted | acceptance rate | replay in float32, same tokens "
        "| difference | replay on the float target's tokens | its completions |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, one in sorted(results.items(), key=lambda pair: TYPES.index(pair[0])):
        sizes = ", ".join(f"{one['bytes'][role] / 1e6:.0f}" for role in ("target", "draft"))
        rate = one["acceptance_rate"]
        difference = rate["same_tokens"]
        cells = [
            f"`{name}`",
            sizes,
            f"{one['accepted']:,} / {one['drafted']:,}",
            f"{rate['observed']['value']:.4f}",
            f"{rate['predicted']['value']:.4f}",
            f"{difference['value']:+.4f} [{difference['low']:+.4f}, {difference['high']:+.4f}]",
            f"{rate['earlier']['value']:.4f}",
            f"{one['completions_of_the_float_target']} of {one['prompts']}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="Folder with <domain>/test.jsonl.")
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/serving"))
    parser.add_argument("--types", nargs="+", choices=TYPES, default=TYPES)
    parser.add_argument("--cores", nargs="+", type=int, help="Cores that the server may use (default: all).")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.work_dir / "target")
    prompts = real.select_prompts(arguments.data_dir, tokenizer).mixed
    recorded = {
        record["prompt"]["sha256"]: record["completion_ids"]
        for record in read_recording(find_recording("llama.cpp", arguments.work_dir))
        if record["setting"] == f"greedy-{NUM_DRAFT_TOKENS}"
    }
    float_rows = [
        {"prompt_ids": list(prompt.ids), "completion_ids": recorded[prompt.describe()["sha256"]]} for prompt in prompts
    ]
    draft = AutoModelForCausalLM.from_pretrained(arguments.work_dir / "draft", dtype=torch.float32)
    for quantization in arguments.types:
        result = measure(quantization, prompts, float_rows, draft, arguments)
        print(json.dumps({name: value for name, value in result.items() if name != "by_prompt"}), flush=True)
        results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
        results[quantization] = result
        write_text(RESULTS, json.dumps(results) + "\n")
        table = tabulate(results)
        write_text(README, TABLE.sub(lambda _, table=table: table, README.read_text(encoding="utf-8"), count=1))


if __name__ == "__main__":
    main()
