"""What the chat template writes around a message: the ids that end a completion, and the marks of a prompt."""

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
    rendered = _render_probe(processing_class, ("user", "Hi"), ("assistant", PROBE))
    if rendered is None:
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


def find_template_marks(processing_class: ProcessingClass) -> list[str]:
    """The texts that mark a prompt as rendered by the chat template: one of them stands in every such prompt.

    They are the added tokens that the template writes around a message, but for white space and for what the tokenizer
    adds to any text (BOS). A template without such tokens is known by the text between the message and the completion.

    Args:
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`): The target's tokenizer.

    Returns:
        `list[str]`: Empty without a chat template, and where it writes nothing of its own.
    """
    # the generation prompt can open a reasoning, which a prompt without the template may do as well
    turn, prompt = (
        _render_probe(processing_class, ("user", PROBE), add_generation_prompt=one) for one in (False, True)
    )
    if turn is None or prompt is None:
        return []
    tokenizer = get_tokenizer(processing_class)
    added = get_texts(tokenizer, set(tokenizer.added_tokens_decoder) - set(tokenizer("")["input_ids"]))
    marks = [text for text in added if text.strip() and text in turn]
    return marks or [text for text in [prompt.rpartition(PROBE)[2].strip()] if text]


def _render_probe(
    processing_class: ProcessingClass, *turns: tuple[str, str], add_generation_prompt: bool = False
) -> str | None:
    """A conversation of roles and texts, by the chat template; `None` without one, or if it does not show `PROBE`."""
    if not processing_class.chat_template:
        return None
    wrap = (lambda text: [{"type": "text", "text": text}]) if isinstance(processing_class, ProcessorMixin) else str
    messages: JsonValue = [{"role": role, "content": wrap(text)} for role, text in turns]
    try:
        rendered = processing_class.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, tokenize=False
        )
    except (TemplateError, TypeError, ValueError, KeyError):  # a template of other messages: known ends have to do
        return None
    return cast(str, rendered) if PROBE in rendered else None


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
