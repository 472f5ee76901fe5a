"""Ids that end a completion: those at which the target's server stops."""

import re
from collections.abc import Iterable
from contextlib import suppress
from typing import cast

from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedTokenizerBase, ProcessorMixin

from spec_kd.open_types import JsonValue
from spec_kd.vocabulary import ProcessingClass, get_tokenizer

PROBE = "Zqxjv"  # a text that no template changes or has


def find_end_ids(processing_class: ProcessingClass, eos_token_id: int | Iterable[int] | None = None) -> list[int]:
    """Ids that end a completion, the most certain ones first.

    They are the tokenizer's EOS, every EOS of the generation config, and, where the chat template ends a reply with
    none of them (Gemma's `<end_of_turn>`, Phi's `<|end|>` before a line break and the EOS), the token that it writes
    after a reply.

    Args:
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`): The target's tokenizer.
        eos_token_id (`int` or `Iterable[int]`, *optional*): EOS ids of the target's generation config. By default they
            are read from the folder that the processing class was loaded from.
    """
    tokenizer = get_tokenizer(processing_class)
    if eos_token_id is None:
        eos_token_id = _load_eos_token_ids(processing_class)
    given = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    if tokenizer.eos_token_id is not None:
        given.append(tokenizer.eos_token_id)
    turn_end = find_turn_end_id(processing_class, given)
    return list(dict.fromkeys(given if turn_end is None else [*given, turn_end]))


def find_turn_end_id(processing_class: ProcessingClass, end_ids: Iterable[int]) -> int | None:
    """The id that the chat template, and so the target, writes after a reply: one of `end_ids` if there is one.

    Args:
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`): The target's tokenizer.
        end_ids (`Iterable[int]`): Ids that end a completion.

    Returns:
        `int`, *optional*: `None` without a chat template, and where it writes no added token after a reply.
    """
    if not processing_class.chat_template:
        return None
    wrap = (lambda text: [{"type": "text", "text": text}]) if isinstance(processing_class, ProcessorMixin) else str
    messages: JsonValue = [{"role": "user", "content": wrap("Hi")}, {"role": "assistant", "content": wrap(PROBE)}]
    try:
        rendered = cast(str, processing_class.apply_chat_template(messages, tokenize=False))
    except (TemplateError, TypeError, ValueError, KeyError):  # a template of other messages: known ends have to do
        return None
    if PROBE not in rendered:
        return None
    after = rendered.rpartition(PROBE)[2]
    tokenizer = get_tokenizer(processing_class)
    texts = {token.content: id for id, token in tokenizer.added_tokens_decoder.items()}
    first, end = find_first(after, texts), find_first(after, get_texts(tokenizer, end_ids))
    if first is None:
        return None
    # a model writes no line break between two ends: the template adds what comes after it to the whole conversation
    is_other = end is not None and end[0] > first[0] and "\n" in after[first[0] + len(first[1]) : end[0]]
    return texts[(first if end is None or is_other else end)[1]]


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
    name, ids = getattr(get_tokenizer(processing_class), "name_or_path", None), None
    with suppress(OSError, ValueError):
        ids = GenerationConfig.from_pretrained(name).eos_token_id if name else None
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
