"""Pairs of a tiny draft and a tiny target, each with one thing that some engine does not forgive.

`write_pair` writes one into a folder, with random weights if an engine is to be started on it. `expected` names the
checks of [`check_serving`] that must find it in each engine, and no others; the first pair has nothing wrong.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from spec_kd import align_vocabulary

ENGINES = ("transformers", "vllm", "sglang", "llama.cpp", "tensorrt-llm", "mlx-lm", "openvino")
SPECIAL_TOKENS = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
LAST_TOKEN = "<|tool|>"
MERGES = (("t", "h"), ("th", "e"), ("a", "n"))
NUM_IDS = len(SPECIAL_TOKENS) + 256 + len(MERGES) + 1
ROWS = 272  # rounded up, as checkpoints are
MAX_LENGTH = 512
TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
SIZES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2},
    "olmo3": {
        "hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
        "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64,
    },
    "mamba": {"hidden_size": 48, "state_size": 8},
    "lfm2": {
        "hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
        "layer_types": ["conv", "full_attention"],
    },
    "t5": {"d_model": 48, "d_ff": 96, "num_heads": 4, "decoder_start_token_id": 0},
}  # fmt: skip


@dataclass(frozen=True)
class BrokenPair:
    """One thing that is wrong with a pair.

    Args:
        name (`str`): What is wrong.
        expected (`dict[str, set[str]]`): Names of the checks that find it, by engine; no engine has others.
        draft, target (`dict`): Changes of the configurations; `model_type` chooses another architecture.
        draft_tokenizer, target_tokenizer (`dict`): Options of `build_tokenizer`.
        draft_defaults, target_defaults (`dict`): Their `generation_config.json`.
        draft_folder (`str`): Name of the draft's folder.
        options (`dict`): Keywords of `check_serving`.
    """

    name: str
    expected: Mapping[str, set[str]] = field(default_factory=dict)
    draft: Mapping[str, Any] = field(default_factory=dict)
    target: Mapping[str, Any] = field(default_factory=dict)
    draft_tokenizer: Mapping[str, Any] = field(default_factory=dict)
    target_tokenizer: Mapping[str, Any] = field(default_factory=dict)
    draft_defaults: Mapping[str, Any] = field(default_factory=dict)
    target_defaults: Mapping[str, Any] = field(default_factory=dict)
    draft_folder: str = "draft"
    options: Mapping[str, Any] = field(default_factory=dict)


def build_tokenizer(
    *,
    kind: str = "BPE",
    template: str = TEMPLATE,
    renamed: Mapping[str, str] | None = None,
    added: Iterable[str] = (),
    first: str | None = None,
    merges: Sequence[tuple[str, str]] = MERGES,
    **options: Any,
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with 265 ids.

    Args:
        kind (`str`, *optional*, defaults to `"BPE"`): `"BPE"`, or `"SentencePiece"` with the same tokens.
        template (`str`, *optional*): Chat template.
        renamed (`Mapping[str, str]`, *optional*): Other texts of special tokens.
        added (iterable of `str`, *optional*): Tokens that are added at the end.
        first (`str`, *optional*): BOS token, which is put before each text; none by default.
        merges (sequence of pairs, *optional*): Pairs of tokens that become one.
        options: More arguments of `PreTrainedTokenizerFast`.
    """
    names = {token: (renamed or {}).get(token, token) for token in (*SPECIAL_TOKENS, LAST_TOKEN)}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merged = ["".join(pair) for pair in merges]
    tokens = [*list(names.values())[:-1], *alphabet, *merged, names[LAST_TOKEN]]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, list(merges), byte_fallback=kind == "SentencePiece"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel()]) if kind == "SentencePiece" else decoders.ByteLevel()
    tokenizer.add_special_tokens(list(names.values()))
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    if first is not None:
        template_of_ids = processors.TemplateProcessing(f"{first} $A", special_tokens=[(first, vocabulary[first])])
        tokenizer.post_processor = processors.Sequence([tokenizer.post_processor, template_of_ids])
        options["bos_token"] = first
    found = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=template,
        **{"pad_token": names["<|pad|>"], "eos_token": names["<|end|>"], **options},
    )
    found.add_tokens(list(added))
    return found


