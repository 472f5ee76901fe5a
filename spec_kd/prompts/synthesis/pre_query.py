"""The chat template up to where the user's text starts, and what ends that text, for any model.

An aligned model that is given no more than this writes the user's text itself (Magpie, Xu et al. 2024,
arXiv 2406.08464). Nothing here knows a model: everything is read off the template, rendered with probe texts in the
user's place.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jinja2

from spec_kd.vocabulary import ProcessingClass, get_tokenizer

# Texts that no template changes (no white space at the ends, nothing to escape). Their first characters share no byte
# and no class, so that no token from before them is the same for all unless it ends before them.
PROBES = ("Zqxjv", "4829107365?", "鱻龘")


@dataclass(frozen=True)
class TurnEnd:
    """What ends the user's turn; it is what the target writes when its query is complete.

    Args:
        ids (`tuple[int, ...]`): Ids each of which ends it: the template's own token, where it has one, and the EOS.
        text (`str`): Where the template ends the turn with ordinary text, such as `"ASSISTANT:"`; else empty.
    """

    ids: tuple[int, ...]
    text: str = ""


def derive_pre_query(
    processing_class: ProcessingClass,
    *,
    system_prompt: str | None = None,
    tools: Sequence[Mapping[str, object]] | None = None,
    messages: Sequence[Mapping[str, object]] = (),
    chat_template_kwargs: Mapping[str, object] | None = None,
) -> list[int]:
    """The ids with which every conversation begins that goes on with a user's turn, up to that user's text.

    The chat template is rendered with different texts in the user's place, and what the ids of all have in common is
    the prefix. A token that would span the border (as `" Hello"` behind `"[INST] "`) is left to the target, which so
    writes the ids that it would have read.

    Args:
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`): The target's, with its chat template.
        system_prompt (`str`, *optional*):
            By default none, and a template that has one of its own (Qwen2.5) shows that; `""` for an empty one.
        tools (`list[dict]`, *optional*): Schemas that the template shows.
        messages (`list[dict]`): Earlier turns of user and assistant; the next one is the user's.
        chat_template_kwargs (`dict`, *optional*): Further variables of the template.

    Returns:
        `list[int]`, at least one id.

    Raises:
        `ValueError`: There is no chat template; it refuses the conversation, shows the user's text never or more than
            once, or does not show the system prompt or the tools; or nothing stands before the user's text.
    """
    rendered = _render_probes(processing_class, system_prompt, tools, messages, chat_template_kwargs)
    before = rendered[0].partition(PROBES[0])[0]
    if system_prompt and system_prompt.strip() not in before:
        raise ValueError(
            f"The chat template does not show the system prompt {system_prompt!r:.60} before the user's turn, so it "
            "cannot steer what the target asks. Leave it out, or give the processing class a template that shows it."
        )
    hidden = [name for name in map(_get_tool_name, tools or ()) if name not in before]
    if hidden:
        raise ValueError(
            f"The chat template does not show tools before the user's turn (missing: {', '.join(hidden)}). Write "
            "`{tools}` into the system prompt, where `synthesize_queries` puts them as JSON, or give the processing "
            "class a template that shows them."
        )
    tokenizer = get_tokenizer(processing_class)
    encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in rendered]
    length = next((i for i, ids in enumerate(zip(*encoded, strict=False)) if len(set(ids)) > 1), 0)
    if not length:
        raise ValueError(
            "The chat template puts nothing before the user's text, so the target cannot be told to write it."
        )
    return list(encoded[0][:length])


def derive_turn_end(
    processing_class: ProcessingClass, *, chat_template_kwargs: Mapping[str, object] | None = None
) -> TurnEnd:
    """What comes right behind the user's text: the id that ends the turn, or the text.

    Args:
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`): The target's, with its chat template.
        chat_template_kwargs (`dict`, *optional*): Further variables of the template.

    Raises:
        `ValueError`: As of [`derive_pre_query`], or nothing stands behind the user's text and there is no EOS.
    """
    text = _render_probes(processing_class, None, None, (), chat_template_kwargs)[0]
    behind = text.partition(PROBES[0])[2]
    tokenizer = get_tokenizer(processing_class)
    added = tokenizer.get_added_vocab()
    # The first one, and of those that begin at the same place the longest.
    found = min((token for token in added if token in behind), key=lambda t: (behind.index(t), -len(t)), default=None)
    plain = (behind if found is None else behind[: behind.index(found)]).strip()
    ids = {tokenizer.eos_token_id} - {None}
    if found is not None and not plain:
        ids.add(added[found])
    if not ids and not plain:
        raise ValueError("The chat template puts nothing behind the user's text, and the tokenizer has no EOS token.")
    return TurnEnd(tuple(sorted(ids)), plain)


def cut_user_text(
    ids: Sequence[int], finish_reason: str, turn_end: TurnEnd, processing_class: ProcessingClass
) -> tuple[str, str | None]:
    """The user's text in what the target wrote after a pre-query, however far it wrote on behind it.

    Args:
        ids (`Sequence[int]`): The completion.
        finish_reason (`str`): `"stop"` where its last id is one that the engine stops at.
        turn_end (`TurnEnd`): Of the target.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`): The target's.

    Returns:
        `tuple[str, str | None]`: The text without white space at its ends, and what is wrong with it:
        `"unfinished"` where the turn was never ended, `"special_tokens"` where there are such inside it, else `None`.
    """
    tokenizer = get_tokenizer(processing_class)
    # Not `all_special_ids`, which lacks those without a role of their own, such as Llama's `<|start_header_id|>`.
    special = {id: str(token) for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    end = next((i for i, token in enumerate(ids) if token in turn_end.ids), None)
    is_finished = end is not None or finish_reason == "stop"
    if end is None and finish_reason == "stop":
        end = len(ids) - 1
    query = list(ids[:end])
    text = tokenizer.decode(query, clean_up_tokenization_spaces=False)
    if turn_end.text and turn_end.text in text:
        # Ids after the end do not matter, and where in them it lies is not known: look at the text alone.
        text = text.partition(turn_end.text)[0]
        has_special = any(token in text for token in special.values())
        is_finished = True
    else:
        has_special = not special.keys().isdisjoint(query)
    fault = "special_tokens" if has_special else None if is_finished else "unfinished"
    return text.strip(), fault


def _render_probes(
    processing_class: ProcessingClass,
    system_prompt: str | None,
    tools: Sequence[Mapping[str, object]] | None,
    messages: Sequence[Mapping[str, object]],
    chat_template_kwargs: Mapping[str, object] | None,
) -> list[str]:
    """The conversation with each probe as its last user turn."""
    if not processing_class.chat_template:
        raise ValueError(
            "The target's processing class has no chat template, so there is no user's turn to write: set "
            "`processing_class.chat_template`."
        )
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    rendered = []
    for probe in PROBES:
        try:
            text = processing_class.apply_chat_template(
                [*system, *messages, {"role": "user", "content": probe}],
                tools=list(tools) if tools else None,
                add_generation_prompt=True,
                tokenize=False,
                **(chat_template_kwargs or {}),
            )
        except jinja2.TemplateError as error:
            with_system = " with a system prompt" if system else ""
            hint = (
                " Leave the system prompt out, or give the processing class a template that has one." if system else ""
            )
            raise ValueError(f"The chat template refuses a conversation{with_system}: {error}.{hint}") from error
        if text.count(probe) != 1:
            raise ValueError(
                f"The chat template shows the user's text {text.count(probe)} times instead of once, so it cannot be "
                "said where it starts. Give the processing class another chat template."
            )
        rendered.append(text)
    return rendered


def _get_tool_name(tool: Mapping[str, object]) -> str:
    return str(tool.get("function", tool)["name"])
