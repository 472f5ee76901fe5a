"""Renders a turn of a conversation as its server reads it and its target writes it: ids of prompt and completion."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

from jinja2 import TemplateError
from transformers import AddedToken, ProcessorMixin
from trl import prepare_multimodal_messages
from trl.data_utils import common_prefix_length

from spec_kd.data.rendered_completion import (
    TurnNotRenderedError,
    adds_empty_reasoning,
    find_rendered_completion,
    hide,
    remove_reasoning,
)
from spec_kd.end_of_turn import find_end_ids, find_first, get_texts
from spec_kd.open_types import Argument, JsonValue, Record
from spec_kd.vocabulary import ProcessingClass, get_tokenizer

Message = Record

STAND_INS = [chr(code) for code in range(0xE000, 0xF900)]  # Unicode's private use area, which no text uses


@dataclass(frozen=True)
class Turn:
    """One assistant turn of a conversation.

    Attributes:
        prompt_ids (`list[int]`): Ids that the server reads, with the generation prompt at the end.
        completion_ids (`list[int]`): Ids that the target writes after the prompt, the end of turn included.
        mask (`list[int]`): One entry per completion id: 1 where a template with generation markers marks the token as
            the assistant's; all 1 with other templates.
        has_added_reasoning (`bool`): Whether the template added an empty reasoning that the reply does not have.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    mask: list[int]
    has_added_reasoning: bool = False


