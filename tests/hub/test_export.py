import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import build_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from spec_kd.hub import export_draft
from spec_kd.vocabulary import VocabularyMismatchError

IDS = torch.arange(5, 25)[None]  # (1, 20)


def logits_of(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def train_a_little(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def adapted(draft):
    return train_a_little(get_peft_model(draft, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")))


def test_full_draft_is_saved_aligned_and_left_untouched(draft, tokenizer, tmp_path):
    before = copy.deepcopy(draft.state_dict())
    expected = logits_of(draft).log_softmax(-1)
    path = export_draft(draft, tmp_path / "out", processing_class=tokenizer, target_vocab_size=320)
    assert path == tmp_path / "out" and (path / "model.safetensors").exists()
    exported = AutoModelForCausalLM.from_pretrained(path)
    assert exported.config.vocab_size == 320
    torch.testing.assert_close(logits_of(exported)[..., :261].log_softmax(-1), expected, atol=1e-6, rtol=0)
    assert AutoTokenizer.from_pretrained(path).get_vocab() == tokenizer.get_vocab()
    assert draft.config.vocab_size == 261
    assert all(torch.equal(value, before[name]) for name, value in draft.state_dict().items())


def test_adapter_is_merged_on_a_copy(adapted, tokenizer, tmp_path):
    adapted.train()
    before = copy.deepcopy(adapted.state_dict())
    path = export_draft(adapted, tmp_path, processing_class=tokenizer, target_vocab_size=288)
    assert not list(path.glob("adapter_*"))
    exported = AutoModelForCausalLM.from_pretrained(path)
    assert adapted.training and set(before) == set(adapted.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in adapted.state_dict().items())
    torch.testing.assert_close(logits_of(exported)[..., :261], logits_of(adapted), atol=1e-5, rtol=0)
    with adapted.disable_adapter():
        assert (logits_of(exported)[..., :261] - logits_of(adapted)).abs().max() > 1e-2


def test_a_model_with_a_patched_forward_can_be_exported(adapted, tokenizer, tmp_path):
    """TRL's trainers replace `forward` on the instance."""
    base = adapted.get_base_model()
    forward = base.forward
    base.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    expected = logits_of(adapted)
    export_draft(adapted, tmp_path, processing_class=tokenizer, target_vocab_size=288)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(exported)[..., :261], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(logits_of(adapted), expected)


@pytest.mark.parametrize("options", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["lm_head", "q_proj"]}])
def test_an_adapter_on_a_tied_head_is_not_lost(draft, tokenizer, tmp_path, options):
    assert draft.config.tie_word_embeddings
    adapted = train_a_little(get_peft_model(draft, LoraConfig(task_type="CAUSAL_LM", r=4, **options)))
    export_draft(adapted, tmp_path, processing_class=tokenizer, target_vocab_size=288)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(exported)[..., :261], logits_of(adapted), atol=1e-5, rtol=0)


def test_adapter_from_a_path_replaces_itself(adapted, draft, tokenizer, tmp_path):
    expected = logits_of(adapted)
    base = tmp_path / "base"
    build_llama(seed=0, hidden_size=32).save_pretrained(base)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    path = tmp_path / "draft"
    adapted.save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path / "README.md").write_text("mine")
    (path / "model-00001-of-00002.safetensors").touch()
    (path / "pytorch_model.bin").touch()
    (path / "trainer_state.json").write_text("{}")
    assert (path / "adapter_config.json").exists()
    export_draft(path, path, target_vocab_size=288)
    assert {file.name for file in path.iterdir()} >= {"model.safetensors", "config.json", "trainer_state.json"}
    assert not [f for f in path.iterdir() if f.name.startswith(("adapter", "pytorch_model", "model-"))]
    assert (path / "README.md").read_text() == "mine"
    assert [folder.name for folder in tmp_path.iterdir() if folder.name.startswith(".")] == []
    torch.testing.assert_close(
        logits_of(AutoModelForCausalLM.from_pretrained(path))[..., :261], expected, atol=1e-5, rtol=0
    )