def write_model(
    folder: Path,
    changes: Mapping[str, Any],
    tokenizer: Mapping[str, Any],
    defaults: Mapping[str, Any],
    *,
    seed: int,
    with_weights: bool,
    is_trained: bool = False,
) -> None:
    """Writes a model into a folder; without weights it has what `check_serving` reads.

    One that `is_trained` proposes no id beyond those of its tokenizer.
    """
    changes = dict(changes)
    model_type = changes.pop("model_type", "llama")
    quantization = changes.pop("quantization_config", None)
    options = {
        "vocab_size": ROWS, "num_hidden_layers": 2, "max_position_embeddings": MAX_LENGTH, "pad_token_id": 0,
        "bos_token_id": None, "eos_token_id": 1, "tie_word_embeddings": False, "initializer_range": 0.1,
        "dtype": "float32",
    }  # fmt: skip
    config = CONFIG_MAPPING[model_type](**{**options, **SIZES[model_type], **changes})
    folder.mkdir(parents=True)
    if with_weights:
        torch.manual_seed(seed)
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model = kind.from_config(config)
        if is_trained:
            align_vocabulary(model, config.vocab_size, NUM_IDS)
        model.save_pretrained(folder)
    else:
        config.save_pretrained(folder)
    if quantization is not None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": quantization}))
    build_tokenizer(**tokenizer).save_pretrained(folder)
    GenerationConfig(eos_token_id=1, pad_token_id=0, **defaults).save_pretrained(folder)


def write_pair(pair: BrokenPair, folder: Path, *, with_weights: bool = False) -> tuple[Path, Path]:
    """Writes a pair into a folder; returns the draft's and the target's."""
    draft, target = folder / pair.draft_folder, folder / "target"
    changes = pair.draft if "model_type" in pair.draft else {"hidden_size": 32, "intermediate_size": 64, **pair.draft}
    write_model(draft, changes, pair.draft_tokenizer, pair.draft_defaults, seed=0, with_weights=with_weights)
    write_model(
        target, pair.target, pair.target_tokenizer, pair.target_defaults, seed=1, with_weights=with_weights,
        is_trained=True,
    )  # fmt: skip
    return draft, target


def expect(everywhere: str | None = None, without: Iterable[str] = (), **names: str) -> dict[str, set[str]]:
    """Names of checks by engine: one that all engines have but some, and those of single engines.

    Args:
        everywhere (`str`, *optional*): Check of every engine.
        without (iterable of `str`, *optional*): Engines that do not have it.
        names: Check of an engine, with `_` in place of `.` and `-`.
    """
    found = {engine: {everywhere} for engine in ENGINES if everywhere and engine not in without}
    for engine, name in names.items():
        written = next(one for one in ENGINES if engine == one.replace(".", "_").replace("-", "_"))
        found[written] = found.get(written, set()) | set(name.split())
    return found


