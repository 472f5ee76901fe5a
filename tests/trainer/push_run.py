"""Trains a LoRA draft for one step and pushes it; the Hub's address is read from HF_ENDPOINT at import time."""

import sys

from datasets import Dataset
from peft import LoraConfig
from tiny import build_llama, build_tokenizer

from spec_kd.trainer import WhiteBoxDistillConfig, WhiteBoxDistillTrainer

if __name__ == "__main__":
    trainer = WhiteBoxDistillTrainer(
        model=build_llama(seed=0),
        teacher_model=build_llama(seed=1, vocab_size=288),
        args=WhiteBoxDistillConfig(
            output_dir=sys.argv[1], max_steps=1, per_device_train_batch_size=2, use_cpu=True, report_to=[],
            save_strategy="no", gradient_checkpointing=False, merge_adapter=True, align_vocabulary=True,
            push_to_hub=True, hub_model_id="me/draft",
        ),
        train_dataset=Dataset.from_list([{"prompt_ids": [7, 8], "completion_ids": [9, 10, 1]}] * 4),
        processing_class=build_tokenizer(),
        peft_config=LoraConfig(r=4, target_modules=["q_proj"]),
    )  # fmt: skip
    trainer.train()
    trainer.push_to_hub(dataset_name="me/data")
