"""What `save_model` leaves on disk: a draft that a server can load, checkpoints that training can resume."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig
from tiny import build_llama
from transformers import AutoModelForCausalLM

from spec_kd.trainer import BlackBoxSFTConfig, BlackBoxSFTTrainer, WhiteBoxDistillConfig, WhiteBoxDistillTrainer


def train(tokenizer, rows, options, peft=True, **overrides):
    trainer = WhiteBoxDistillTrainer(
        model=build_llama(seed=0),
        teacher_model=build_llama(seed=1, vocab_size=288),
        args=WhiteBoxDistillConfig(**{**options, **overrides}),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False) if peft else None,
    )
    trainer.train()
    return trainer


def test_merged_and_aligned_save_can_be_served_and_leaves_training_alone(tokenizer, rows, options):
    trainer = train(
        tokenizer, rows, options, merge_adapter=True, align_vocabulary=True, save_strategy="steps", save_steps=1
    )
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    ids = torch.randint(5, 261, (2, 9))
    expected = trainer.model(input_ids=ids).logits.log_softmax(-1)
    trainer.save_model()
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, before[name]), name

    folder = Path(options["output_dir"])
    assert not (folder / "adapter_config.json").exists()
    assert (folder / "checkpoint-2" / "adapter_config.json").exists()
    draft = AutoModelForCausalLM.from_pretrained(folder)
    assert draft.config.vocab_size == 288
    actual = draft(input_ids=ids).logits[..., :261].log_softmax(-1)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    target = build_llama(seed=1, vocab_size=288)
    output = target.generate(torch.tensor([[7, 8, 9]]), assistant_model=draft, max_new_tokens=8, do_sample=False)
    assert torch.equal(output, target.generate(torch.tensor([[7, 8, 9]]), max_new_tokens=8, do_sample=False))


def test_without_options_an_adapter_is_saved(tokenizer, rows, options):
    train(tokenizer, rows, options).save_model()
    assert (Path(options["output_dir"]) / "adapter_config.json").exists()


def test_aligning_an_adapter_without_merging_is_refused_before_training(tokenizer, rows, options):
    with pytest.raises(ValueError, match="merge_adapter=True"):
        train(tokenizer, rows, options, align_vocabulary=True)


def test_black_box_aligns_to_the_given_rows(tokenizer, rows, options):
    def build(**overrides):
        return BlackBoxSFTTrainer(
            model=build_llama(seed=0), args=BlackBoxSFTConfig(**options, align_vocabulary=True, **overrides),
            train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        )  # fmt: skip

    with pytest.raises(ValueError, match="target_vocab_size"):
        build()
    build(target_vocab_size=300).save_model()
    assert json.loads((Path(options["output_dir"]) / "config.json").read_text())["vocab_size"] == 300


def test_model_card_names_method_and_acceptance(tokenizer, rows, options):
    trainer = train(tokenizer, rows, options, peft=False, divergence="jsd")
    for value in (0.25, 0.5):
        trainer.log({"eval_alpha_greedy": value, "eval_block_efficiency": 2 * value, "eval_loss": 1.0})
    trainer.create_model_card(model_name="my-draft", dataset_name="my-data")
    card = ModelCard.load(Path(options["output_dir"]) / "README.md")
    assert "white-box distillation" in card.text and "`jsd (beta=0.5)`" in card.text
    assert "| `alpha_greedy` | 0.25 | 0.5 |" in card.text
    assert {"spec_kd", "speculative-decoding", "white-box-distillation"} <= set(card.data.tags)
    results = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert results["alpha_greedy"] == 0.5 and "loss" not in results
