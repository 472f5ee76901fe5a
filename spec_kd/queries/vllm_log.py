"""Requests in the log that a vLLM server prints, which shows prompts as they were rendered."""

import ast
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

# `--enable-log-requests`: "Received request chatcmpl-1: prompt: '...', params: ..." until vLLM 0.11, then at the level
# DEBUG "Request chatcmpl-1 details: prompt: '...', prompt_token_ids: ..." (vllm/entrypoints/logger.py).
LINE = re.compile(
    r"""(?:Received request \S+|Request \S+ details): prompt: ('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"), """
    r"(?:params|prompt_token_ids): "
)
PLACES = ("\ue000", "\ue001", "\ue002", "\ue003")  # private-use characters, which no template prints


class VLLMLogReader:
    """Makes messages of a line of vLLM's log; a `format` for [`read_record`].

    The prompt is cut where the target's chat template puts its marks, and accepted only if rendering the messages gives
    the very text of the log. Tools that the template printed are then part of the system prompt.

    Args:
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*): The target's.
    """

    def __init__(self, processing_class=None):
        self._processing_class = processing_class

    def __call__(self, record: Any) -> Any:
        """`{"messages": ...}` of a request; `None` for any other line; what is no line of text, as it is.

        Raises:
            `ValueError`: A request without a processing class, or that was not rendered with its chat template.
        """
        if not isinstance(record, str):
            return record
        found = LINE.search(record)
        if found is None:
            return None
        if self._processing_class is None:
            raise ValueError(
                "vLLM logs rendered prompts: give the target's `processing_class` to read messages in them"
            )
        text = ast.literal_eval(found[1])
        for has_system in (True, False):
            messages = self._cut(text, has_system)
            if messages and self._render(messages) == text:
                return {"messages": messages}
        raise ValueError("the prompt was not rendered with the chat template of `processing_class`")

    def _cut(self, text: str, has_system: bool) -> list[dict[str, str]] | None:
        roles = ["system"] * has_system + ["user", "assistant", "user"]
        sample = self._render([{"role": role, "content": PLACES[n]} for n, role in enumerate(roles)])
        if sample is None:
            return None
        start, *between, end = re.split("|".join(PLACES[: len(roles)]), sample)
        if not all([*between, end]) or not (text.startswith(start) and text.endswith(end)):
            return None
        rest = text[len(start) : len(text) - len(end)]
        messages = []
        if has_system:
            system, _, rest = rest.partition(between.pop(0))
            messages.append({"role": "system", "content": system})
        role, marks = "user", dict(zip(("user", "assistant"), between, strict=True))
        while rest is not None:
            content, mark, following = rest.partition(marks[role])
            messages.append({"role": role, "content": content})
            role, rest = ("assistant" if role == "user" else "user"), (following if mark else None)
        return messages

    def _render(self, messages: Sequence[Mapping[str, str]]) -> str | None:
        try:
            return self._processing_class.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except jinja2.TemplateError:
            return None