SOUND = BrokenPair("sound")
PAIRS = (
    SOUND,
    BrokenPair(
        "more_rows",
        expect(transformers="unequal_rows", vllm="unequal_rows", sglang="unequal_rows", llama_cpp="surplus_rows"),
        {"vocab_size": 304},
    ),
    BrokenPair(
        "fewer_rows",
        expect(transformers="unequal_rows", vllm="unequal_rows", sglang="unequal_rows"),
        target={"vocab_size": 304},
    ),
    BrokenPair(
        "many_more_rows",
        expect(transformers="unequal_rows", vllm="unequal_rows", sglang="unequal_rows", llama_cpp="distant_rows"),
        {"vocab_size": 512},
    ),
    BrokenPair(
        "rows_missing",
        expect(transformers="unequal_rows", vllm="unequal_rows", sglang="unequal_rows", llama_cpp="missing_rows"),
        {"vocab_size": 256},
    ),
    BrokenPair(
        "other_token",
        expect("different_tokens", without=["llama.cpp"], llama_cpp="other_token_text"),
        draft_tokenizer={"renamed": {LAST_TOKEN: "<|call|>"}},
    ),
    BrokenPair(
        "other_vocabulary",
        expect("different_tokens", without=["llama.cpp"], llama_cpp="other_token_text", mlx_lm="other_vocabulary_size"),
        draft_tokenizer={"merges": MERGES[:2]},
    ),
    BrokenPair(  # ids below 5 may differ in llama.cpp
        "other_early_token",
        expect("different_tokens", without=["llama.cpp"]),
        draft_tokenizer={"renamed": {"<|user|>": "<|human|>"}},
    ),
    BrokenPair(
        "added_token",
        expect("different_tokens", without=["llama.cpp"], llama_cpp="other_token_text"),
        draft_tokenizer={"added": ["<|extra|>"]},
    ),
    BrokenPair(
        "other_tokenizer_type",
        expect(llama_cpp="other_tokenizer_type"),
        {"vocab_size": NUM_IDS},
        {"vocab_size": NUM_IDS},
        draft_tokenizer={"kind": "SentencePiece"},
    ),
    BrokenPair(
        "padded_sentencepiece",
        expect(llama_cpp="unpadded_rows"),
        draft_tokenizer={"kind": "SentencePiece"},
        target_tokenizer={"kind": "SentencePiece"},
    ),
    BrokenPair(
        "bos_added",
        expect(
            "different_special_tokens",
            without=["llama.cpp"],
            llama_cpp="other_added_token",
            openvino="longer_sentence",
        ),
        draft_tokenizer={"first": "<|system|>"},
    ),
    BrokenPair(
        "other_eos",
        expect("different_special_tokens", without=["llama.cpp"]),
        draft_tokenizer={"eos_token": "<|assistant|>"},
    ),
    BrokenPair("other_template", expect("different_template"), draft_tokenizer={"template": "{{ messages }}"}),
    BrokenPair(
        "parallel_draft",
        expect(
            "parallel_draft", without=["vllm", "tensorrt-llm"], vllm="longer_round", tensorrt_llm="longer_round"
        ),
        {"pard_token": 4, "num_parallel_tokens": 4},
        options={"num_assistant_tokens": 5},
    ),
    BrokenPair("short_draft", expect("short_draft"), {"max_position_embeddings": 128}),
    BrokenPair(
        "recurrent_draft",
        expect(
            "recurrent_draft",
            without=["transformers", "tensorrt-llm", "llama.cpp"],
            transformers="attention_free_draft",
            llama_cpp="lone_recurrent_draft",
        ),
        {"model_type": "mamba"},
    ),
    BrokenPair(
        "hybrid_draft", expect(
            "recurrent_draft",
            without=["transformers", "tensorrt-llm", "llama.cpp"],
            llama_cpp="lone_recurrent_draft",
        ),
        {"model_type": "lfm2"},
    ),
    BrokenPair(
        "recurrent_target",
        expect(
            transformers="stateful_target",
            llama_cpp="recurrent_target",
            mlx_lm="recurrent_target",
            openvino="recurrent_target",
        ),
        target={"model_type": "mamba"},
    ),
    BrokenPair(
        "hybrid_target",
        expect(llama_cpp="recurrent_target", mlx_lm="recurrent_target", openvino="recurrent_target"),
        target={"model_type": "lfm2"},
    ),
    BrokenPair(
        "recurrent_pair",
        expect(
            transformers="stateful_target attention_free_draft",
            vllm="recurrent_draft",
            sglang="recurrent_draft",
            llama_cpp="recurrent_target",
            mlx_lm="recurrent_target recurrent_draft",
            openvino="recurrent_target recurrent_draft",
        ),
        {"model_type": "mamba"},
        {"model_type": "mamba"},
    ),
    BrokenPair("windowed_draft", expect(mlx_lm="short_window_draft"), {"model_type": "olmo3"}),
    BrokenPair("windowed_target", expect(mlx_lm="short_window_target"), target={"model_type": "olmo3"}),
    BrokenPair(
        "multimodal_positions",
        expect(vllm="multimodal_rope"),
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}},
    ),
    BrokenPair(
        "heads",
        expect(vllm="unsplittable_heads", sglang="unsplittable_heads", tensorrt_llm="unsplittable_heads"),
        {"num_attention_heads": 2, "num_key_value_heads": 2},
        options={"tensor_parallel_size": 4},
    ),
    BrokenPair(
        "float32_draft",
        expect(vllm="other_precision", transformers="wide_draft", mlx_lm="wide_draft"),
        target={"dtype": "bfloat16"},
    ),
    BrokenPair(
        "quantized_draft",
        expect(llama_cpp="unreadable_weights", mlx_lm="unreadable_weights"),
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
    ),
    BrokenPair(
        "penalized_target",
        expect(vllm="target_penalty", sglang="target_penalty"),
        target_defaults={"repetition_penalty": 1.2},
    ),
    BrokenPair("min_p", expect(vllm="min_p"), target_defaults={"do_sample": True, "min_p": 0.05}),
    BrokenPair(
        "sampling_target",
        expect(vllm="sampling_defaults", sglang="sampling_defaults"),
        target_defaults={"do_sample": True, "temperature": 0.6, "top_k": 20},
    ),
    BrokenPair("early_end", expect(transformers="early_end"), draft_defaults={"assistant_confidence_threshold": 0.8}),
    BrokenPair("misread_name", expect(vllm="misread_name"), draft_folder="bald-eagle-small"),
    BrokenPair("encoder", expect("encoder_decoder", without=["transformers"]), {"model_type": "t5"}),
)  # fmt: skip
