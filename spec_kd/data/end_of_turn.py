"""Which ids end what a target writes: those at which its server stops."""

import re
from collections.abc import Iterable

from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedTokenizerBase, ProcessorMixin

from spec_kd.vocabulary import ProcessingClass, get_tokenizer

PROBE = "Fine"


def find_end_ids(processing_class: ProcessingClass, eos_token_id: int | Iterable[int] | None = None) -> list[int]:
    """Ids that end a completion, the most certain ones first.

    They are the tokenizer's EOS, every EOS of the generation config, and, where the chat template ends a reply with
    none of them (Gemma's `<end_of_turn>`, Phi's `<|end|>` before a line break and the EOS), the token that it writes
    after a reply.

    Args:
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`): The target's.
        eos_token_id (`int` or `Iterable[int]`, *optional*): Of the target's generation config; by default read from
            where the processing class was loaded, if there is one.
    """
    tokenizer = get_tokenizer(processing_class)
    if eos_token_id is None:
        eos_token_id = _load_eos_token_ids(processing_class)
    given = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    if tokenizer.eos_token_id is not None:
        given.append(tokenizer.eos_token_id)
    after_reply = _find_end_after_reply(processing_class, get_texts(tokenizer, given))
    if after_reply is not None:
        given.append(tokenizer.convert_tokens_to_ids(after_reply))
    return list(dict.fromkeys(given))


def get_texts(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> dict[str, int]:
    """The texts that a template writes for added tokens, with their ids; ids of other tokens are left out."""
    added = tokenizer.added_tokens_decoder
    return {added[id].content: id for id in ids if id in added}


def find_first(text: str, parts: Iterable[str]) -> tuple[int, str] | None:
    """Where the first of `parts` stands in `text`, the longest of those that start there, and which it is."""
    pattern = "|".join(re.escape(part) for part in sorted(parts, key=len, reverse=True) if part)
    match = re.search(pattern, text) if pattern else None
    return None if match is None else (match.start(), match.group())


def _load_eos_token_ids(processing_class: ProcessingClass) -> list[int]:
    name = getattr(get_tokenizer(processing_class), "name_or_path", None)
    if not name:
        return []
    try:
        ids = GenerationConfig.from_pretrained(name).eos_token_id
    except (OSError, ValueError):
        return []
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def _find_end_after_reply(processing_class: ProcessingClass, known: dict[str, int]) -> str | None:
    """The token behind a reply where it is not a known end, or is not the same turn's."""
    if not processing_class.chat_template:
        return None
    wrap = (lambda text: [{"type": "text", "text": text}]) if isinstance(processing_class, ProcessorMixin) else str
    messages = [{"role": "user", "content": wrap("Hi")}, {"role": "assistant", "content": wrap(PROBE)}]
    try:
        rendered = processing_class.apply_chat_template(messages, tokenize=False)
    except (TemplateError, TypeError, ValueError, KeyError):  # a template of other messages: known ends have to do
        return None
    if PROBE not in rendered:
        return None
    after = rendered.rpartition(PROBE)[2]
    tokenizer = get_tokenizer(processing_class)
    first = find_first(after, [token.content for token in tokenizer.added_tokens_decoder.values()])
    end = find_first(after, known)
    if first is None:
        return None
    if end is None:
        return first[1]
    # a model writes no line break between two ends: what comes behind it, the template adds to the whole conversation
    between = after[first[0] + len(first[1]) : end[0]]
    return first[1] if end[0] > first[0] and "\n" in between else None
