"""The parts of other libraries that are not public API: a clear failure here when one moves or changes its meaning."""

import inspect

import pytest
import torch
from tiny import build_llama
from transformers import LlamaConfig, MambaConfig, T5Config
from transformers.integrations import deepspeed as hf_deepspeed
from trl import SFTTrainer

from spec_kd import _private


def test_suspend_zero3_init_turns_it_off_and_on_again():
    class Zero3:
        def is_zero3(self) -> bool:
            return True

    config = Zero3()
    hf_deepspeed.set_hf_deepspeed_config(config)
    try:
        assert hf_deepspeed.is_deepspeed_zero3_enabled()
        with _private.suspend_zero3_init():
            assert not hf_deepspeed.is_deepspeed_zero3_enabled()
        assert hf_deepspeed.is_deepspeed_zero3_enabled()
    finally:
        hf_deepspeed.unset_hf_deepspeed_config()
    with _private.suspend_zero3_init():
        assert not hf_deepspeed.is_deepspeed_zero3_enabled()


def test_gather_head_parameters_is_a_context_manager_over_parameters():
    weight = torch.nn.Parameter(torch.ones(2))
    with _private.gather_head_parameters(weight, None):
        assert torch.equal(weight, torch.ones(2))


def test_models_are_loaded_and_named(tmp_path):
    build_llama(seed=3).save_pretrained(tmp_path)
    model = _private.create_model_from_path(str(tmp_path), dtype="float32")
    assert _private.get_config_model_id(model.config) == str(tmp_path)


def test_sft_trainer_still_has_what_the_draft_trainers_override():
    """Names and arguments; their meaning is tested by the trainers' equality with dense references."""
    assert list(inspect.signature(SFTTrainer._prepare_dataset).parameters) == [
        "self", "dataset", "processing_class", "args", "packing", "formatting_func", "dataset_name",
    ]  # fmt: skip
    source = inspect.getsource(SFTTrainer.compute_loss)
    assert "model(**inputs, fused_lm_head=True)" in source
    assert "per_token_loss = -outputs.log_probs" in source
    for field in ("entropy", "is_top1", "label_mask", "aux_loss"):
        assert f"outputs.{field}" in source
    assert "_metrics" in inspect.getsource(SFTTrainer.log)


@pytest.mark.parametrize(
    ("config", "expected"), [(LlamaConfig(), False), (MambaConfig(), True), (T5Config(), False)], ids=type
)
def test_stateful_models_are_known(config, expected):
    assert _private.is_stateful(config) is expected


def test_loading_options_are_found():
    known = _private.list_loading_options()
    assert {"dtype", "device_map", "revision", "attn_implementation", "quantization_config", "cache_dir"} <= known
    assert "dtipe" not in known and "kwargs" not in known


@pytest.mark.parametrize("name", ["sdpa", "eager", "flex_attention"])
def test_a_model_knows_its_attention(name):
    model = build_llama(seed=0)
    model.set_attn_implementation(name)
    assert _private.get_attention_implementation(model.config) == name
