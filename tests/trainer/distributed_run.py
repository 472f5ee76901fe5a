"""Small runs of the trainers, started by `test_distributed.py` in one process or several; writes losses and weights.

Usage: distributed_run.py OUTPUT BATCH_SIZE FOLDER [LAYOUT ...]; every case of CASES runs in each layout, one after the
other. `OUTPUT.NAME.pt` has the losses of a layout, and `OUTPUT.NAME/CASE` the drafts. A layout is `plain` (one process,
or DDP), `fsdp2`, or DeepSpeed's config `NAME.json`. FOLDER has the datasets `train` and `held_out` with a teacher
signal, and the models `draft` and `target`.
"""

import gc
import os
import sys
from pathlib import Path

import pytest
import torch
from accelerate import DistributedType, PartialState
from datasets import Dataset, load_from_disk
from peft import LoraConfig
from tiny import build_llama, build_tokenizer
from transformers import TrainerCallback

from spec_kd.evaluation import SpeculativeEvalCallback
from spec_kd.heads import is_whole
from spec_kd.trainer import (
    BlackBoxSFTConfig,
    BlackBoxSFTTrainer,
    OnlineGKDConfig,
    OnlineGKDTrainer,
    WhiteBoxDistillConfig,
    WhiteBoxDistillTrainer,
)

MASK = 260
WHITE_BOX = (WhiteBoxDistillConfig, WhiteBoxDistillTrainer)
BLACK_BOX = (BlackBoxSFTConfig, BlackBoxSFTTrainer)
ONLINE = (OnlineGKDConfig, OnlineGKDTrainer)
GREEDY = {"generation_temperature": 0.0, "max_new_tokens": 8}  # the same text in any layout
# every block, since processes choose at random for themselves; the last id is no token of its rows
PARALLEL = {"num_parallel_tokens": 3, "parallel_retention": 1.0}
# every id that there is: a signal of draws would depend on which process served a request
STREAMING = {"mode": "streaming", "served_signal": "top_k_tail", "served_signal_size": 261}
EVALUATED = {
    "even": (WHITE_BOX, {}),
    "uneven": (WHITE_BOX, {}),
    "masked": (WHITE_BOX, {}),
    "parallel": (WHITE_BOX, PARALLEL),
    "online": (ONLINE, {"lmbda": 1.0, **GREEDY}),
    "streaming": (ONLINE, {**STREAMING, **GREEDY}),
    "cached": (WHITE_BOX, {}),
    "black_box": (BLACK_BOX, {}),
}
ADAMW = {"optim": "adamw_torch", "learning_rate": 0.01, "max_steps": 20, "eval_strategy": "no"}
SAVED_STEP = 9  # in the middle of an epoch
RESUMED = {
    "adamw": (WHITE_BOX, ADAMW),
    "adamw_lora_stored": (WHITE_BOX, {**ADAMW, "merge_adapter": True}),
    "adamw_lora_black_box": (BLACK_BOX, {**ADAMW, "merge_adapter": True}),
    "adamw_lora_sampled": (ONLINE, {**ADAMW, "merge_adapter": True, "lmbda": 0.7, "max_new_tokens": 8}),
}
CASES = {**EVALUATED, **RESUMED}


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
        if torch.distributed.is_initialized() and is_whole(model) and all(p.numel() for p in model.parameters()):
            total = torch.stack([p.detach().double().sum() for p in model.parameters()])
            others = [torch.zeros_like(total) for _ in range(torch.distributed.get_world_size())]
            torch.distributed.all_gather(others, total)
            assert all(torch.equal(total, other) for other in others), "the ranks' weights differ"


def choose_data(case: str, folder: Path) -> dict:
    """Models, datasets and callbacks; a teacher unless the datasets have its signal or nothing needs one."""
    vocab_size = MASK if case == "parallel" else 261
    rows = Dataset.from_list(build_rows(case, vocab_size))
    stored, held_out = (load_from_disk(folder / name) for name in ("train", "held_out"))
    if case in ("cached", "black_box"):
        return {"train_dataset": stored, "eval_dataset": held_out, "callbacks": [SpeculativeEvalCallback(held_out)]}
    if case in EVALUATED:
        return {
            "train_dataset": rows,
            "eval_dataset": Dataset.from_list(build_rows("even", vocab_size)[:8]),
            "callbacks": [SpeculativeEvalCallback([[{"role": "user", "content": "a"}]] * 3, max_new_tokens=8)],
            "teacher_model": build_llama(seed=1, vocab_size=288, hidden_size=48, layers=3),
        }
    data = {"train_dataset": rows, "teacher_model": str(folder / "target")}
    if case in ("adamw_lora_stored", "adamw_lora_black_box"):
        data = {"train_dataset": stored}
    if "lora" in case:
        adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])
        data |= {"model": str(folder / "draft"), "peft_config": adapter}
    return data


