"""Processors and configurations in place of those that the tiny multimodal models are published with."""

from collections.abc import Callable
from typing import Any

import transformers
from transformers import PretrainedConfig, ProcessorMixin

from benchmarks.trl_suite.tokenizers import build_tokenizer

IMAGE_SIDE = 56
LLAVA_VISION = {
    "model_type": "clip_vision_model", "image_size": IMAGE_SIDE, "patch_size": 14, "intermediate_size": 32,
    "projection_dim": 16,
}  # fmt: skip
SMALL = {"intermediate_size": 32, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6}

Build = Callable[..., tuple[ProcessorMixin, Callable[..., PretrainedConfig]]]


def build_processor(model_id: str, texts: list[str]) -> tuple[ProcessorMixin, Callable[..., PretrainedConfig]]:
    """The processor of a published model, and what makes a configuration of the parts that are made smaller.

    Args:
        model_id (`str`): A Hub id that starts with one of `BUILDERS`.
        texts (`list[str]`): What the tokenizer learns its merges from.
    """
    tokenizer = build_tokenizer(model_id, texts)
    build = next(build for name, build in BUILDERS.items() if model_id.startswith(name))
    return build(tokenizer)


def _with_ids(tokenizer: Any, text: dict[str, Any]) -> dict[str, Any]:
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return {**text, **ids, "vocab_size": len(tokenizer.vocab)}


def _qwen(name: str, **defaults: dict[str, Any]) -> Build:
    def build(tokenizer):
        family = "Qwen3VL" if name.startswith("Qwen3") else name
        video = "Qwen3VLVideoProcessor" if name.startswith("Qwen3") else "Qwen2VLVideoProcessor"
        side = {"min_pixels": 28 * 28, "max_pixels": IMAGE_SIDE**2}
        patches = {"patch_size": 16} if name.startswith("Qwen3") else {}
        processor = getattr(transformers, f"{family}Processor")(
            transformers.Qwen2VLImageProcessor(**side, **patches),
            tokenizer,
            getattr(transformers, video)(**patches),
            chat_template=tokenizer.chat_template,
        )
        ids = {
            f"{key}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
            for key, token in (("image", "image_pad"), ("video", "video_pad"), ("vision_start", "vision_start"),
                               ("vision_end", "vision_end"))
        }  # fmt: skip

        def configure(text_config, vision_config, **others):
            text = _with_ids(tokenizer, {**SMALL, **defaults.get("text", {}), **text_config})
            vision = {"intermediate_size": 32, **defaults.get("vision", {}), **vision_config}
            config_class = getattr(transformers, f"{name}Config")
            return config_class(text_config=text, vision_config=vision, **ids, tie_word_embeddings=False)

        return processor, configure

    return build


def _llava(name: str, text_type: str, **options: Any) -> Build:
    def build(tokenizer):
        image_processor = getattr(transformers, f"{name}ImageProcessor")(
            size={"shortest_edge": IMAGE_SIDE}, crop_size={"height": IMAGE_SIDE, "width": IMAGE_SIDE}, **options
        )
        processor = getattr(transformers, f"{name}Processor")(
            image_processor, tokenizer, patch_size=14, vision_feature_select_strategy="default",
            num_additional_image_tokens=1, chat_template=tokenizer.chat_template,
        )  # fmt: skip

        def configure(text_config, vision_config):
            text = _with_ids(tokenizer, {"model_type": text_type, **SMALL, **text_config})
            image_token = tokenizer.convert_tokens_to_ids("<image>")
            return getattr(transformers, f"{name}Config")(
                text_config=text, vision_config={**LLAVA_VISION, **vision_config}, image_token_index=image_token,
                image_seq_length=(IMAGE_SIDE // 14) ** 2, **options,
            )  # fmt: skip

        return processor, configure

    return build


def _gemma3(tokenizer):
    image_processor = transformers.Gemma3ImageProcessor(size={"height": 224, "width": 224})
    processor = transformers.Gemma3Processor(image_processor, tokenizer, chat_template=tokenizer.chat_template)

    def configure(text_config, vision_config):
        text = _with_ids(tokenizer, {"head_dim": 8, **SMALL, **text_config})
        return transformers.Gemma3Config(
            text_config=text, vision_config={"patch_size": 14, "vision_use_head": False, **vision_config},
            mm_tokens_per_image=256,
            boi_token_index=tokenizer.boi_token_id, eoi_token_index=tokenizer.eoi_token_id,
            image_token_index=tokenizer.image_token_id,
        )  # fmt: skip

    return processor, configure


def _gemma4(tokenizer):
    processor = transformers.Gemma4Processor(
        transformers.Gemma4AudioFeatureExtractor(), transformers.Gemma4ImageProcessor(), tokenizer,
        transformers.Gemma4VideoProcessor(), chat_template=tokenizer.chat_template,
    )  # fmt: skip

    def configure():
        layers = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
        text = _with_ids(
            tokenizer,
            {"head_dim": 8, "vocab_size_per_layer_input": len(tokenizer.vocab), "num_kv_shared_layers": 0, **layers},
        )
        return transformers.Gemma4Config(
            text_config=text, vision_config={"head_dim": 4}, audio_config=None,
            image_token_id=tokenizer.image_token_id, boi_token_id=tokenizer.boi_token_id,
            eoi_token_id=tokenizer.eoi_token_id, audio_token_id=tokenizer.audio_token_id,
            boa_token_id=tokenizer.boa_token_id, eoa_token_id=tokenizer.eoa_token_id,
            video_token_id=tokenizer.convert_tokens_to_ids("<|video|>"),
        )  # fmt: skip

    return processor, configure


BUILDERS: dict[str, Build] = {
    "google/gemma-3": _gemma3,
    "google/gemma-4": _gemma4,
    "llava-hf/llava-1.5": _llava("Llava", "llama"),
    "llava-hf/llava-v1.6": _llava("LlavaNext", "mistral", image_grid_pinpoints=[[56, 112], [112, 56]]),
    "Qwen/Qwen2-VL": _qwen("Qwen2VL"),
    "Qwen/Qwen2.5-VL": _qwen("Qwen2_5_VL"),
    "Qwen/Qwen3-VL": _qwen("Qwen3VL", text={"head_dim": 12}),
    "Qwen/Qwen3.5": _qwen("Qwen3_5", text={"head_dim": 16}),
    "Qwen/Qwen3.6": _qwen("Qwen3_5Moe", text={"head_dim": 16}),
}
