"""Moves the target into a domain: a LoRA adapter, trained on real conversations, and merged.

    python -m experiments.smollm2.tune_target --domain function_calling --data_dir DATA

A killed run continues from its last checkpoint. The project keeps the adapters in `kept/<domain>/adapter`, in float16;
where one is there, nothing is trained. `<work_dir>/<domain>/target` is the merged model.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

from experiments.smollm2.conversations import KEPT, find_fast_dtype, find_target, load_part


def train_adapter(arguments: argparse.Namespace, folder: Path) -> None:
    base = arguments.work_dir / "target"
    tokenizer = AutoTokenizer.from_pretrained(base)
    data = load_part(arguments.data_dir, arguments.domain, "target", tokenizer)
    print(f"{len(data)} conversations of {arguments.domain}")
    config = SFTConfig(
        output_dir=str(folder / "tuning"),
        max_length=1024,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        train_sampling_strategy="group_by_length",
        num_train_epochs=arguments.epochs,
        learning_rate=5e-4,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        logging_steps=1,
        save_steps=5,
        save_total_limit=2,
        use_cpu=True,
        bf16=find_fast_dtype() == "bfloat16",
        gradient_checkpointing=False,
        model_init_kwargs={"dtype": "float32"},
        report_to="none",
        seed=0,
    )
    trainer = SFTTrainer(
        model=str(base),
        args=config,
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    started = time.monotonic()
    trainer.train(
        resume_from_checkpoint=get_last_checkpoint(config.output_dir) if (folder / "tuning").exists() else None
    )
    trainer.model.half().save_pretrained(folder / "adapter")  # as it is kept
    record = {"seconds_since_last_start": time.monotonic() - started, "log": trainer.state.log_history}
    (folder / "tuning.json").write_text(json.dumps(record, indent=1))


def merge_adapter(work_dir: Path, domain: str, adapter: Path) -> None:
    """Writes the target of a domain to `<work_dir>/<domain>/target`, where it is not there."""
    output, base = find_target(work_dir, domain), work_dir / "target"
    if not output.exists():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(output)
        AutoTokenizer.from_pretrained(base).save_pretrained(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domain", choices=("function_calling", "biology"), required=True)
    parser.add_argument("--data_dir", type=Path, required=True, help="Folder with <domain>/train.jsonl.")
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/smollm2"))
    parser.add_argument("--epochs", type=float, default=0.5, help="Passes over the conversations (default: 0.5).")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1).")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    folder = arguments.work_dir / arguments.domain
    adapter = KEPT / arguments.domain / "adapter"
    if not adapter.exists():
        adapter = folder / "adapter"
        if not adapter.exists():
            train_adapter(arguments, folder)
    merge_adapter(arguments.work_dir, arguments.domain, adapter)
    print(f"The target of {arguments.domain} is in {find_target(arguments.work_dir, arguments.domain)}.")


if __name__ == "__main__":
    main()
