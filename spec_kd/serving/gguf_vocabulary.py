"""The vocabulary of a model as llama.cpp's converter writes it into a GGUF file, without writing one."""

import json
from dataclasses import dataclass

from spec_kd.open_types import JsonObject, JsonValue
from spec_kd.serving.pair import ServedModel


@dataclass(frozen=True)
class GgufVocabulary:
    """What `common_speculative_are_compatible` (common/speculative.cpp, October 2026) compares.

    Args:
        kind (`str`): Type of tokenizer: `"BPE"`, `"SentencePiece"`, `"WordPiece"` or `"Unigram"`.
        texts (`tuple[str, ...]`): Text of each id; rows that no token has are `[PAD...]`.
        bos, eos (`int`, *optional*): The ids that are added around a text; `None` if none is.
    """

    kind: str
    texts: tuple[str, ...]
    bos: int | None
    eos: int | None


def read_gguf_vocabulary(model: ServedModel) -> GgufVocabulary:
    """The vocabulary that the GGUF file of a model would have.

    The rules are those of `conversion/base.py` and `SpecialVocab` in `gguf-py/gguf/vocab.py`.
    """
    backend = getattr(model.tokenizer, "backend_tokenizer", None)
    stored: JsonObject = json.loads(backend.to_str()) if backend is not None else {}
    kind = _find_kind(stored.get("model"))
    texts = {number: token for token, number in model.tokens.items()}
    first, last = _find_added(stored.get("post_processor"))
    added = {}
    for name, token, place in (("bos", model.tokenizer.bos_token, first), ("eos", model.tokenizer.eos_token, last)):
        is_added = (
            place == token if stored.get("post_processor") else model.tokenizer.init_kwargs.get(f"add_{name}_token")
        )
        if is_added is None:  # what llama.cpp has for a file that does not say
            is_added = kind in {"bos": ("SentencePiece", "WordPiece"), "eos": ("Unigram",)}[name]
        added[name] = model.tokens.get(token) if is_added and token else None
    return GgufVocabulary(kind, tuple(texts.get(number, f"[PAD{number}]") for number in range(model.rows)), **added)


def _find_kind(model: JsonValue) -> str:
    """The type of tokenizer; one that is stored as a SentencePiece model alone has no `model`."""
    if model is None or (model["type"] == "BPE" and model.get("byte_fallback")):
        return "SentencePiece"
    return model["type"]


def _find_added(post_processor: JsonValue) -> tuple[str | None, str | None]:
    """The tokens that a post-processor puts first and last."""
    first = last = None
    for part in (post_processor or {}).get("processors", [post_processor]):
        if part and part["type"] == "TemplateProcessing" and len(part["single"]) > 1:
            first = part["single"][0].get("SpecialToken", {}).get("id")
            last = part["single"][-1].get("SpecialToken", {}).get("id")
    return first, last
