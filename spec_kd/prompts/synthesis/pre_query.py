"""Derives from a chat template what stands before the user's text, and what ends that text, for any model.

An aligned model that gets only what stands before the user's text writes this text itself (Magpie, Xu et al. 2024,
arXiv 2406.08464). Nothing here is made for a certain model: the template is rendered with probe texts in place of the
user's text.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jinja2

from spec_kd.open_types import JsonObject, JsonValue, Record
from spec_kd.prompts.synthesis.options import SynthesisOptions
from spec_kd.vocabulary import ProcessingClass, get_tokenizer

# Texts that no template changes: they have no white space at the ends, and nothing to escape. Their first characters
# share no byte and no class, so a token that all renderings have in common ends before the probe.
PROBES = ("Zqxjv", "4829107365?", "鱻龘")


@dataclass(frozen=True)
class TurnEnd:
    """The end of the user's turn, which the target writes after the user's text.

    Args:
        ids (`tuple[int, ...]`): Ids that end the turn: the template's own token, if it has one, and the EOS.
        text (`str`, *optional*, defaults to `""`): Ordinary text with which the template ends the turn, such as
            `"ASSISTANT:"`; empty for a template that ends it with a token.
    """

    ids: tuple[int, ...]
    text: str = ""


def derive_pre_query(
    processing_class: ProcessingClass,
    *,
    system_prompt: str | None = None,
    tools: Sequence[JsonObject] | None = None,
    messages: Sequence[JsonObject] = (),
    chat_template_kwargs: Record | None = None,
) -> list[int]:
    """The ids of a conversation up to the text of the user's next turn.

    The chat template is rendered with different texts in the user's place, and the ids that all of them begin with are
    the result. A token that would span the border (such as `" Hello"` after `"[INST] "`) is left to the target, which
    thus writes the ids that it would read in a prompt.

    Args:
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`): The target's, with its chat template.
        system_prompt (`str`, *optional*):
            System prompt; `""` for an empty one. By default there is none, and a template with one of its own (Qwen2.5)
            shows that.
        tools (`list[dict]`, *optional*): Schemas that the template shows; none by default.
        messages (`list[dict]`, *optional*, defaults to `()`): Earlier turns of user and assistant.
        chat_template_kwargs (`dict`, *optional*): Further variables of the template; none by default.

    Returns:
        `list[int]`: At least one id.

    Raises:
        ValueError: There is no chat template, or nothing stands before the user's text; the template refuses the
            conversation, does not show the user's text exactly once, or does not show the system prompt or the tools.
    """
    rendered = _render_probes(processing_class, system_prompt, tools, messages, chat_template_kwargs)
    before = rendered[0].partition(PROBES[0])[0]
    if system_prompt and system_prompt.strip() not in before:
        raise ValueError(
            f"The chat template does not show the system prompt {system_prompt!r:.60} before the user's turn, so it "
            "cannot steer what the target writes. Leave it out, or give the processing class a template that shows it."
        )
    names = [str(tool.get("function", tool)["name"]) for tool in tools or ()]
    if hidden := [name for name in names if name not in before]:
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
            "The chat template has nothing before the user's text, so the target cannot be made to write that text."
        )
    return list(encoded[0][:length])


def derive_pre_queries(options: SynthesisOptions, processing_class: ProcessingClass) -> list[list[int]]:
    """The pre-query of each system prompt, with as many tools as a conversation may have."""
    tools = options.tools[: max(options.num_tools)]
    variables = options.chat_template_kwargs
    return [
        derive_pre_query(processing_class, system_prompt=placed, tools=shown, chat_template_kwargs=variables)
        for placed, shown in (options.place_tools(prompt, tools) for prompt in options.system_prompts or (None,))
    ]


def derive_turn_end(processing_class: ProcessingClass, *, chat_template_kwargs: Record | None = None) -> TurnEnd:
    """The ids or the text that end the user's turn.

    Args:
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`): The target's, with its chat template.
        chat_template_kwargs (`dict`, *optional*): Further variables of the template; none by default.

    Raises:
        ValueError: As for [`derive_pre_query`], or nothing stands after the user's text and there is no EOS.
    """
    after = _render_probes(processing_class, None, None, (), chat_template_kwargs)[0].partition(PROBES[0])[2]
    tokenizer = get_tokenizer(processing_class)
    added = tokenizer.get_added_vocab()
    # The first added token, and of those that begin at the same place the longest.
    found = min((token for token in added if token in after), key=lambda t: (after.index(t), -len(t)), default=None)
    plain = (after if found is None else after[: after.index(found)]).strip()
    ids = {tokenizer.eos_token_id, None if found is None or plain else added[found]} - {None}
    if not ids and not plain:
        raise ValueError("The chat template has nothing after the user's text, and the tokenizer has no EOS token.")
    return TurnEnd(tuple(sorted(ids)), plain)


def cut_user_text(
    ids: Sequence[int], finish_reason: str, turn_end: TurnEnd, processing_class: ProcessingClass
) -> tuple[str, str | None]:
    """The user's text in a completion of a pre-query, without what the target wrote after the end of the turn.

    Args:
        ids (`Sequence[int]`): The completion.
        finish_reason (`str`): `"stop"` if its last id is one at which the engine stops.
        turn_end (`TurnEnd`): End of the user's turn for this target.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`): The target's.

    Returns:
        `tuple[str, str | None]`: The text without white space at its ends, and its fault: `"unfinished"` if the turn
        has no end, `"special_tokens"` if it contains such tokens, otherwise `None`.
    """
    tokenizer = get_tokenizer(processing_class)
    # `all_special_ids` lacks the tokens without a role of their own, such as Llama's `<|start_header_id|>`.
    special = {id: str(token) for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    last = len(ids) - 1 if finish_reason == "stop" else None
    end = next((i for i, token in enumerate(ids) if token in turn_end.ids), last)
    turn, is_finished = list(ids[:end]), end is not None
    text = str(tokenizer.decode(turn, clean_up_tokenization_spaces=False))
    if turn_end.text and turn_end.text in text:
        # The place of this text among the ids is not known, and ids after it do not matter: only the text is checked.
        text, is_finished = text.partition(turn_end.text)[0], True
        has_special = any(token in text for token in special.values())
    else:
        has_special = not special.keys().isdisjoint(turn)
    fault = "special_tokens" if has_special else None if is_finished else "unfinished"
    return text.strip(), fault


def _render_probes(
    processing_class: ProcessingClass,
    system_prompt: str | None,
    tools: Sequence[JsonObject] | None,
    messages: Sequence[JsonObject],
    chat_template_kwargs: Record | None,
) -> list[str]:
    """The conversation, rendered with each probe as its last user turn."""
    if not processing_class.chat_template:
        raise ValueError(
            "The target's processing class has no chat template, so there is no user's turn to write. Set "
            "`processing_class.chat_template`."
        )
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    rendered = []
    for probe in PROBES:
        try:
            text: JsonValue = processing_class.apply_chat_template(
                [*system, *messages, {"role": "user", "content": probe}],
                tools=list(tools) if tools else None,
                add_generation_prompt=True,
                tokenize=False,
                **(chat_template_kwargs or {}),
            )
        except jinja2.TemplateError as error:
            raise ValueError(
                f"The chat template refuses a conversation with a system prompt: {error}. Leave the system prompt out, "
                "or give the processing class a template that has one."
                if system
                else f"The chat template refuses a conversation: {error}."
            ) from error
        if text.count(probe) != 1:
            raise ValueError(
                f"The chat template shows the user's text {text.count(probe)} times instead of once, so its place is "
                "not known. Give the processing class another chat template."
            )
        rendered.append(text)
    return rendered
