"""Tiny models of many architectures: a row is one line, the class's name and what its config needs besides `SMALL`."""

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCAB_SIZE = 272  # 261 ids of the tokenizer, padding, and the ids below
IMAGE, VIDEO, START, END = 264, 265, 266, 267

IDS = {"vocab_size": VOCAB_SIZE, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
SMALL = {
    **IDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "initializer_range": 0.2,
}  # fmt: skip
GPT = {**IDS, "n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}
STATE = {**IDS, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "initializer_range": 0.2}
HALF = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
LATENT = {
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4,
}  # fmt: skip
MIXER = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
DELTA = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
DECODER = {
    **IDS, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "encoder_layers": 1,
    "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "max_position_embeddings": 128, "is_decoder": True,
    "is_encoder_decoder": False, "init_std": 0.2,
}  # fmt: skip


def small(*without: str, **options: Any) -> dict[str, Any]:
    """`SMALL` without some of its keys, and with options of an architecture."""
    return {key: value for key, value in SMALL.items() if key not in without} | options


VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
QWEN_VISION = {
    "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4,
}  # fmt: skip
MLLAMA_VISION = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 2, "intermediate_size": 16,
    "vision_output_dim": 32, "image_size": 8, "patch_size": 4, "max_num_tiles": 1, "intermediate_layers_indices": [0],
    "supported_aspect_ratios": [[1, 1]],
}  # fmt: skip
QWEN_IDS = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 1e4}


def with_images(text_type: str, vision: dict[str, Any], text: dict[str, Any], **ids: Any) -> dict[str, Any]:
    """A config of a text part and a vision part."""
    return {"text_config": {"model_type": text_type, **small(**text)}, "vision_config": vision, **ids}


