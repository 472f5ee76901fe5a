"""FSDP2 in two processes that share one card, against one process: the losses of some steps.

    python -m benchmarks.shared_card                  # one GPU
    python -m benchmarks.shared_card --device cpu     # the same on a CPU; writes nothing

NCCL takes one process for each card, so gloo carries what the two exchange. Where it does not carry all that FSDP2
needs, the error is the result. Tiny models in float32 and SGD, so that the losses are the same but for rounding. Writes
shared_card.json to benchmarks/results.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"
NUM_STEPS, ROWS_OF_STEP, NUM_IDS = 5, 8, 512
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


def train(device: str) -> list[float]:
    """The losses of white-box training with a live target, in each process of the job."""
    import torch
    from accelerate import DistributedType, PartialState
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM

    from benchmarks.training_steps import build_tokenizer
    from spec_kd import WhiteBoxDistillConfig, WhiteBoxDistillTrainer

    num_processes = int(os.environ.get("WORLD_SIZE", 1))
    models = []
    for seed, layers in enumerate((2, 4)):
        torch.manual_seed(seed)
        shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": layers}
        models.append(LlamaForCausalLM(LlamaConfig(**shape, vocab_size=NUM_IDS, pad_token_id=0, eos_token_id=1)))
    ids = np.random.default_rng(0).integers(3, NUM_IDS, (NUM_STEPS * ROWS_OF_STEP, 24)).tolist()
    with tempfile.TemporaryDirectory() as folder:
        args = WhiteBoxDistillConfig(
            output_dir=folder, per_device_train_batch_size=ROWS_OF_STEP // num_processes, max_steps=NUM_STEPS,
            optim="sgd", learning_rate=0.5, lr_scheduler_type="constant", max_grad_norm=1e9, bf16=False,
            train_sampling_strategy="sequential", gradient_checkpointing=False, logging_steps=1, disable_tqdm=True,
            save_strategy="no", report_to="none", use_cpu=device == "cpu",
            ddp_backend="gloo" if num_processes > 1 else None,
        )  # fmt: skip
        if num_processes > 1 and device == "cpu":
            # accelerate looks for FSDP2 in processes with accelerators alone
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        trainer = WhiteBoxDistillTrainer(
            model=models[0],
            teacher_model=models[1],
            args=args,
            train_dataset=Dataset.from_list([{"input_ids": row, "labels": row} for row in ids]),
            processing_class=build_tokenizer(NUM_IDS),
        )
        assert trainer.is_fsdp_enabled == (num_processes > 1)
        trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def run(device: str, num_processes: int) -> dict[str, Any]:
    """Trains in so many processes, which all have the first card; returns the losses, or the end of what went wrong."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "benchmarks.shared_card", "--device", device, "--train"]
    processes = []
    for rank in range(num_processes):
        # As the processes of as many machines, each with this card
        job = {"RANK": rank, "WORLD_SIZE": num_processes, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
        own = {name: str(value) for name, value in job.items()} | {"MASTER_ADDR": "127.0.0.1", **FSDP}
        environment = {**os.environ, **(own if num_processes > 1 else {})}
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    answers = [process.communicate() for process in processes]
    for process, (_, errors) in zip(processes, answers, strict=True):
        if process.returncode:
            return {"error": errors.strip().splitlines()[-1][:500]}
    return {"losses": json.loads(answers[0][0].splitlines()[-1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        print(json.dumps(train(arguments.device)))
        return
    from benchmarks.harness import describe_machine

    found = {f"{count} processes": run(arguments.device, count) for count in (1, 2)}
    losses = [one.get("losses") for one in found.values()]
    is_equal = None not in losses and bool(np.allclose(*losses, rtol=1e-4))
    record = {"machine": describe_machine(), **found, "is_equal": is_equal}
    print(json.dumps(record))
    if arguments.device == "cuda":
        (RESULTS / "shared_card.json").write_text(json.dumps(record, indent=1) + "\n")
    sys.exit("error" in found["1 processes"])


if __name__ == "__main__":
    main()