def test_an_unmerged_adapter(adapted, tokenizer, tmp_path):
    export_draft(adapted, tmp_path, processing_class=tokenizer, merge_adapter=False)
    assert (tmp_path / "adapter_config.json").exists() and not (tmp_path / "model.safetensors").exists()
    with pytest.raises(ValueError, match="merge_adapter=True"):
        export_draft(adapted, tmp_path, processing_class=tokenizer, merge_adapter=False, target_vocab_size=288)


def test_what_cannot_be_exported_is_refused(draft, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="needs `processing_class`"):
        export_draft(draft, tmp_path, target_vocab_size=288)
    with pytest.raises(VocabularyMismatchError, match="260 rows"):
        export_draft(draft, tmp_path / "cut", processing_class=tokenizer, target_vocab_size=260)
    assert not list((tmp_path / "cut").iterdir())
    with pytest.raises(ValueError, match="neither a model nor a folder"):
        export_draft(tmp_path / "missing", tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot be written to"):
        export_draft(draft, tmp_path / "file" / "out", processing_class=tokenizer)


def test_quantised_and_partitioned_drafts_are_refused(adapted, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(adapted.get_base_model(), "is_quantized", True, raising=False)
    with pytest.raises(ValueError, match="quantized base"):
        export_draft(adapted, tmp_path, processing_class=tokenizer)
    next(adapted.parameters()).ds_id = 0
    with pytest.raises(ValueError, match="ZeRO-3"):
        export_draft(adapted, tmp_path, processing_class=tokenizer)


@pytest.fixture
def served(tokenizer, tmp_path):
    """Folder of a target with 288 rows."""
    build_llama(seed=1, vocab_size=288).save_pretrained(tmp_path / "target")
    tokenizer.save_pretrained(tmp_path / "target")
    return tmp_path / "target"


def test_a_draft_is_checked_for_engines_before_it_is_written(draft, tokenizer, served, tmp_path):
    options = {"processing_class": tokenizer, "target": served, "serving_engines": ["vllm", "llama.cpp"]}
    with pytest.raises(
        ValueError, match=r"cannot be served like this:\n- vllm refuses: The draft has 261 vocabulary rows"
    ):
        export_draft(draft, tmp_path / "out", **options)
    assert not list((tmp_path / "out").iterdir())
    export_draft(draft, tmp_path / "out", **options, target_vocab_size=288)
    assert "found nothing against this draft in vllm, llama.cpp" in (tmp_path / "out" / "README.md").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == 288


def test_findings_that_are_allowed_stand_in_the_card(adapted, tokenizer, served, tmp_path):
    path = export_draft(
        adapted, tmp_path / "out", processing_class=tokenizer, target=served, serving_engines=["vllm"],
        merge_adapter=False, refuse_findings=False,
    )  # fmt: skip
    card = (path / "README.md").read_text()
    assert "### Checks for serving" in card and "| vllm refuses | The draft is a LoRA adapter" in card
    # the next form of the draft is another one
    adapted.peft_config["default"].base_model_name_or_path = str(served)
    export_draft(adapted, path, processing_class=tokenizer)
    assert "### Checks for serving" not in (path / "README.md").read_text()


def test_engines_need_a_target(draft, tokenizer, served, tmp_path):
    with pytest.raises(ValueError, match="`serving_engines` needs `target`"):
        export_draft(draft, tmp_path / "out", processing_class=tokenizer, serving_engines=["vllm"])
    with pytest.raises(ValueError, match="`serving_engine` is 'vlm'"):
        export_draft(draft, tmp_path / "out", processing_class=tokenizer, target=served, serving_engines=["vlm"])
    with pytest.raises(ValueError, match="The draft has no tokenizer"):
        export_draft(draft, tmp_path / "out", target=served, serving_engines=["vllm"])
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
