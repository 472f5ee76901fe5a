"""vLLM in the workers of a Ray cluster, against vLLM in one process: the same rows, also when a worker is killed.

    benchmarks/scale/build_ray_vllm.sh
    PYTHONPATH=. ~/.cache/spec_kd/tools/ray_vllm/.venv/bin/python -m benchmarks.scale.ray_vllm --work_dir outputs/ray

A cluster of two nodes is started on this machine, and each node's worker runs vLLM's build for CPUs. One worker is
killed (SIGKILL) after two shards.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
import vllm
from datasets import Dataset
from ray.cluster_utils import Cluster
from transformers import AutoTokenizer

from benchmarks.harness import describe_machine
from benchmarks.scale.ray_kills import NODE, build_target, count_shards, has_shards, list_workers, wait_for
from benchmarks.serving.record_vllm import WORKER as VLLM
from spec_kd import RayEngine, VLLMEngine, generate_responses

OUTPUT = Path("benchmarks/results/scale/ray_vllm.json")
NUM_PROMPTS, SHARD_SIZE = 32, 4
KILLED_AFTER = 2  # shards


def make_engine(target: str) -> VLLMEngine:
    return VLLMEngine(target, dtype="float32", enforce_eager=True, max_model_len=128)


def complete(target: str, folder: str, address: str | None = None) -> None:
    """Completes the prompts greedily with vLLM, in this process or on a cluster."""
    prompts = [f"Question {number}: {'why ' * (number % 7)}" for number in range(NUM_PROMPTS)]
    run = partial(
        generate_responses,
        prompts=prompts,
        processing_class=AutoTokenizer.from_pretrained(target),
        max_new_tokens=32,
        teacher_signal="top_k_tail",
        signal_top_k=8,
        output_dir=folder,
        shard_size=SHARD_SIZE,
        show_progress=False,
    )
    if address is None:
        run(make_engine(target))
        return
    with RayEngine(partial(make_engine, target), num_workers=2, ray_address=address) as engine:
        run(engine)


def start(*arguments: str) -> subprocess.Popen[bytes]:
    """A process of its own that completes the prompts, so that vLLM's processes end with it."""
    return subprocess.Popen([sys.executable, "-m", "benchmarks.scale.ray_vllm", "--complete", *arguments])


def compare(first: Dataset, second: Dataset) -> dict[str, Any]:
    """Whether the rows answer the same prompts in the same order, and how many completions have the same ids."""
    columns = ("prompt_ids", "completion_ids")
    equal = {name: [one == other for one, other in zip(first[name], second[name], strict=True)] for name in columns}
    return {"equal_prompts": sum(equal["prompt_ids"]), "equal_completions": sum(equal["completion_ids"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work_dir", type=Path, required="--complete" not in sys.argv, help="Folder of the runs; they continue there."
    )
    parser.add_argument("--complete", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.complete:
        complete(*arguments.complete)
        return
    work_dir = arguments.work_dir.resolve()
    target, whole, shared = work_dir / "target", work_dir / "whole", work_dir / "shared"
    work_dir.mkdir(parents=True, exist_ok=True)
    if not (target / "config.json").exists():
        build_target(target, num_heads=1)  # vLLM's attention on CPUs begins at 32 values a head
    # Workers import this checkout and run vLLM as the benchmarks of servers do
    os.environ |= {"PYTHONPATH": os.getcwd(), "RAY_worker_niceness": "0", **VLLM.environment}
    if start(str(target), str(whole)).wait():
        raise RuntimeError("vLLM alone failed; its messages are above.")
    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "num_cpus": 0})
    for _ in range(2):
        cluster.add_node(**NODE, num_cpus=1)
    driver = start(str(target), str(shared), cluster.address)
    wait_for(partial(has_shards, shared, KILLED_AFTER), "A shard")
    list_workers()[0].send_signal(signal.SIGKILL)
    killed_after = count_shards(shared)
    if driver.wait():
        raise RuntimeError("The run on Ray failed; its messages are above.")
    cluster.shutdown()
    rows = [Dataset.from_parquet(str(folder / "responses.parquet")) for folder in (whole, shared)]
    record = {
        "machine": {**describe_machine(), "ray": ray.__version__, "vllm": vllm.__version__, "torch": torch.__version__},
        "rows": len(rows[1]),
        "shards": NUM_PROMPTS // SHARD_SIZE,
        "worker_killed_after_shards": killed_after,
        **compare(*rows),
    }
    OUTPUT.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
