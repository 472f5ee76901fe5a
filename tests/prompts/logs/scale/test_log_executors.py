"""datatrove's executors: two processes here, a Ray cluster, and jobs of SLURM."""

import json
import os
import subprocess
import sys

import pytest

from spec_kd.prompts.logs.options import LogOptions
from spec_kd.prompts.logs.query_logs import load_query_logs
from spec_kd.prompts.logs.scale.options import ScaleOptions

SLURM = {"partition": "cpu", "time": "1:00:00", "mem_per_cpu_gb": 3}


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    path = tmp_path_factory.mktemp("log") / "log.jsonl"
    texts = [f"Question {n % 150} about {['tea', 'chess', 'orbit', 'fern'][n % 4]} and {n % 7}?" for n in range(400)]
    path.write_text("".join(json.dumps({"messages": [{"role": "user", "content": text}]}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def whole(log, tmp_path_factory):
    """The result of tasks that run one after the other in this process."""
    folder = tmp_path_factory.mktemp("whole")
    load(log, folder, ScaleOptions(executor="local", num_tasks=2))
    return (folder / "train.arrow").read_bytes()


def load(log, folder, scale):
    return load_query_logs(log, folder, scale=scale, near_duplicate_threshold=0.95, show_progress=False)


def test_two_processes(log, whole, tmp_path):
    load(log, tmp_path, ScaleOptions(executor="local", num_tasks=2, num_workers=2))
    assert (tmp_path / "train.arrow").read_bytes() == whole


@pytest.mark.slow
def test_ray(log, tmp_path, monkeypatch):
    """One stage: Ray starts an actor for each task of each stage, which imports everything."""
    ray = pytest.importorskip("ray")
    from spec_kd.prompts.logs.scale.executors import Stages
    from spec_kd.prompts.logs.scale.reading import ReadShares
    from spec_kd.prompts.logs.scale.shares import cut_into_shares
    from spec_kd.prompts.logs.scale.work_folder import WorkFolder

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    scale = ScaleOptions(executor="ray", num_tasks=2, num_workers=2, executor_kwargs={"mem_per_cpu_gb": 0.1})
    work = WorkFolder(str(tmp_path / "work"), 2)
    stages = Stages(tmp_path / "stages", scale, show_progress=False)
    stages.add("read", 2, ReadShares(work, cut_into_shares([log], 2), LogOptions(), None))
    ray.init(num_cpus=2, object_store_memory=80 * 2**20, include_dashboard=False, log_to_driver=False)
    try:
        stages.run()
    finally:
        ray.shutdown()
    counts = [work.load_json("ledgers", part)["prompts"] for part in work.list_parts("ledgers")]
    assert sum(counts) == 400
    assert max(counts) - min(counts) < 10  # cut at half of the bytes, between lines


def write_command(folder, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_slurm(log, whole, tmp_path, monkeypatch):
    """Jobs are handed in once, in order; the same call goes on when they have ended, and returns the result."""
    import dill

    commands, folder = tmp_path / "bin", tmp_path / "out"
    commands.mkdir()
    calls = tmp_path / "calls"
    write_command(commands, "sbatch", f'echo "$@" >> {calls}; echo "Submitted batch job $(wc -l < {calls})"')
    write_command(commands, "squeue", "exit 0")
    write_command(commands, "scontrol", "echo node1")
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    scale = ScaleOptions(executor="slurm", num_tasks=2, num_workers=2, executor_kwargs=SLURM)
    with pytest.raises(RuntimeError, match="2 tasks of `logs-read` are not complete"):
        load(log, folder, scale)
    stages = sorted((folder / ".scale" / "stages").iterdir(), key=lambda path: int(path.name.split("-")[0]))
    scripts = [(stage / "launch_script.slurm").read_text() for stage in stages]
    for script, stage in zip(scripts, stages, strict=True):
        for line in ("--partition=cpu", "--time=1:00:00", "--mem-per-cpu=3G", f"launch_pickled_pipeline {stage}"):
            assert line in script
    assert "--array=0-1%2" in scripts[0]
    assert "--array=0-0%2" in scripts[-1]
    handed_in = [line for line in calls.read_text().splitlines() if "RUN_OFFSET" in line]
    assert len(handed_in) == len(stages)
    assert ["--dependency=afterok:" in line for line in handed_in] == [False] + [True] * (len(stages) - 1)

    monkeypatch.setenv("SLURM_NODELIST", "node1")
    for stage in stages:
        executor = dill.loads((stage / "executor.pik").read_bytes())
        for rank in range(executor.tasks):
            with monkeypatch.context() as context:
                context.setenv("SLURM_ARRAY_TASK_ID", str(rank))
                executor.run()
    load(log, folder, scale)
    assert (folder / "train.arrow").read_bytes() == whole
    assert len(calls.read_text().splitlines()) < 3 * len(stages)


def test_nothing_of_it_is_imported():
    code = (
        "import sys, spec_kd; from spec_kd import load_query_logs, ScaleOptions; "
        "print([name for name in ('datatrove', 'loguru', 'ray') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"


def test_without_datatrove(log, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "spec_kd.prompts.logs.scale.pipeline", None)
    with pytest.raises(ImportError, match=r"pip install spec_kd\[scale\]"):
        load(log, tmp_path, ScaleOptions(executor="local"))
    load(log, tmp_path, None)
