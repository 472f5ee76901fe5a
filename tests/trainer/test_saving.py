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

from spec_kd import export_draft
from spec_kd.trainer import (
    BlackBoxSFTConfig,
    BlackBoxSFTTrainer,
    OnlineGKDConfig,
    OnlineGKDTrainer,
    WhiteBoxDistillConfig,
    WhiteBoxDistillTrainer,
)


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


TRAINERS = [
    (BlackBoxSFTTrainer, BlackBoxSFTConfig, {}),
    (WhiteBoxDistillTrainer, WhiteBoxDistillConfig, {"teacher_model": "target"}),
    (OnlineGKDTrainer, OnlineGKDConfig, {"teacher_model": "target"}),
]


@pytest.mark.parametrize("adapter", [None, "kept", "merged"])
@pytest.mark.parametrize(("trainer_class", "config_class", "models"), TRAINERS)
def test_every_card_is_a_drafts_and_names_no_folder_of_this_machine(
    tokenizer, rows, options, tmp_path, adapter, trainer_class, config_class, models
):
    """Draft, target and dataset are in folders here; the card of each save, checkpoint and export is a draft's."""
    for name, seed in (("draft", 0), ("target", 1)):
        build_llama(seed=seed).save_pretrained(tmp_path / "models" / name)
        tokenizer.save_pretrained(tmp_path / "models" / name)
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    online = {"lmbda": 0.0} if config_class is OnlineGKDConfig else {}
    trainer = trainer_class(
        model=str(tmp_path / "models" / "draft"),
        args=config_class(**{**options, **online, "max_steps": 1, "save_strategy": "steps", "save_steps": 1},
                          merge_adapter=adapter == "merged"),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora if adapter else None,
        **{name: str(tmp_path / "models" / model) for name, model in models.items()},
    )  # fmt: skip
    trainer.dataset_name = str(tmp_path / "data" / "responses")
    trainer.target_name = str(tmp_path / "models" / "target")
    trainer.train()
    trainer.save_model()
    trainer.save_model(str(tmp_path / "elsewhere"))
    trainer.create_model_card()
    run = Path(options["output_dir"])
    export_draft(run, tmp_path / "exported")
    cards = [path for path in tmp_path.rglob("README.md")]
    assert {path.parent for path in cards} >= {run, tmp_path / "elsewhere", tmp_path / "exported"}
    for path in cards:
        text = path.read_text()
        assert str(tmp_path) not in text and "None" not in text, path
        for of_others in ("fine-tuned version", "Quick start", "pipeline(", "More Information Needed", "Model ID"):
            assert of_others not in text, (path, of_others)
        assert (
            "drafts for `target`" in text and "from `draft` on `responses`" in text and "assistant_model=draft" in text
        )
        is_adapter = (path.parent / "adapter_config.json").exists()
        assert ("holds a LoRA adapter" in text) == is_adapter, path
        data = ModelCard.load(path).data
        assert data.library_name == ("peft" if is_adapter else "transformers")
        assert {"draft-model", "spec_kd"} <= set(data.tags)
    assert (run / "adapter_config.json").exists() == (adapter == "kept")
    assert not (tmp_path / "exported" / "adapter_config.json").exists()


def test_a_card_that_somebody_wrote_stays(tokenizer, rows, options, tmp_path):
    build_llama(seed=0).save_pretrained(tmp_path / "draft")
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    trainer = BlackBoxSFTTrainer(
        model=str(tmp_path / "draft"),
        args=BlackBoxSFTConfig(**options),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora,
    )
    card = Path(options["output_dir"]) / "README.md"
    card.write_text("---\nlicense: mit\n---\n\n# My draft\n")
    trainer.save_model()
    text = card.read_text()
    assert "license: mit" in text and "# My draft" in text and "fine-tuned" not in text
    assert str(tmp_path) not in text  # PEFT adds the folder of the base


def save_target(tokenizer, folder):
    build_llama(seed=1, vocab_size=288).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("align", [False, True])
def test_the_card_says_what_engines_would_make_of_the_draft(tokenizer, rows, options, tmp_path, align, caplog):
    """The target's rows are 288, the draft's 261 unless they are aligned."""
    target = save_target(tokenizer, tmp_path / "target")
    trainer = WhiteBoxDistillTrainer(
        model=build_llama(seed=0),
        args=WhiteBoxDistillConfig(**options, serving_engines=["vllm", "llama.cpp"], align_vocabulary=align),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        teacher_model=target,
    )
    assert ("vllm refuses: The draft has 261 vocabulary rows" in caplog.text) is not align
    trainer.train()
    trainer.save_model()
    card = (Path(options["output_dir"]) / "README.md").read_text()
    assert ("| vllm refuses | The draft has 261 vocabulary rows" in card) is not align
    assert ("found nothing against this draft in vllm, llama.cpp" in card) is align


def test_engines_need_to_know_the_target(tokenizer, rows, options, tmp_path):
    arguments = {
        "model": build_llama(seed=0), "train_dataset": Dataset.from_list(rows), "processing_class": tokenizer,
    }  # fmt: skip
    options = {**options, "serving_engines": ["sglang"]}
    with pytest.raises(ValueError, match="Set `serving_target`"):
        BlackBoxSFTTrainer(args=BlackBoxSFTConfig(**options), **arguments)
    options["serving_target"] = save_target(tokenizer, tmp_path / "target")
    trainer = BlackBoxSFTTrainer(args=BlackBoxSFTConfig(**options), **arguments)
    assert [(one.engine, one.check) for one in trainer._serving_findings] == [("sglang", "unequal_rows")]
    with pytest.raises(ValueError, match="`serving_engine` is 'vlm'"):
        BlackBoxSFTConfig(**{**options, "serving_engines": ["vlm"]})