ROWS: dict[str, dict[str, Any]] = {
    "BartForCausalLM": DECODER,
    "BloomForCausalLM": {**IDS, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2},
    "CodeGenForCausalLM": {**GPT, "rotary_dim": 4},
    "CohereForCausalLM": small(logit_scale=0.25),
    "Cohere2ForCausalLM": small(logit_scale=0.25, **HALF),
    "DeepseekV3ForCausalLM": small(
        "num_key_value_heads", n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, n_shared_experts=1,
        moe_intermediate_size=16, first_k_dense_replace=1, **{**LATENT, "head_dim": 4},
    ),
    "Exaone4ForCausalLM": small(**HALF),
    "FalconForCausalLM": small("head_dim", alibi=False, ffn_hidden_size=48),
    "FalconH1ForCausalLM": small(mamba_d_ssm=64, lm_head_multiplier=0.5, **MIXER),
    "GPT2LMHeadModel": GPT,
    "GPTBigCodeForCausalLM": GPT,
    "GPTJForCausalLM": {**GPT, "rotary_dim": 4},
    "GPTNeoForCausalLM": {
        **IDS, "max_position_embeddings": 128, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 6,
        "attention_types": [[["global", "local"], 1]], "initializer_range": 0.2,
    },
    "GPTNeoXForCausalLM": small(),
    "GemmaForCausalLM": small(),
    "Gemma2ForCausalLM": small(sliding_window=6, query_pre_attn_scalar=8),
    "Gemma3ForCausalLM": small(query_pre_attn_scalar=8, **HALF),
    "GptOssForCausalLM": small(num_local_experts=4, **HALF),
    "GraniteForCausalLM": small(logits_scaling=4.0),
    "GraniteMoeHybridForCausalLM": small(
        logits_scaling=4.0, num_local_experts=4, shared_intermediate_size=16, layer_types=["mamba", "attention"],
        mamba_expand=2, **MIXER,
    ),
    "HyperCLOVAXForCausalLM": small(logits_scaling=0.5),
    "JambaForCausalLM": small(
        num_experts=4, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
        mamba_d_state=8, mamba_dt_rank=4, use_mamba_kernels=False,
    ),
    "Lfm2ForCausalLM": small(layer_types=["conv", "full_attention"], block_multiple_of=8),
    "LlamaForCausalLM": small(),
    "Llama4ForCausalLM": small(
        num_local_experts=2, intermediate_size_mlp=48, attention_chunk_size=8, no_rope_layers=[1, 0], moe_layers=[1],
        layer_types=["chunked_attention", "full_attention"],
    ),
    "MambaForCausalLM": STATE,
    "Mamba2ForCausalLM": {**STATE, "num_heads": 4, "head_dim": 16, "expand": 2, "n_groups": 1, "chunk_size": 8},
    "MiniCPM3ForCausalLM": small(**LATENT),
    "MiniMaxForCausalLM": small(
        num_local_experts=4, layer_types=["linear_attention", "full_attention"], block_size=4
    ),
    "MistralForCausalLM": small(sliding_window=6),
    "MixtralForCausalLM": small(num_local_experts=4),
    "ModernBertDecoderForCausalLM": small(
        local_attention=6, global_attn_every_n_layers=2, bos_token_id=2, cls_token_id=2, sep_token_id=3
    ),
    "MptForCausalLM": {**IDS, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128, "initializer_range": 0.2},
    "NanoChatForCausalLM": small(),
    "OPTForCausalLM": small("intermediate_size", ffn_dim=48, word_embed_proj_dim=32),
    "Olmo2ForCausalLM": small(),
    "PhiForCausalLM": small(),
    "Phi3ForCausalLM": small(sliding_window=6),
    "Qwen2ForCausalLM": small(),
    "Qwen2MoeForCausalLM": small(**MOE),
    "Qwen3ForCausalLM": small(),
    "Qwen3NextForCausalLM": small(**MOE, **DELTA),
    "RecurrentGemmaForCausalLM": small(
        lru_width=32, attention_window_size=6, block_types=["recurrent", "attention"], num_hidden_layers=3
    ),
    "RwkvForCausalLM": {**IDS, "hidden_size": 32, "num_hidden_layers": 2, "context_length": 128},
    "SmolLM3ForCausalLM": small(),
    "StableLmForCausalLM": small(),
    "Starcoder2ForCausalLM": small(sliding_window=6),
    "XGLMForCausalLM": {
        **IDS, "d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4, "max_position_embeddings": 128,
        "init_std": 0.2,
    },
    "Gemma3ForConditionalGeneration": with_images(
        "gemma3_text", {**VISION, "model_type": "siglip_vision_model"}, {"query_pre_attn_scalar": 8, **HALF},
        mm_tokens_per_image=4, image_token_index=IMAGE, boi_token_index=START, eoi_token_index=END,
    ),
    "LlavaForConditionalGeneration": with_images(
        "llama", {**VISION, "model_type": "clip_vision_model", "projection_dim": 16}, {}, image_token_index=IMAGE
    ),
    "MllamaForConditionalGeneration": with_images(
        "mllama_text_model", MLLAMA_VISION,
        {"cross_attention_layers": [1], "rope_parameters": ROPE, "num_hidden_layers": 3, "bos_token_id": 2},
        image_token_index=VOCAB_SIZE - 1,
    ),
    "Qwen2_5_VLForConditionalGeneration": with_images(
        "qwen2_5_vl_text", QWEN_VISION, {"rope_parameters": {**ROPE, "mrope_section": [1, 1, 2]}}, **QWEN_IDS
    ),
    "Qwen3VLForConditionalGeneration": with_images(
        "qwen3_vl_text", {**QWEN_VISION, "deepstack_visual_indexes": [0]},
        {"rope_parameters": {**ROPE, "mrope_section": [2, 1, 1]}}, **QWEN_IDS,
    ),
    "SmolVLMForConditionalGeneration": with_images("llama", VISION, {}, image_token_id=IMAGE),
}  # fmt: skip
CONFIGS = {
    "GPT2LMHeadModel": "GPT2Config", "Gemma3ForCausalLM": "Gemma3TextConfig", "Llama4ForCausalLM": "Llama4TextConfig",
}  # fmt: skip


def build(row: str, seed: int = 0) -> PreTrainedModel:
    """The model of a row, float32, with random weights that follow from the seed."""
    name = CONFIGS.get(row) or row.removesuffix("ForCausalLM").removesuffix("ForConditionalGeneration") + "Config"
    torch.manual_seed(seed)
    return getattr(transformers, row)(getattr(transformers, name)(**ROWS[row])).eval()
