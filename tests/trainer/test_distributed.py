"""Two gloo processes on the CPU give the losses and weights of one process: DDP, ZeRO-2, ZeRO-3."""

import json
import os
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch
from datasets import concatenate_datasets
from tiny import build_llama, build_tokenizer
from transformers import AutoModelForCausalLM

from spec_kd.data.responses import generate_responses

SCRIPT = Path(__file__).parent / "distributed_run.py"
STAGES = (2, 3)
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "CI": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONFAULTHANDLER": "1",  # an abort outside Python says where it was
}


def launch(*command: object, **environment: str) -> None:
    paths = os.pathsep.join([str(SCRIPT.parents[1]), str(SCRIPT.parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, **ENVIRONMENT, **environment}
    arguments = [sys.executable, "-m", *map(str, command)]
    check(subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=600))


def check(result: subprocess.CompletedProcess) -> None:
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]


@pytest.fixture(scope="module")
def responses(tmp_path_factory):
    """Training and evaluation sets with the signal of a teacher that is not there later.

    The first batch of rank 0 has longer completions than that of rank 1; those held out are equally long, since
    evaluation is a mean over batches.
    """
    folder = tmp_path_factory.mktemp("responses")
    teacher = build_llama(seed=1, vocab_size=288, hidden_size=48, layers=3)
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
def single_process(tmp_path_factory, responses):
    output = tmp_path_factory.mktemp("single") / "single.pt"
    check(forked.run(SCRIPT, output, 8, responses, **ENVIRONMENT))
    return torch.load(output)


def assert_same(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys() == {"even", "uneven", "masked", "parallel", "online", "streaming", "cached"}
    for case in expected:
        for name in ("losses", "alphas", "evaluation_losses", "block_efficiencies", "alphas_t1"):
            assert len(expected[case][name]) == 2, name  # two steps; evaluations before training and after
            assert actual[case][name] == pytest.approx(expected[case][name], rel=1e-4), (case, name)
        weights = expected[case]["weights"]
        assert actual[case]["weights"].keys() | {"lm_head.weight"} == weights.keys() | {"lm_head.weight"}  # tied
        for name, value in actual[case]["weights"].items():
            message = f"{case}, {name}: "
            torch.testing.assert_close(value, weights[name], rtol=1e-4, atol=1e-5, msg=lambda m, h=message: h + m)


def assert_saved_aligned(output: Path, weights: dict[str, torch.Tensor]) -> None:
    """What `save_model` wrote is one draft with the target's rows, and the trained weights of the real ids."""
    draft = AutoModelForCausalLM.from_pretrained(f"{output}.run")
    assert draft.config.vocab_size == 288
    rows = draft.get_input_embeddings().weight[:261]
    torch.testing.assert_close(rows, weights["model.embed_tokens.weight"], rtol=1e-4, atol=1e-5)


def test_ddp_equals_one_process(tmp_path, single_process, responses):
    output = tmp_path / "ddp.pt"
    launcher = ["torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    launch(*launcher, "--rdzv_endpoint", "localhost:0", SCRIPT, output, 4, responses)
    assert_same(torch.load(output), single_process)
    assert_saved_aligned(output, single_process["cached"]["weights"])  # the last case's


@pytest.fixture(scope="module")
def zero_outputs(tmp_path_factory, responses):
    """Results by ZeRO stage, of one launch: the processes take long to start."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("zero")
    configs = {stage: folder / f"stage_{stage}.json" for stage in STAGES}
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
    launcher = ["accelerate.commands.launch", "--use_deepspeed", "--deepspeed_config_file", configs[2]]
    launcher += ["--num_processes", "2", "--main_process_port", "0"]
    environment = {"DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(folder / "extensions")}
    launch(*launcher, SCRIPT, folder / "zero.pt", 4, responses, *configs.values(), **environment)
    assert not (folder / "extensions").exists()  # nothing was compiled
    return {stage: Path(f"{path}.pt") for stage, path in configs.items()}


@pytest.mark.parametrize("stage", STAGES)
def test_zero_equals_one_process(zero_outputs, single_process, stage):
    output = zero_outputs[stage]
    assert_same(torch.load(output), single_process)
    assert_saved_aligned(output, single_process["cached"]["weights"])  # the last case's