def build_trainer(output_dir: Path, case: str, batch_size: int, layout: str, folder: Path, **options):
    (config_class, trainer_class), own = CASES[case]
    tokenizer = build_tokenizer()
    if case == "parallel":
        own = {**own, "parallel_mask_token": tokenizer.convert_ids_to_tokens(MASK)}
    default = {
        "max_steps": 2, "learning_rate": 0.5, "optim": "sgd", "eval_strategy": "steps", "eval_steps": 2,
        "save_strategy": "no",
    }  # fmt: skip
    args = config_class(
        output_dir=str(output_dir), per_device_train_batch_size=batch_size, lr_scheduler_type="constant",
        max_length=None, train_sampling_strategy="sequential", gradient_checkpointing=False, report_to=[],
        logging_steps=1, disable_tqdm=True, bf16=False, use_cpu=layout in ("plain", "fsdp2"), max_grad_norm=1e9,
        ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None, align_vocabulary=True,
        target_vocab_size=None if "teacher_model" in choose_data(case, folder) else 288,  # else read from the teacher
        **{**default, **own, **options},
    )  # fmt: skip
    if layout == "fsdp2":
        os.environ["FSDP_STATE_DICT_TYPE"] = f"{'SHARDED' if case == 'adamw' else 'FULL'}_STATE_DICT"
        # All that keeps accelerate from FSDP2 on a CPU: it looks for it in processes with accelerators alone.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    data = choose_data(case, folder)
    trainer = trainer_class(
        model=data.pop("model", None) or build_llama(seed=0), args=args, processing_class=tokenizer,
        callbacks=[CompareRanks(), *data.pop("callbacks", [])], **data,
    )  # fmt: skip
    assert trainer.is_fsdp_enabled == (layout == "fsdp2")
    return trainer


def train(output_dir: Path, case: str, batch_size: int, layout: str, folder: Path) -> dict:
    """Trains; in several processes a case of RESUMED is saved, and resumed by another trainer."""
    checkpoint, arguments = None, (output_dir, case, batch_size, layout, folder)
    if case in RESUMED and "WORLD_SIZE" in os.environ:
        options = {"max_steps": SAVED_STEP, "save_strategy": "steps", "save_steps": SAVED_STEP}
        build_trainer(*arguments, **options).train()
        checkpoint = str(output_dir / f"checkpoint-{SAVED_STEP}")
    trainer = build_trainer(*arguments)
    if layout == "fsdp2" and case == "even":
        with pytest.raises(ValueError, match="Set `eval_on_start=True`"):
            trainer.evaluate()
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    history = trainer.state.log_history
    logs = [log for log in history if "loss" in log]
    result = {"losses": [log["loss"] for log in logs]}
    if case in EVALUATED:
        evaluations = [log for log in history if "eval_block_efficiency" in log]
        name = {"streaming": "alpha_upper_bound_on_data", "black_box": "mean_token_accuracy"}.get(case, "alpha_on_data")
        result |= {
            "evaluation_losses": [log["eval_loss"] for log in history if "eval_loss" in log],
            "block_efficiencies": [log["eval_block_efficiency"] for log in evaluations],
            "alphas_t1": [log["eval_alpha_t1"] for log in evaluations],
            "alphas": [log[name] for log in logs],
        }
    return result


def main(output: str, batch_size: str, folder: str, *layouts: str) -> None:
    sharding = {name: value for name, value in os.environ.items() if "FSDP" in name}
    if any(layout.endswith(".json") for layout in layouts):
        import deepspeed.ops

        # A C++ compiler takes two minutes for DeepSpeed's all-reduce, and gloo's gives the same.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for layout in layouts or ("plain",):
        for name, value in sharding.items():
            os.environ.pop(name, None)
            if layout == "fsdp2":
                os.environ[name] = value
        if layout.endswith(".json"):
            os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = layout
            os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)  # of the launcher's own config
        name = f"{output}.{Path(layout).stem}"
        results = {case: train(Path(name, case), case, int(batch_size), layout, Path(folder)) for case in CASES}
        if int(os.environ.get("RANK", 0)) == 0:
            torch.save(results, f"{name}.pt")
    if torch.distributed.is_initialized():
        # A rank that leaves while the other still works has aborted in its communication threads (seen once, ZeRO-3).
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    gc.freeze()  # every training collects garbage, and would walk all that imports leave
    main(*sys.argv[1:])
