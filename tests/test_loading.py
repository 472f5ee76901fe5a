"""A name stands for one model everywhere: a whole one, an adapter on its base, with code of its own."""

import json
import shutil

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import build_llama, build_tokenizer
from transformers import CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from spec_kd import (
    BlackBoxSFTConfig,
    BlackBoxSFTTrainer,
    WhiteBoxDistillConfig,
    WhiteBoxDistillTrainer,
    evaluate_draft,
    generate_responses,
    score_completions,
)
from spec_kd.hub import export_draft
from spec_kd.loading import (
    choose_processing_class,
    find_adapter,
    find_processing_class,
    find_tokenizer,
    load_config,
    load_model,
    load_tokenizer,
)

ROWS = {"prompt_ids": [[5, 6, 7], [8, 9]] * 2, "completion_ids": [[10, 11, 1], [12, 13, 14, 1]] * 2}


def perturb(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight += 0.3 * torch.randn(weight.shape, generator=generator)
    return model.eval()


@pytest.fixture(params=["adapter alone", "config beside it"])
def adapter(request, tmp_path):
    """(folder of an adapter, the PeftModel that was saved there)"""
    base, folder = tmp_path / "base", tmp_path / "adapter"
    build_llama(seed=3).save_pretrained(base)
    build_tokenizer().save_pretrained(base)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"])
    model = perturb(get_peft_model(load_model(base), config), seed=5)
    model.save_pretrained(folder)
    if request.param == "config beside it":
        shutil.copy(base / "config.json", folder)
    return str(folder), model


def compute_logits(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0]


def test_an_adapter_is_loaded_on_its_base(adapter):
    folder, model = adapter
    loaded = load_model(folder)
    assert isinstance(loaded, PeftModel) and not any(weight.requires_grad for weight in loaded.parameters())
    torch.testing.assert_close(compute_logits(loaded, [5, 6, 7]), compute_logits(model, [5, 6, 7]))
    trained = load_model(folder, is_trainable=True)
    assert {name for name, w in trained.named_parameters() if w.requires_grad} == {
        name for name, _ in trained.named_parameters() if "lora_" in name
    }
    assert load_config(folder).vocab_size == 261 and load_tokenizer(folder).get_vocab() == build_tokenizer().get_vocab()
    assert find_adapter(folder).peft_type == "LORA"


def test_an_adapter_without_its_base_says_so(adapter, tmp_path):
    folder, _ = adapter
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    for base, message in ((None, "does not name its base model"), ("/nowhere/base", "which cannot be loaded")):
        path.write_text(json.dumps({**config, "base_model_name_or_path": base}))
        with pytest.raises((OSError, ValueError), match=message):
            load_model(folder)


def train(trainer_class, config_class, tmp_path, draft, **arguments):
    args = config_class(
        output_dir=str(tmp_path / "out"), max_steps=1, per_device_train_batch_size=4, logging_steps=1, report_to="none",
        use_cpu=True, bf16=False, save_strategy="no",
    )  # fmt: skip
    trainer = trainer_class(
        draft, args, train_dataset=Dataset.from_dict(ROWS), processing_class=build_tokenizer(), **arguments
    )
    trainer.train()
    return trainer.state.log_history[0]["loss"], trainer


def test_trainers_take_an_adapter_for_every_model(adapter, tmp_path):
    folder, model = adapter
    white = (WhiteBoxDistillTrainer, WhiteBoxDistillConfig, tmp_path)
    by_name, trainer = train(*white, build_llama(seed=0), teacher_model=folder)
    by_object, _ = train(*white, build_llama(seed=0), teacher_model=model)
    assert by_name == by_object and trainer._teacher.name == folder
    by_name, trainer = train(*white, folder, teacher_model=build_llama(seed=1))
    assert any("lora_" in name and w.requires_grad for name, w in trainer.model.named_parameters())
    by_object, _ = train(*white, load_model(folder, is_trainable=True), teacher_model=build_llama(seed=1))
    assert by_name == by_object
    black = (BlackBoxSFTTrainer, BlackBoxSFTConfig, tmp_path)
    assert train(*black, folder)[0] == train(*black, load_model(folder, is_trainable=True))[0]


def test_engines_evaluation_and_export_take_an_adapter(adapter, tmp_path):
    folder, model = adapter
    prompts = ["hello", "you"]
    options = {"max_new_tokens": 6, "show_progress": False}
    texts = generate_responses(folder, prompts, temperature=0.0, teacher_signal="token_only", **options)
    expected = generate_responses(
        model, prompts, processing_class=build_tokenizer(), temperature=0.0, teacher_signal="token_only", **options
    )
    assert texts["completion_ids"] == expected["completion_ids"]
    assert json.loads(texts[0]["teacher_info"])["target_name"] == folder
    scores = score_completions(folder, Dataset.from_dict(ROWS), show_progress=False)["teacher_token_logprobs"]
    again = score_completions(model, Dataset.from_dict(ROWS), processing_class=build_tokenizer(), show_progress=False)[
        "teacher_token_logprobs"
    ]
    assert scores == again
    report = evaluate_draft(folder, folder, prompts, temperatures=(0.0,), costs=None, **options)
    assert report.draft.settings[0].alpha.value == 1.0
    assert report.provenance["target"]["name"] == folder and report.draft.name == "adapter"
    merged = load_model(export_draft(folder, tmp_path / "merged"))
    torch.testing.assert_close(
        compute_logits(merged, [5, 6, 7]), compute_logits(model, [5, 6, 7]), rtol=1e-4, atol=1e-5
    )


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

class MyConfig(LlamaConfig):
    model_type = "my_llama"

class MyForCausalLM(LlamaForCausalLM):
    config_class = MyConfig
"""


@pytest.fixture
def remote(tmp_path):
    """A folder whose model is code of its own."""
    folder = tmp_path / "remote"
    build_llama(seed=3).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    (folder / "my_llama.py").write_text(CODE)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "my_llama", "architectures": ["MyForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "my_llama.MyConfig", "AutoModelForCausalLM": "my_llama.MyForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_code_of_a_repository_is_trusted_by_every_loader(remote, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked at the terminal"))
    options = {"trust_remote_code": True}
    assert type(load_model(remote, **options)).__name__ == "MyForCausalLM"
    for load in (load_model, load_config):
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            load(remote)
    args = WhiteBoxDistillConfig(
        output_dir=str(tmp_path / "out"), trust_remote_code=True, report_to="none", use_cpu=True, bf16=False
    )
    trainer = WhiteBoxDistillTrainer(remote, args, teacher_model=remote, train_dataset=Dataset.from_dict(ROWS))
    assert type(trainer.model).__name__ == type(trainer.teacher_model).__name__ == "MyForCausalLM"
    args = BlackBoxSFTConfig(
        output_dir=str(tmp_path / "out"), trust_remote_code=True, report_to="none", use_cpu=True, bf16=False
    )
    assert BlackBoxSFTTrainer(remote, args, train_dataset=Dataset.from_dict(ROWS)).processing_class is not None
    assert find_tokenizer(remote, options) is not None


def test_a_multimodal_draft_comes_with_its_processor(tmp_path):
    tokenizer = build_tokenizer()
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4, "projection_dim": 16, "model_type": "clip_vision_model"}
    config = LlavaConfig(text_config=build_llama(seed=0).config, vision_config=vision, image_token_index=250)
    folder = tmp_path / "draft"
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    LlavaProcessor(CLIPImageProcessor(), tokenizer, patch_size=4, image_token="<|user|>").save_pretrained(folder)
    assert isinstance(find_processing_class(folder), LlavaProcessor)
    args = BlackBoxSFTConfig(
        output_dir=str(tmp_path / "out"), max_steps=1, report_to="none", use_cpu=True, bf16=False, save_strategy="no"
    )
    trainer = BlackBoxSFTTrainer(str(folder), args, train_dataset=Dataset.from_dict(ROWS))
    assert isinstance(trainer.processing_class, LlavaProcessor)
    trainer.save_model()
    assert (tmp_path / "out" / "processor_config.json").exists()
    # a text draft of a multimodal target is trained with the tokenizer alone
    chosen = choose_processing_class(build_tokenizer(), find_processing_class(folder))
    assert not isinstance(chosen, LlavaProcessor)
