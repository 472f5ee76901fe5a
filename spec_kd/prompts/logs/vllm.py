"""Reads the requests in the log that a vLLM server prints, where prompts are rendered."""

import ast
import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, cast

import jinja2

from spec_kd.open_types import JsonValue
from spec_kd.prompts.logs.tracing import LeftOutError

if TYPE_CHECKING:
    from spec_kd.vocabulary import ProcessingClass

# `--enable-log-requests`: "Received request chatcmpl-1: prompt: '...', params: ..." until vLLM 0.11, then at the level
# DEBUG "Request chatcmpl-1 details: prompt: '...', prompt_token_ids: ..." (vllm/entrypoints/logger.py).
LINE = re.compile(
    r"""(?:Received request \S+|Request \S+ details): prompt: ('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"), """
    r"(?:params|prompt_token_ids): "
)
WITHOUT_PROMPT = re.compile(
    r"Received request \S+: (?!prompt: )|(?:Received request \S+|Request \S+ details): prompt: None"
)
WITH_PROMPT = re.compile(r"(?:Received request \S+|Request \S+ details): prompt: ")
PLACES = ("\ue000", "\ue001", "\ue002", "\ue003")  # private-use characters, which no template prints
NO_PROMPT = (
    "a request without its prompt, which vLLM logs at the level DEBUG only since 0.11.2: set VLLM_LOGGING_LEVEL=DEBUG "
    "and --enable-log-requests"
)


def is_request_line(line: str) -> bool:
    """Whether a line of text is a request in the log of a vLLM server."""
    return bool(WITH_PROMPT.search(line) or WITHOUT_PROMPT.search(line))


class VLLMLogReader:
    """Makes messages of a line of vLLM's log; a `format` for [`read_record`].

    The prompt is cut at the marks of the target's chat template, and accepted only if rendering the messages gives
    exactly the text of the log. Tools that the template printed become part of the system prompt. A prompt with turns
    of other roles, such as the results of tools, is not understood.

    Args:
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*): The target's, with its chat
            template. Without it every request is malformed.
    """

    def __init__(self, processing_class: "ProcessingClass | None" = None):
        self._processing_class = processing_class

    def __call__(self, record: JsonValue) -> JsonValue:
        """`{"messages": ...}` of a request, `None` for any other line, and a record that is no text as it is.

        Raises:
            LeftOutError: The request was logged without its prompt.
            ValueError: There is no processing class, the prompt was not rendered with its chat template, or a turn is
                not the user's, the assistant's or the system's.
        """
        if not isinstance(record, str):
            return record
        found = LINE.search(record)
        if found is None:
            if WITHOUT_PROMPT.search(record):
                raise LeftOutError(NO_PROMPT)
            if WITH_PROMPT.search(record):
                raise ValueError("the line of a request in vLLM's log was cut")
            return None
        text = ast.literal_eval(found[1])
        for has_system in (True, False):
            messages = self._cut(text, has_system)
            if messages and self._render(messages) == text:
                self._check_contents(messages)
                return {"messages": messages}
        raise ValueError("the prompt was not rendered with the chat template of `processing_class`")

    def _cut(self, text: str, has_system: bool) -> list[dict[str, str]] | None:
        roles = ["system"] * has_system + ["user", "assistant", "user"]
        start, *between, end = self._find_marks(roles) or ["", ""]
        if not all([*between, end]) or not (text.startswith(start) and text.endswith(end)):
            return None
        rest = text[len(start) : len(text) - len(end)]
        messages = []
        if has_system:
            system, _, rest = rest.partition(between.pop(0))
            messages.append({"role": "system", "content": system})
        role, marks = "user", dict(zip(("user", "assistant"), between, strict=True))
        mark = marks[role]
        while mark:
            content, mark, rest = rest.partition(marks[role])
            messages.append({"role": role, "content": content})
            role = "assistant" if role == "user" else "user"
        return messages

    def _find_marks(self, roles: Sequence[str]) -> list[str] | None:
        """The text that the template prints before, between and after the contents of turns."""
        sample = self._render([{"role": role, "content": PLACES[n]} for n, role in enumerate(roles)])
        return None if sample is None else re.split("|".join(PLACES[: len(roles)]), sample)

    def _check_contents(self, messages: Sequence[Mapping[str, str]]) -> None:
        """Refuses turns of other roles, which [`_cut`] leaves in the content of a turn, with their marks."""
        if messages[-1]["role"] != "user":
            raise ValueError("the rendered prompt ends with a turn that is not the user's, such as a tool's")
        _, after_user, after_assistant, _ = self._find_marks(["user", "assistant", "user"]) or [""] * 4
        same = takewhile(lambda pair: pair[0] == pair[1], zip(after_user, after_assistant, strict=False))
        turn_end = "".join(character for character, _ in same).strip()
        marks = [turn_end] if len(turn_end) > 2 else []
        tokenizer = getattr(self._processing_class, "tokenizer", self._processing_class)
        marks += [token for token in getattr(tokenizer, "all_special_tokens", ()) if token.strip()]
        # Some templates put the result of a tool into a turn of the user, with marks of its own (`<tool_response>`).
        with_tool = self._find_marks(["user", "assistant", "tool"])
        if with_tool is not None and with_tool[2] not in ("", after_assistant):
            marks.append(with_tool[2].removeprefix(after_assistant).strip() or with_tool[2])
        for message in messages:
            if mark := next((mark for mark in marks if mark in message["content"]), None):
                raise ValueError(
                    "the rendered prompt has a turn that is not the system's, the user's or the assistant's (found "
                    f"{mark!r} within one)"
                )

    def _render(self, messages: list[dict[str, str]]) -> str | None:
        if self._processing_class is None:
            raise ValueError(
                "vLLM logs rendered prompts: give the target's `processing_class` to read messages in them"
            )
        try:
            text = self._processing_class.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except jinja2.TemplateError:
            return None
        return cast(str, text)