class ChatRenderer:
    """Renders conversations with the chat template of a processing class.

    Args:
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`): The target's.
        eos_token_id (`int` or `Iterable[int]`, *optional*): As for [`find_end_ids`].
        needs_end (`bool`, *optional*, defaults to `True`): Whether a turn without an end of turn is an error. Otherwise
            it ends where the reply ends.
        has_markers (`bool`, *optional*, defaults to `False`): Whether the template's generation markers are read.

    Attributes:
        end_ids (`list[int]`): Ids that end a completion.
    """

    def __init__(
        self,
        processing_class: ProcessingClass,
        eos_token_id: int | Iterable[int] | None = None,
        *,
        needs_end: bool = True,
        has_markers: bool = False,
    ):
        self.processing_class, self.tokenizer = processing_class, get_tokenizer(processing_class)
        self._eos_token_id, self._needs_end, self._has_markers = eos_token_id, needs_end, has_markers

    @cached_property
    def end_ids(self) -> list[int]:
        """Ids that end a completion, the most certain ones first; see [`find_end_ids`]."""
        return find_end_ids(self.processing_class, self._eos_token_id)

    @cached_property
    def _end_texts(self) -> dict[str, int]:
        return get_texts(self.tokenizer, self.end_ids)

    def render_prompt(self, messages: Sequence[Message], **template_arguments: Argument) -> list[int]:
        """Ids of a conversation, followed by the generation prompt.

        Args:
            messages (`Sequence[Mapping]`): The conversation, at least one message.
            template_arguments: `tools` and other arguments of the template.
        """
        return self._encode(self._render(messages, True, template_arguments))[0]

    def render_turn(self, messages: Sequence[Message], reply: Message, **template_arguments: Argument) -> Turn:
        """What the server reads and the target writes if `reply` follows `messages`.

        Raises:
            TurnNotRenderedError: If the template does not print the reply, or prints another one.
        """
        prompt = self._render(messages, True, template_arguments)
        stand_ins = self._choose_stand_ins(reply)
        hidden = hide(reply, stand_ins)
        whole = self._render([*messages, hidden], False, template_arguments)
        start = self._find_start(prompt, whole)
        text, end = find_rendered_completion(prompt, whole[start:], hidden, self._get_template(), self._end_texts)
        self._check_arguments(messages, hidden, whole, template_arguments)
        end = end or self._find_end_in_history(messages, hidden, whole, template_arguments)
        # gpt-oss ends a call with a token of its own, which only its generation config counts as an EOS
        is_ended_call = bool(hidden.get("tool_calls")) and text.endswith(tuple(self._special_tokens))
        if self._needs_end and not end and not is_ended_call:
            raise TurnNotRenderedError("the chat template writes no end of turn that the target could have written")
        prompt_ids, completion_ids = self._encode_turn(prompt, text, end, stand_ins)
        mask = self._mask(messages, reply, template_arguments, completion_ids)
        return Turn(prompt_ids, completion_ids, mask, adds_empty_reasoning(prompt, text, reply))

    def render_text(self, prompt: str, completion: str) -> Turn:
        """The same for plain text: the prompt with the tokenizer's special tokens, the completion with its EOS."""
        prompt_ids, eos = self.tokenizer(prompt)["input_ids"], self.tokenizer.eos_token
        completion = completion if completion.endswith(eos) else completion + eos
        joint = self.tokenizer(prompt + completion)["input_ids"]
        is_prefix = joint[: len(prompt_ids)] == prompt_ids
        ids = joint[len(prompt_ids) :] if is_prefix else self._encode_inside(completion)
        return Turn(prompt_ids, ids, [1] * len(ids))

    def _choose_stand_ins(self, reply: Message) -> dict[str, str]:
        """Characters that the reply does not have, to stand for text that looks like an end of turn."""
        shown = json.dumps(reply, ensure_ascii=False, default=str)
        texts = [text for text in self._end_texts if text in shown]
        free = (character for character in STAND_INS if character not in shown)
        return dict(zip(free, texts, strict=False)) if texts else {}

    def _find_start(self, prompt: str, whole: str) -> int:
        """Where the completion starts in `whole`: after the prompt, or where the template departs from it."""
        if whole.startswith(prompt):
            return len(prompt)
        if not self.tokenizer.is_fast:
            return common_prefix_length(prompt, whole)  # type: ignore[arg-type]  # as good for text
        # by tokens: two tags that start with the same characters are not the same text
        encoded = self.tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
        same = common_prefix_length(encoded["input_ids"], self._encode_alone(whole))
        start = encoded["offset_mapping"][same][0] if same < len(encoded["input_ids"]) else len(prompt)
        return min(start, common_prefix_length(prompt, whole))  # type: ignore[arg-type]  # as good for text

    def _check_arguments(self, messages: Sequence[Message], reply: Message, whole: str, arguments: JsonValue) -> None:
        """Raises unless the template prints the arguments of tool calls."""
        for i, call in enumerate(reply.get("tool_calls") or []):
            function = call.get("function") or call
            if not function.get("arguments"):
                continue
            bare = {**function, "arguments": "" if isinstance(function["arguments"], str) else {}}
            calls = list(reply["tool_calls"])
            calls[i] = {**call, "function": bare} if "function" in call else bare
            if self._render([*messages, {**reply, "tool_calls": calls}], False, arguments) == whole:
                raise TurnNotRenderedError("the chat template does not print the arguments of a tool call")

    def _find_end_in_history(
        self, messages: Sequence[Message], reply: Message, whole: str, arguments: JsonValue
    ) -> str:
        """The end of a turn that the template prints with the next turn, as GLM's does; "" if there is none."""
        following = {"role": "tool" if reply.get("tool_calls") else "user", "content": "-"}
        bare = remove_reasoning(reply)  # which history may not have
        try:
            if bare != reply:
                whole = self._render([*messages, bare], False, arguments)
            longer = self._render([*messages, bare, following], False, arguments)
        except (TemplateError, TypeError, ValueError, KeyError):
            return ""
        if not longer.startswith(whole.rstrip()):
            return ""
        found = find_first(rest := longer[len(whole.rstrip()) :].lstrip(), self._end_texts)
        return found[1] if found is not None and rest.startswith(found[1]) else ""

    def _encode_turn(
        self, prompt: str, text: str, end: str, stand_ins: Mapping[str, str]
    ) -> tuple[list[int], list[int]]:
        """Ids of a prompt, and ids of the text after it with its end."""
        parts = re.split(f"([{''.join(stand_ins)}])", text) if stand_ins else [text]
        shown = "".join(stand_ins.get(part, part) for part in parts)
        prompt_ids, joint = self._encode(prompt, prompt + shown + end)
        if len(parts) == 1 and joint[: len(prompt_ids)] == prompt_ids:
            return prompt_ids, joint[len(prompt_ids) :]
        # tokens merge across the boundary, where the target began a new token; or a part of the text is hidden
        first = self._encode(prompt + parts[0])[0]
        is_prefix = first[: len(prompt_ids)] == prompt_ids
        start = first[len(prompt_ids) :] if is_prefix else self._encode_inside(parts[0])
        for encode_as_text in (self._encode_as_text, self._encode_cut):
            ids = list(start)
            for part in [*parts[1:], end]:
                ids += encode_as_text(stand_ins[part]) if part in stand_ins else self._encode_inside(part)
            if not set(ids[:-1]) & set(self.end_ids) and self._decode(prompt_ids + ids) == self._decode(joint):
                return prompt_ids, ids
        raise TurnNotRenderedError("the tokenizer does not give back the text of the completion from where it starts")

    def _get_template(self) -> str:
        template = self.processing_class.chat_template
        return " ".join(template.values()) if isinstance(template, dict) else template or ""

    def _render(self, messages: Sequence[Message], is_prompt: bool, arguments: Record) -> str:
        return cast(str, self._apply_template(messages, add_generation_prompt=is_prompt, tokenize=False, **arguments))

    def _apply_template(self, messages: Sequence[Message], /, **arguments: Argument) -> JsonValue:
        shown: JsonValue = [dict(message) for message in messages]
        is_processor = isinstance(self.processing_class, ProcessorMixin)
        return self.processing_class.apply_chat_template(
            prepare_multimodal_messages(shown) if is_processor else shown, **arguments
        )

    def _encode(self, *texts: str) -> list[list[int]]:
        """Ids of texts that begin alike, with special tokens where `apply_chat_template` of a processor adds them."""
        is_bare = isinstance(self.processing_class, ProcessorMixin) and not (
            self.tokenizer.bos_token is not None and texts[0].startswith(self.tokenizer.bos_token)
        )
        return self.tokenizer(list(texts), add_special_tokens=is_bare)["input_ids"]

    def _encode_alone(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _encode_inside(self, text: str) -> list[int]:
        """Ids of a text that follows an end of turn: some tokenizers begin a first text with a space."""
        if self._anchor is None or not text:
            return self._encode_alone(text)
        return self._encode_alone(self._anchor + text)[1:]

    @cached_property
    def _special_tokens(self) -> dict[str, AddedToken]:
        return {token.content: token for token in self.tokenizer.added_tokens_decoder.values() if token.special}

    @cached_property
    def _anchor(self) -> str | None:
        return next((text for text, token in self._special_tokens.items() if not token.rstrip), None)

    def _encode_as_text(self, text: str) -> list[int]:
        """Ids of a text that looks like an end of turn but is not."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def _encode_cut(self, text: str) -> list[int]:
        """The same for tokenizers that do not split it, or not without a space before it."""
        return self._encode_inside(text[0]) + self._encode_inside(text[1:])

    def _decode(self, ids: list[int]) -> str:
        return cast(str, self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def _mask(
        self, messages: Sequence[Message], reply: Message, arguments: Record, completion_ids: list[int]
    ) -> list[int]:
        everything = [1] * len(completion_ids)
        if not self._has_markers:
            return everything
        marked = self._apply_template(
            [*messages, reply], tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **arguments
        )
        ids, mask = marked["input_ids"], marked["assistant_masks"]
        if isinstance(self.processing_class, ProcessorMixin):
            ids, mask = list(ids[0]), list(mask[0])
        count = len(completion_ids)
        # from the end, since the reply is the last turn
        starts = (i for i in range(len(ids) - count, -1, -1) if ids[i : i + count] == completion_ids)
        found = next((list(mask[i : i + count]) for i in starts), everything)
        return found if any(found) else everything
