"""Tokenizers in place of those that the tiny models are published with: small, with the same special tokens."""

from dataclasses import dataclass
from importlib.resources import files

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

# the alphabet, and merges enough that a common word is one token, as in the tokenizers they stand for
VOCAB_SIZE = 1500


@dataclass(frozen=True)
class Family:
    """What makes a model's tokenizer its own.

    Args:
        template (`str`, *optional*): Name of the chat template in `trl.chat_templates`.
        eos, pad, bos (`str`): Special tokens; `bos` is optional.
        others (`tuple[str, ...]`): Further special tokens, of the template or of images.
        named (`dict[str, str]`): Special tokens that a processor asks for by name.
    """

    template: str | None
    eos: str
    pad: str
    bos: str | None = None
    others: tuple[str, ...] = ()
    named: tuple[tuple[str, str], ...] = ()


CHATML = ("<|im_start|>", "<|im_end|>")
QWEN = (*CHATML, "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
LLAMA = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
HARMONY = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>", "<|return|>")
COHERE = ("<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|START_RESPONSE|>",
          "<|END_RESPONSE|>")  # fmt: skip
GLM = ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<think>", "</think>")
GEMMA4 = ("<|turn>", "<|think|>", "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>",
          "<tool_response|>", "<|channel>", "<channel|>", '<|"|>', "<|video|>")  # fmt: skip


def _qwen(template: str, *others: str) -> Family:
    return Family(template, "<|im_end|>", "<|endoftext|>", others=(*QWEN, *others))


FAMILIES = {
    "Qwen/Qwen2.5-VL": _qwen("qwen2_5_vl", *VISION),
    "Qwen/Qwen2-VL": _qwen("qwen2_5_vl", *VISION),
    "Qwen/Qwen3-VL": _qwen("qwen3_vl", *VISION),
    "Qwen/Qwen3.5": _qwen("qwen3_5_nothink", *VISION),
    "Qwen/Qwen3.6": _qwen("qwen3_6", *VISION),
    "Qwen/Qwen2.5": _qwen("qwen2_5"),
    "Qwen/Qwen3": _qwen("qwen3"),
    "openai/gpt-oss": Family("gptoss", "<|return|>", "<|endoftext|>", others=HARMONY),
    "CohereLabs/tiny-aya": Family("cohere2", "<|END_OF_TURN_TOKEN|>", "<PAD>", "<BOS_TOKEN>", COHERE),
    "zai-org/GLM": Family("glm4moe", "<|endoftext|>", "<|endoftext|>", others=GLM),
    "nvidia/NVIDIA-Nemotron": Family("nemotron_3_nano", "<|im_end|>", "<unk>", "<s>", QWEN),
    "allenai/Olmo-3": Family("qwen3", "<|endoftext|>", "<|pad|>", others=CHATML),
    "LiquidAI/LFM2.5": Family("lfm2_2_5", "<|im_end|>", "<|pad|>", "<|startoftext|>", (*QWEN, "<image>")),
    "LiquidAI/LFM2": Family("lfm2", "<|im_end|>", "<|pad|>", "<|startoftext|>", QWEN),
    "EleutherAI/pythia": Family(None, "<|endoftext|>", "<|padding|>"),
    "meta-llama/Llama-3": Family("llama3_2", "<|eot_id|>", "<|finetune_right_pad_id|>", "<|begin_of_text|>", LLAMA),
    "google/gemma-3": Family(
        "gemma3", "<eos>", "<pad>", "<bos>", ("<start_of_turn>", "<end_of_turn>"),
        (("image_token", "<image_soft_token>"), ("boi_token", "<start_of_image>"), ("eoi_token", "<end_of_image>")),
    ),
    "google/gemma-4": Family(
        "gemma4_v5", "<turn|>", "<pad>", "<bos>", GEMMA4,
        (("image_token", "<|image|>"), ("boi_token", "<|image>"), ("eoi_token", "<image|>"),
         ("audio_token", "<|audio|>"), ("boa_token", "<|audio>"), ("eoa_token", "<audio|>")),
    ),
    "llava-hf/llava-1.5": Family("llava_next", "</s>", "<pad>", "<s>", ("<image>",)),
    "llava-hf/llava-v1.6": Family("llava_next", "</s>", "<pad>", "<s>", ("<image>",)),
}  # fmt: skip


def build_tokenizer(model_id: str, texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of `texts` with the special tokens and the chat template of a published model.

    Args:
        model_id (`str`): A Hub id that starts with one of `FAMILIES`.
        texts (`list[str]`): What its merges are learned from.

    Raises:
        KeyError: For a model of none of them.
    """
    name = next((name for name in FAMILIES if model_id.startswith(name)), None)
    if name is None:
        raise KeyError(f"No tokenizer stands for that of {model_id}. Add it to `FAMILIES`.")
    family = FAMILIES[name]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = dict.fromkeys(
        token for token in (family.pad, family.bos, family.eos, *family.others, *dict(family.named).values()) if token
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    template = None
    if family.template is not None:
        template = files("trl").joinpath("chat_templates", f"{family.template}.jinja").read_text(encoding="utf-8")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=family.eos,
        pad_token=family.pad,
        bos_token=family.bos,
        extra_special_tokens=dict(family.named),
        chat_template=template,
    )
