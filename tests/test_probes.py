"""Architectures that mix up sequences which share a tensor are found by running a few tokens, whatever their name."""

import pytest
import torch
import transformers
from datasets import Dataset
from tiny import build_llama, build_tokenizer
from trl.trainer.utils import add_fused_lm_head

from spec_kd import BlackBoxSFTConfig, BlackBoxSFTTrainer, WhiteBoxDistillConfig, WhiteBoxDistillTrainer
from spec_kd.engines.transformers import TransformersEngine
from spec_kd.probes import (
    check_fused_log_probs,
    check_logits_are_known,
    check_packing,
    check_padding,
    group_for_generation,
    takes_padded_prompts,
)
from spec_kd.sampling.options import SamplingOptions

SMALL = {
    "vocab_size": 261, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1,
    "initializer_range": 0.3, "max_position_embeddings": 256,
}  # fmt: skip
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}


def build(name):
    torch.manual_seed(0)
    if name == "GptOss":
        config = transformers.GptOssConfig(**SMALL, num_local_experts=4, sliding_window=6)
    elif name == "Rwkv":
        sizes = {name: SMALL[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "pad_token_id")}
        config = transformers.RwkvConfig(**sizes, bos_token_id=None, eos_token_id=1, context_length=256)
    elif name == "OPT":
        sizes = {key: value for key, value in SMALL.items() if key != "intermediate_size"}
        config = transformers.OPTConfig(**sizes, ffn_dim=48, word_embed_proj_dim=32)
    else:
        text = {"model_type": "qwen2_5_vl_text", **SMALL, "rope_parameters": MROPE}
        ids = {"image_token_id": 250, "video_token_id": 251, "vision_start_token_id": 252, "vision_end_token_id": 253}
        config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=VISION, **ids)
        return transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


@pytest.mark.parametrize("name", ["GptOss", "Qwen2_5_VL", "Rwkv"])
def test_packed_sequences_that_read_each_other(name):
    model = build(name)
    with pytest.raises(ValueError, match=r"For\w+ \(teacher\) does not keep packed sequences apart: .* up to [\d.]+ "):
        check_packing(model, "teacher")
    check_padding(model, "teacher")


def test_models_that_keep_sequences_apart_pass_and_are_left_as_they_were():
    model = build_llama(seed=0).train()
    state = torch.get_rng_state()
    check_packing(model, "draft")
    check_padding(model, "draft")
    assert takes_padded_prompts(model)
    assert model.training and torch.equal(torch.get_rng_state(), state)


def test_padding_that_is_read_as_text():
    model = build_llama(seed=0)
    forward = model.forward

    def read_all(attention_mask=None, **kwargs):  # positions from the right edge, as if padding were text
        positions = 9 + torch.arange(kwargs["input_ids"].shape[1]) ** 2 // kwargs["input_ids"].shape[1]
        return forward(**kwargs, position_ids=positions[None].expand_as(kwargs["input_ids"]))

    model.forward = read_all
    with pytest.raises(ValueError, match=r"LlamaForCausalLM \(draft\) reads padding as text"):
        check_padding(model, "draft")


@pytest.mark.parametrize("method", ["draft", "teacher", "reference"])
def test_trainers_refuse_packing_by_name(tmp_path, method):
    tokenizer = build_tokenizer()
    rows = {"prompt_ids": [[5, 6, 7]] * 4, "completion_ids": [[8, 9, 1]] * 4}
    models = {"draft": build_llama(seed=0), "teacher": build_llama(seed=1), "reference": build_llama(seed=2)}
    models[method] = build("GptOss")
    args = WhiteBoxDistillConfig(
        output_dir=str(tmp_path), packing=True, max_length=64, bf16=False, use_cpu=True, report_to="none",
        token_selection="adaspec",
    )  # fmt: skip
    with pytest.raises(ValueError, match=rf"GptOssForCausalLM \({method}\) does not keep packed sequences apart"):
        WhiteBoxDistillTrainer(
            models["draft"],
            args,
            teacher_model=models["teacher"],
            ref_model=models["reference"],
            train_dataset=Dataset.from_dict(rows),
            processing_class=tokenizer,
        )
    if method == "draft":
        options = BlackBoxSFTConfig(
            output_dir=str(tmp_path), packing=True, max_length=64, bf16=False, use_cpu=True, report_to="none"
        )
        with pytest.raises(ValueError, match=r"GptOssForCausalLM \(draft\) does not keep packed sequences apart"):
            BlackBoxSFTTrainer(
                models["draft"], options, train_dataset=Dataset.from_dict(rows), processing_class=tokenizer
            )


def test_a_state_that_reads_padding_writes_prompts_one_by_one():
    model = build("Rwkv")
    assert not takes_padded_prompts(model)
    prompts = [[5, 6, 7], [8], [9, 10, 11], [12, 13, 14, 15]]
    assert group_for_generation(model, prompts) == [[0], [1], [2], [3]]
    assert group_for_generation(build_llama(seed=0), prompts) == [[0, 1, 2, 3]]
    engine = TransformersEngine(model, build_tokenizer())
    options = SamplingOptions(max_new_tokens=6, temperature=0.0)
    together = engine.generate(prompts, options)
    alone = [engine.generate([ids], options)[0] for ids in prompts]
    assert [completion.ids for completion in together] == [completion.ids for completion in alone]


def test_opt_has_its_logits_from_what_its_head_reads():
    check_logits_are_known(build("OPT"), "teacher")


def test_models_that_are_no_causal_lm_are_refused():
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 40}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))
    with pytest.raises(ValueError, match=r"teacher \(T5ForConditionalGeneration\) is an encoder-decoder model"):
        check_logits_are_known(model, "teacher")
    model = transformers.LlamaModel(build_llama(seed=0).config)
    with pytest.raises(ValueError, match=r"The teacher \(LlamaModel\) has no output head"):
        check_logits_are_known(model, "teacher")


def test_a_fused_head_that_computes_something_else_is_refused():
    model = build_llama(seed=0)
    add_fused_lm_head(model, outputs=("log_probs",))
    check_fused_log_probs(model, "draft")
    scaled = build_llama(seed=0)
    add_fused_lm_head(scaled, temperature=0.5, outputs=("log_probs",))
    with pytest.raises(ValueError, match=r"fused head gives log-probabilities that are off by [\d.]+ on Llama"):
        check_fused_log_probs(scaled, "draft")
