"""Lets transformers look drafts up in the text for real prompts, and records every pass of the target.

    python -m benchmarks.serving.record_transformers --data_dir DATA --work_dir outputs/serving

Transformers counts nothing itself, so the rounds are what went into each pass of the target and what came out of it. A
killed run continues after its last prompt. `--pack` writes the recording, compressed, where the project keeps it.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.serving import prompts as real
from benchmarks.serving.models import make_pair
from benchmarks.serving.recordings import Recording, pack, summarize
from spec_kd.evaluation.assisted import RecordedRun

MAX_NEW_TOKENS = 64
# 4 tokens that followed the first occurrence of the last 2, or else of the last one
SETTINGS: dict[str, dict[str, Any]] = {
    "ngram-4": {
        "prompt_lookup_num_tokens": 4,
        "max_matching_ngram_size": 2,
        "do_sample": False,
        "max_new_tokens": MAX_NEW_TOKENS,
    }
}


def ask(target: PreTrainedModel, prompt: real.Prompt, options: dict[str, Any]) -> dict[str, Any]:
    """What `generate` did for one prompt; rounds that found nothing are left out, as the servers leave them out."""
    run = RecordedRun(target, prompt.ids, 0, **options)
    rounds = [one for one in run.rounds if one.drafted]
    ended_by_eos = run.completion[-1] == target.generation_config.eos_token_id
    return {
        "completion_ids": run.completion,
        "stop_type": "eos" if ended_by_eos else "limit",
        "ended_by_eos": ended_by_eos,
        "drafted": sum(one.drafted for one in rounds),
        "accepted": sum(one.accepted for one in rounds),
        "drafted_per_round": [one.drafted for one in rounds],
        "accepted_per_round": [one.accepted for one in rounds],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="Folder with <domain>/test.jsonl.")
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/serving"))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--pack", action="store_true", help="Write the compressed recording into the project.")
    arguments = parser.parse_args()

    folder, _ = make_pair(arguments.work_dir)
    prompts = real.select_prompts(arguments.data_dir, AutoTokenizer.from_pretrained(folder))
    target = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    recording = Recording(arguments.work_dir / "recordings" / "transformers.jsonl")
    engine = {"engine": "transformers", "version": f"transformers {transformers.__version__}"}
    for setting in arguments.settings:
        options = SETTINGS[setting]
        for number, prompt in enumerate(prompts.get(setting)):
            if not recording.has(setting, prompt.describe()):
                answer = ask(target, prompt, options)
                recording.append(
                    {"setting": setting, "prompt": prompt.describe(), **answer, "request": options, **engine}
                )
                print(f"{setting} {number}: {answer['accepted']} of {answer['drafted']}", flush=True)
    for setting, total in summarize(recording.path).items():
        print(setting, total)
    if arguments.pack:
        print(pack(recording.path))


if __name__ == "__main__":
    main()
