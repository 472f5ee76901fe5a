"""One small white-box run, started by `test_distributed.py` in one process or several; writes losses and weights.

Usage: distributed_run.py OUTPUT.pt BATCH_SIZE RESPONSES [DEEPSPEED_CONFIG.json ...]; every case of CASES runs, one
after the other, and does so with each of DeepSpeed's configs, whose output is DEEPSPEED_CONFIG.json.pt. The folder
RESPONSES has datasets `train` and `held_out` with a teacher signal, for the case "cached".
"""

import gc
import os
import sys

import torch
from datasets import Dataset, load_from_disk
from tiny import build_llama, build_tokenizer
from transformers import TrainerCallback

from spec_kd.evaluation import SpeculativeEvalCallback
from spec_kd.trainer import OnlineGKDConfig, OnlineGKDTrainer, WhiteBoxDistillConfig, WhiteBoxDistillTrainer

CASES = ("even", "uneven", "masked", "parallel", "online", "streaming", "cached")
MASK = 260
GREEDY = {"generation_temperature": 0.0, "max_new_tokens": 8}  # the same text in any layout
# every block, since processes choose at random for themselves; the last id is no token of its rows
PARALLEL = {"num_parallel_tokens": 3, "parallel_retention": 1.0}
ONLINE = {
    "online": {"lmbda": 1.0, **GREEDY},
    # every id that there is: a signal of draws would depend on which process served a request
    "streaming": {"mode": "streaming", "served_signal": "top_k_tail", "served_signal_size": 261, **GREEDY},
}


def build_rows(case: str, vocab_size: int) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index in range(16):
        length = 8 if case == "even" else int(torch.randint(3, 20, (1,), generator=generator))
        ids = torch.randint(5, vocab_size, (length,), generator=generator).tolist()
        # The first four rows are the first batch of rank 0.
        is_masked = case == "masked" and index < 4
        rows.append(
            {"input_ids": ids, "labels": [-100] * (length if is_masked else 2) + ([] if is_masked else ids[2:])}
        )
    return rows


class CompareRanks(TrainerCallback):
    """Fails the run when a rank's parameters differ from rank 0's: a gradient that was not synchronized."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if torch.distributed.is_initialized() and all(p.numel() for p in model.parameters()):
            total = torch.stack([p.detach().double().sum() for p in model.parameters()])
            others = [torch.zeros_like(total) for _ in range(torch.distributed.get_world_size())]
            torch.distributed.all_gather(others, total)
            assert all(torch.equal(total, other) for other in others), "the ranks' weights differ"


def choose_data(case: str, responses: str) -> dict:
    """Datasets, the callback, and a teacher unless the datasets have its signal."""
    if case == "cached":
        train, held_out = (load_from_disk(os.path.join(responses, name)) for name in ("train", "held_out"))
        return {"train_dataset": train, "eval_dataset": held_out, "callback": SpeculativeEvalCallback(held_out)}
    vocab_size = MASK if case == "parallel" else 261
    return {
        "train_dataset": Dataset.from_list(build_rows(case, vocab_size)),
        "eval_dataset": Dataset.from_list(build_rows("even", vocab_size)[:8]),
        "callback": SpeculativeEvalCallback([[{"role": "user", "content": "a"}]] * 3, max_new_tokens=8),
        "teacher_model": build_llama(seed=1, vocab_size=288, hidden_size=48, layers=3),
    }


def train(output_dir: str, case: str, batch_size: int, is_sharded: bool, responses: str) -> dict:
    is_online, tokenizer = case in ONLINE, build_tokenizer()
    config_class, trainer_class = (
        (OnlineGKDConfig, OnlineGKDTrainer) if is_online else (WhiteBoxDistillConfig, WhiteBoxDistillTrainer)
    )
    args = config_class(
        output_dir=output_dir, per_device_train_batch_size=batch_size, max_steps=2, learning_rate=0.5,
        optim="sgd", lr_scheduler_type="constant", max_length=None, train_sampling_strategy="sequential",
        gradient_checkpointing=False, report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True, bf16=False,
        use_cpu=not is_sharded, ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None, max_grad_norm=1e9,
        eval_strategy="steps", eval_steps=2, align_vocabulary=True,
        target_vocab_size=288 if case == "cached" else None,  # else read from the teacher
        **ONLINE.get(case, {}),
        **({**PARALLEL, "parallel_mask_token": tokenizer.convert_ids_to_tokens(MASK)} if case == "parallel" else {}),
    )  # fmt: skip
    data = choose_data(case, responses)
    trainer = trainer_class(
        model=build_llama(seed=0), args=args, processing_class=tokenizer,
        callbacks=[CompareRanks(), data.pop("callback")], **data,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    evaluations = [log for log in trainer.state.log_history if "eval_block_efficiency" in log]
    return {
        "evaluation_losses": [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log],
        "block_efficiencies": [log["eval_block_efficiency"] for log in evaluations],
        "alphas_t1": [log["eval_alpha_t1"] for log in evaluations],
        "losses": [log["loss"] for log in logs],
        "alphas": [log["alpha_upper_bound_on_data" if case == "streaming" else "alpha_on_data"] for log in logs],
        "weights": {name: value.detach().clone() for name, value in (weights or {}).items()},
    }


def main(output: str, batch_size: str, responses: str, *deepspeed_configs: str) -> None:
    if deepspeed_configs:
        import deepspeed.ops

        # A C++ compiler takes two minutes for DeepSpeed's all-reduce, and gloo's gives the same.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for config in deepspeed_configs or [None]:
        if config is not None:
            os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = config
            output = f"{config}.pt"
        results = {case: train(f"{output}.run", case, int(batch_size), config is not None, responses) for case in CASES}
        if int(os.environ.get("RANK", 0)) == 0:
            torch.save(results, output)
    if torch.distributed.is_initialized():
        # A rank that leaves while the other still works has aborted in its communication threads (seen once, ZeRO-3).
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    gc.freeze()  # every training collects garbage, and would walk all that imports leave
    main(*sys.argv[1:])
