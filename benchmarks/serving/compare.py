"""Sets what replay predicts beside what serving engines recorded, prompt by prompt.

    python -m benchmarks.serving.compare --data_dir DATA --work_dir outputs/serving [--engines llama.cpp vllm]

Replay reads the very tokens that the engine wrote, with the counting of that engine. Where a prompt differs, the gap
between the two largest logits of the target or the draft at the nearest call tells whether float rounding decided.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.serving import prompts as real
from benchmarks.serving.recordings import FOLDER, read_recording
from spec_kd.evaluation.response_replay import ReplayOptions, score_responses

FILES = {"llama.cpp": "llama_cpp.jsonl", "vllm": "vllm.jsonl"}
MAX_NEW_TOKENS = 64


def find_recording(engine: str, work_dir: Path) -> Path:
    """The newest recording of an engine: that of the working folder, else the one that the project keeps."""
    own = work_dir / "recordings" / FILES[engine]
    return own if own.exists() else FOLDER / f"{FILES[engine]}.gz"


def compare_setting(
    engine: str, setting: str, records: list[dict[str, Any]], ids: dict[str, list[int]], pair: tuple[Any, Any]
) -> dict[str, Any]:
    """Predicted and observed counts of one setting; greedy drafts leave nothing to chance but what follows the end."""
    draft, target = pair
    num_tokens = int(setting.rsplit("-", 1)[1])
    rows = [{"prompt_ids": ids[r["prompt"]["sha256"]], "completion_ids": r["completion_ids"]} for r in records]
    options = ReplayOptions(
        temperature=0.0 if setting.startswith("greedy") else 1.0,
        max_new_tokens=MAX_NEW_TOKENS,
        serving_engine=engine,
        draft_sampling="stochastic" if setting.startswith("probabilistic") else None,
    )
    scores = score_responses(draft, target, rows, options, num_past_end_tokens=num_tokens, description=setting)
    metrics = scores.replay(num_tokens, MAX_NEW_TOKENS)
    different = [
        {
            "row": i,
            "predicted": [round(float(metrics.accepted[i]), 3), round(float(metrics.drafted[i]), 3)],
            "observed": [r["accepted"], r["drafted"]],
            "tokens": len(r["completion_ids"]),
            "ended_by_eos": r["ended_by_eos"],
        }
        for i, r in enumerate(records)
        if (round(float(metrics.accepted[i]), 6), round(float(metrics.drafted[i]), 6)) != (r["accepted"], r["drafted"])
    ]
    return {
        "engine": engine,
        "setting": setting,
        "prompts": len(records),
        "equal": len(records) - len(different),
        "predicted": [round(float(metrics.accepted.sum()), 2), round(float(metrics.drafted.sum()), 2)],
        "observed": [sum(r["accepted"] for r in records), sum(r["drafted"] for r in records)],
        "different": different,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="Folder with <domain>/test.jsonl.")
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/serving"))
    parser.add_argument("--engines", nargs="+", choices=FILES, default=list(FILES))
    parser.add_argument("--output", type=Path, help="File for the comparison, JSON.")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.work_dir / "target")
    mixed, calls = real.select_prompts(arguments.data_dir, tokenizer)
    ids = {prompt.describe()["sha256"]: prompt.ids for prompt in [*mixed, *calls]}
    draft, target = (
        AutoModelForCausalLM.from_pretrained(arguments.work_dir / name, dtype=torch.float32)
        for name in ("draft", "target")
    )
    results = []
    for engine in arguments.engines:
        by_setting: dict[str, list[dict[str, Any]]] = {}
        for record in read_recording(find_recording(engine, arguments.work_dir)):
            by_setting.setdefault(record["setting"], []).append(record)
        for setting, records in by_setting.items():
            if not setting.endswith("-0") and not setting.startswith("schema"):
                results.append(compare_setting(engine, setting, records, ids, (draft, target)))
                print(json.dumps(results[-1]), flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
