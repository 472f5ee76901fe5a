"""Two gloo processes on the CPU give the losses and weights of one process: DDP, FSDP2, ZeRO-2, ZeRO-3."""

import json
import os
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from datasets import concatenate_datasets
from tiny import build_llama, build_tokenizer
from transformers import AutoModelForCausalLM

from spec_kd.data.responses import generate_responses

SCRIPT = Path(__file__).parent / "distributed_run.py"
EXAMPLES = SCRIPT.parents[2] / "examples"
STAGES = (2, 3)
# Each machine of a job runs the command of `srun`, and knows its number.
SRUN = """#!/usr/bin/env bash
shift
SLURM_NODEID=0 "$@" & first=$!
SLURM_NODEID=1 "$@" & second=$!
wait $first && wait $second
"""
EVALUATED = {"even", "uneven", "masked", "parallel", "online", "streaming", "cached", "black_box"}
ADAMW = {"adamw", "adamw_lora_stored", "adamw_lora_black_box", "adamw_lora_sampled"}
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "CI": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONFAULTHANDLER": "1",  # an abort outside Python says where it was
}


def launch(*command: object, **environment: str) -> None:
    paths = os.pathsep.join([str(SCRIPT.parents[1]), str(SCRIPT.parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, **ENVIRONMENT, **environment}
    check(subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=600))


def check(result: subprocess.CompletedProcess) -> None:
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Draft and target, and training and evaluation sets with the signal of a teacher that is not there later.

    The first batch of rank 0 has longer completions than that of rank 1; those held out are equally long, since
    evaluation is a mean over batches.
    """
    folder = tmp_path_factory.mktemp("distributed")
    teacher = build_llama(seed=1, vocab_size=288, hidden_size=48, layers=3)
    teacher.save_pretrained(folder / "target")
    build_llama(seed=0).save_pretrained(folder / "draft")
    long, short = (
        generate_responses(
            teacher, [f"{i} and so on" for i in range(16)], processing_class=build_tokenizer(), max_new_tokens=length,
            temperature=1.0, teacher_signal="sampled_logprobs", num_draws=16, show_progress=False,
        )
        for length in (12, 5)
    )  # fmt: skip
    rows = [dataset.select(range(i, i + 4)) for i, dataset in ((0, long), (4, short), (8, long), (12, short))]
    concatenate_datasets(rows).save_to_disk(folder / "train")
    full = long.filter(lambda row: row["finish_reason"] == "length")
    full.select(range(8)).save_to_disk(folder / "held_out")
    return folder


@pytest.fixture(scope="module")
def single_process(folder):
    check(forked.run(SCRIPT, folder / "single", 8, folder, "plain", **ENVIRONMENT))
    return folder / "single.plain"


def assert_same(output: Path, single: Path) -> None:
    actual, expected = (torch.load(f"{path}.pt") for path in (output, single))
    assert actual.keys() == expected.keys() == EVALUATED | ADAMW
    for case, values in expected.items():
        is_evaluated = case in EVALUATED
        metrics = ("alphas", "evaluation_losses", "block_efficiencies", "alphas_t1") if is_evaluated else ()
        for name in ("losses", *metrics):
            # two steps and an evaluation before them and after, or twenty steps
            assert len(values[name]) == (2 if is_evaluated else 20), name
            assert actual[case][name] == pytest.approx(values[name], rel=1e-4), (case, name)
        saved, wanted = (AutoModelForCausalLM.from_pretrained(path / case).state_dict() for path in (output, single))
        assert saved.keys() == wanted.keys()
        assert saved["model.embed_tokens.weight"].shape[0] == 288  # the target's
        for name, value in saved.items():
            message, tolerance = f"{case}, {name}: ", 1e-5 if is_evaluated else 1e-4
            torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=tolerance, msg=lambda m, h=message: h + m)


@pytest.fixture(scope="module")
def job_outputs(folder):
    """Results of DDP and FSDP2, both of one job of two machines that SLURM would start."""
    programs = folder / "slurm"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", "#!/usr/bin/env bash\necho localhost\necho other\n")):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    environment = {
        "PATH": os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "SLURM_JOB_NODELIST": "nodes",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "1",
    }
    script, config = EXAMPLES / "slurm" / "two_nodes.sh", EXAMPLES / "accelerate" / "fsdp2.yaml"
    launch("bash", script, config, SCRIPT, folder / "job", 4, folder, "fsdp2", "plain", **environment)
    return folder / "job"


@pytest.mark.parametrize("layout", ["plain", "fsdp2"])
def test_a_job_of_two_machines_equals_one_process(job_outputs, single_process, layout):
    assert_same(Path(f"{job_outputs}.{layout}"), single_process)


@pytest.fixture(scope="module")
def zero_outputs(folder):
    """Results of both ZeRO stages, of one launch: the processes take long to start."""
    pytest.importorskip("deepspeed")
    configs = {stage: folder / f"zero{stage}.json" for stage in STAGES}
    for stage, path in configs.items():
        config = {
            "zero_optimization": {
                "stage": stage,
                "stage3_param_persistence_threshold": 0,  # else parameters this small would never be sharded
                "stage3_gather_16bit_weights_on_model_save": True,
            },
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        path.write_text(json.dumps(config))
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    launcher += ["--config_file", EXAMPLES / "accelerate" / "zero3.yaml", "--num_processes", "2"]
    environment = {"DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(folder / "extensions")}
    launch(*launcher, "--main_process_port", "0", SCRIPT, folder / "job", 4, folder, *configs.values(), **environment)
    assert not (folder / "extensions").exists()  # nothing was compiled
    return folder / "job"


@pytest.mark.parametrize("stage", STAGES)
def test_zero_equals_one_process(zero_outputs, single_process, stage):
    assert_same(Path(f"{zero_outputs}.zero{stage}"), single_process)


CONFIGS = {
    "ddp": ("MULTI_GPU", {}),
    "zero2": ("DEEPSPEED", {"zero_stage": 2}),
    "zero3": ("DEEPSPEED", {"zero_stage": 3}),
    "fsdp2": ("FSDP", {"fsdp_version": 2}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_what_its_name_says(name):
    kind, own = CONFIGS[name]
    config = load_config_from_file(str(EXAMPLES / "accelerate" / f"{name}.yaml"))
    assert config.distributed_type == kind and config.mixed_precision == "no"
    assert own.items() <= {**config.deepspeed_config, **config.fsdp_config}.items()
