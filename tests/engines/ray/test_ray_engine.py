"""Completions and scores by workers: on two nodes of a Ray cluster on this machine, and on a stand-in for Ray.

Every real worker has to import torch, so one test starts four of them.
"""

import contextlib
import json
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import forked
import psutil
import pytest
from datasets import Dataset
from ray_stand_in import StandIn
from recorded_vllm import LLM, OTHER, PLAIN, STOPPED, build_module
from tiny import build_llama, build_tokenizer

from spec_kd import RayEngine, generate_responses, score_completions
from spec_kd.cli.main import main
from spec_kd.data.shards import ShardStore
from spec_kd.engines import TransformersEngine, VLLMEngine

TEXTS = [f"{word} {i}" for i in range(8) for word in ("a", "hello there", "the quick brown fox")]
NUM_SHARDS = 12
SIGNAL = {"teacher_signal": "sampled_logprobs", "num_draws": 16, "batch_size": 2, "shard_size": 2}
SAMPLING = {"max_new_tokens": 12, "temperature": 1.0, **SIGNAL, "show_progress": False}


def build_slow(folder):
    """A target that takes its time, so that its driver can be killed in the middle."""
    engine = TransformersEngine(folder)
    generate = engine.generate
    engine.generate = lambda *call: time.sleep(0.3) or generate(*call)
    return engine


def build_dying(folder, notes):
    """A target whose first process is killed by its first batch; the two after it wait for each other."""
    engine = TransformersEngine(folder)
    generate, mine = engine.generate, notes / f"{os.getpid()}.started"
    mine.touch()

    def kill_the_first(*call):
        if list(notes.glob("*.started")) == [mine]:
            os.kill(os.getpid(), signal.SIGKILL)
        deadline = time.monotonic() + 120
        while len(list(notes.glob("*.started"))) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        return generate(*call)

    engine.generate = kill_the_first
    return engine


def list_living(notes):
    """The processes of `build_dying` that live."""
    found = []
    for path in notes.glob("*.started"):
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(int(path.stem)).status() != psutil.STATUS_ZOMBIE:
                found.append(path.stem)
    return found


def drive(address, target, folder):
    engine = RayEngine(partial(build_slow, target), num_workers=1, ray_address=address)
    generate_responses(engine, TEXTS, output_dir=folder, **SAMPLING)


def build_vllm():
    """A target in vLLM's stead, which answers what was recorded."""
    sys.modules["vllm"] = build_module()
    return VLLMEngine.from_llm(LLM(logprobs_mode="processed_logprobs"))


@pytest.fixture(scope="module")
def cluster():
    """A cluster of a head, where nothing is computed, and two nodes with one core each."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")  # else other tests that run now leave the workers no time
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # workers import this file
        node = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args={**node, "num_cpus": 0})
        for _ in range(2):
            cluster.add_node(**node, num_cpus=1)
        ray.init(cluster.address, log_to_driver=False)
        yield cluster
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("target"))
    build_llama(seed=1, hidden_size=48).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whole(target, tmp_path_factory):
    """Folder of the completions, and of their scores, of a run in this process."""
    folder = tmp_path_factory.mktemp("whole")
    rows = generate_responses(target, TEXTS, output_dir=str(folder / "responses"), **SAMPLING)
    score_completions(target, rows, output_dir=str(folder / "scores"), show_progress=False, **SIGNAL)
    return folder


def read_all(folder):
    """The bytes of every file of a run."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_vllm_in_workers_gives_the_same_rows(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)  # put back at the end
    prompts = Dataset.from_dict({"prompt_ids": [PLAIN, STOPPED, OTHER]})
    options = {
        "max_new_tokens": 4, "temperature": 0.7, "teacher_signal": "top_k_tail", "signal_top_k": 2, "shard_size": 1,
        "processing_class": build_tokenizer(), "show_progress": False,
    }  # fmt: skip
    expected = generate_responses(build_vllm(), prompts, **options)
    StandIn().install(monkeypatch)
    with RayEngine(build_vllm, num_workers=2) as engine:
        assert (engine.name, engine.is_reproducible, engine.default_batch_size) == ("vllm", False, None)
        found = generate_responses(engine, prompts, output_dir=str(tmp_path), **options)
    assert found.to_list() == expected.to_list()


def test_the_command_writes_the_same_bytes_with_workers(target, tmp_path, capsys, monkeypatch):
    StandIn().install(monkeypatch)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    options = ["respond", "--target", target, "--prompts", str(prompts), "--max_new_tokens", "6", "--shard_size", "8"]
    for name, more in {"alone": [], "workers": ["--num_workers", "2"]}.items():
        assert main([*options, "--output_dir", str(tmp_path / name), *more]) == 0, capsys.readouterr().err
    found = {name: read_all(tmp_path / name) for name in ("alone", "workers")}
    assert len(found["alone"]) > 4 and found["workers"].keys() == found["alone"].keys()
    assert [name for name in found["alone"] if found["alone"][name] != found["workers"][name]] == [".step.json"]


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_that_loses_its_driver_a_worker_and_a_node_ends_with_the_same_bytes(
    cluster, target, whole, tmp_path, monkeypatch, caplog
):
    folder = tmp_path / "responses"
    driver = forked.start(drive, cluster.address, target, str(folder))
    deadline = time.monotonic() + 120
    while len(kept := list(folder.glob(".shards/*.sha256"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    driver.kill()
    driver.join()
    assert driver.exitcode == -signal.SIGKILL and 2 <= len(kept) < NUM_SHARDS

    written, write = [], ShardStore.write

    def write_and_lose_a_node(store, shard, table):
        write(store, shard, table)
        written.append(shard)
        if len(written) == 1:
            living = list_living(tmp_path)
            assert len(living) == 2  # one on each node
            cluster.remove_node(cluster.worker_nodes.copy().pop(), allow_graceful=False)
            deadline = time.monotonic() + 120
            while list_living(tmp_path) == living and time.monotonic() < deadline:
                time.sleep(0.05)  # a worker outlives its node for some moments, and could do all that is left

    with RayEngine(partial(build_dying, target, tmp_path), num_workers=2) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(ShardStore, "write", write_and_lose_a_node)
            rows = generate_responses(engine, TEXTS, output_dir=str(folder), **SAMPLING)
        score_completions(engine, rows, output_dir=str(tmp_path / "scores"), show_progress=False, **SIGNAL)
    assert caplog.text.count("is lost") >= 2
    assert sorted(written) == sorted(set(range(NUM_SHARDS)) - {int(path.name[:5]) for path in kept})
    for name in ("responses", "scores"):
        assert read_all(tmp_path / name) == read_all(whole / name)
