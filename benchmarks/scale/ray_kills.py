"""Completions on a Ray cluster whose workers, nodes and drivers are killed, against a run that nobody disturbs.

    python -m benchmarks.scale.ray_kills --work_dir outputs/ray_kills

It starts a cluster of a head and two nodes on this machine, and completes the same prompts five times. Each run loses
two workers, two nodes and two drivers, in an order and after numbers of shards that its seed decides: 30 kills
(SIGKILL) in all. Every file of a run must have the bytes of a run in one process. A stopped benchmark continues with
the next run.
"""

import argparse
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import ray
import torch
from ray.cluster_utils import Cluster
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.harness import describe_machine, keep_part
from spec_kd import RayEngine, generate_responses

OUTPUT = Path("benchmarks/results/scale/ray_kills.json")
NUM_RUNS, KILLS = 5, ("worker", "node", "driver") * 2
NUM_PROMPTS, NUM_SHARDS = 96, 24
OPTIONS = {"max_new_tokens": 64, "teacher_signal": "sampled_logprobs", "batch_size": 2, "shard_size": 4}
NODE = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
PATIENCE_SECONDS, POLL_SECONDS = 900.0, 0.02


def build_target(folder: Path, num_heads: int = 4) -> None:
    """A tiny target with random weights and a tokenizer of bytes."""
    alphabet = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={text: id for id, text in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(alphabet), hidden_size=64, intermediate_size=128, num_hidden_layers=4,
        num_attention_heads=num_heads, max_position_embeddings=256, initializer_range=0.1, bos_token_id=None,
        eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def complete(target: str, folder: str, address: str | None = None) -> None:
    """Completes the prompts, in this process or on a cluster."""
    prompts = [f"Question {number}: {'why ' * (number % 7)}" for number in range(NUM_PROMPTS)]
    run = partial(generate_responses, prompts=prompts, output_dir=folder, show_progress=False, **OPTIONS)
    if address is None:
        run(target)
        return
    with RayEngine(target, num_workers=2, ray_address=address) as engine:
        run(engine)


def read_files(folder: Path) -> dict[str, bytes]:
    """The bytes of every file of a run by its name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def has_shards(folder: Path, count: int) -> bool:
    """Whether so many shards are whole."""
    return count_shards(folder) >= count


def count_shards(folder: Path) -> int:
    """Number of shards that are whole."""
    return len(list(folder.glob(".shards/*.arrow.sha256")))


def wait_for(find: Callable[[], Any], what: str) -> Any:
    """What `find` returns once it is true."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (found := find()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} took more than {PATIENCE_SECONDS:.0f} seconds.")
        time.sleep(POLL_SECONDS)
    return found


def list_workers() -> list[psutil.Process]:
    """The processes of our workers that are at work: children of the nodes, which are children of this process."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[0].startswith("ray::Worker"):
                found.append(process)
        except (psutil.Error, IndexError):
            continue
    return found


def run_once(number: int, cluster: Cluster, target: Path, expected: dict[str, bytes], folder: Path) -> dict:
    """One run with its kills: what was killed when, and whether every file is as expected."""
    shutil.rmtree(folder, ignore_errors=True)
    chance = random.Random(number)
    moments = sorted(chance.sample(range(1, NUM_SHARDS - 2), len(KILLS)))
    kills = [
        {"kill": kill, "after_shards": moment}
        for kill, moment in zip(chance.sample(KILLS, len(KILLS)), moments, strict=True)
    ]

    def start_driver() -> Any:
        context = get_context("forkserver")
        context.set_forkserver_preload(["benchmarks.scale.ray_kills"])
        driver = context.Process(target=complete, args=(str(target), str(folder), cluster.address))
        driver.start()
        return driver

    driver = start_driver()
    for kill in kills:
        wait_for(partial(has_shards, folder, kill["after_shards"]), "A shard")
        if kill["kill"] == "worker":
            chance.choice(wait_for(list_workers, "A worker's start")).send_signal(signal.SIGKILL)
        elif kill["kill"] == "node":
            nodes = sorted(cluster.worker_nodes, key=lambda node: node.unique_id)
            cluster.remove_node(chance.choice(nodes), allow_graceful=False)
            cluster.add_node(**NODE, num_cpus=1)
        else:
            driver.kill()
            driver.join()
            driver = start_driver()
        kill["found_shards"] = count_shards(folder)
        print(f"run {number}: killed a {kill['kill']} after {kill['found_shards']} of {NUM_SHARDS} shards", flush=True)
    driver.join(PATIENCE_SECONDS)
    found = read_files(folder)
    return {
        "seed": number,
        "kills": kills,
        "driver_exit_status": driver.exitcode,
        "num_files": len(found),
        "differing_files": sorted(name for name in found.keys() | expected if found.get(name) != expected.get(name)),
    }


def main() -> None:
    """Runs what is not done yet, and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/ray_kills"), help="Where the parts are kept.")
    work_dir = parser.parse_args().work_dir.resolve()
    target, whole = work_dir / "target", work_dir / "whole"
    work_dir.mkdir(parents=True, exist_ok=True)
    if not (target / "config.json").exists():
        build_target(target)
    complete(str(target), str(whole))
    expected = read_files(whole)
    assert count_shards(whole) == NUM_SHARDS
    # workers import this checkout, and get time beside other programs
    os.environ |= {"PYTHONPATH": os.getcwd(), "RAY_worker_niceness": "0"}
    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "num_cpus": 0})
    for _ in range(2):
        cluster.add_node(**NODE, num_cpus=1)
    runs = [
        keep_part(
            work_dir / f"run{number}.json",
            partial(run_once, number, cluster, target, expected, work_dir / f"run{number}"),
        )
        for number in range(NUM_RUNS)
    ]
    cluster.shutdown()
    kills = [kill["kill"] for run in runs for kill in run["kills"]]
    record = {
        "machine": {**describe_machine(), "ray": ray.__version__},
        "num_kills": {name: kills.count(name) for name in sorted(set(kills))},
        "num_shards": NUM_SHARDS,
        "num_files": len(expected),
        "all_files_are_the_same": not any(run["differing_files"] for run in runs),
        "runs": runs,
    }
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: value for name, value in record.items() if name not in ("machine", "runs")}))


if __name__ == "__main__":
    main()
