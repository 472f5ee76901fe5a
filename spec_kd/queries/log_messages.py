"""Messages as logs have them, brought to the form in which servers hand them to the chat template."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")


def clean_messages(messages: Any) -> list[Message]:
    """Messages with the keys that templates know.

    Text in parts is joined by line breaks, arguments of tool calls are parsed, a missing content is empty text; keys
    that no template knows (`refusal`, `annotations`) are left out.

    Args:
        messages (`list[dict]`): With a role of [`ROLES`].

    Raises:
        `ValueError`: Other roles, content that is not text, tool calls without a name or with arguments that are not
            JSON.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise ValueError(f"messages must be a list, got {messages!r:.60}")
    return [_clean_message(message) for message in messages]


def _clean_message(message: Any) -> Message:
    role = message.get("role") if isinstance(message, Mapping) else None
    if role not in ROLES:
        raise ValueError(f"a message must have a role of {', '.join(ROLES)}, got {role!r}")
    cleaned: Message = {"role": role, "content": _join_text(message.get("content"))}
    # vLLM names it `reasoning` now; chat templates and older versions say `reasoning_content`.
    if reasoning := message.get("reasoning_content") or message.get("reasoning"):
        cleaned["reasoning_content"] = reasoning
    if message.get("tool_calls"):
        cleaned["tool_calls"] = [_clean_tool_call(call) for call in parse_json(message["tool_calls"])]
    for key in ("tool_call_id", "name"):
        if message.get(key) is not None:
            cleaned[key] = message[key]
    return cleaned


def _join_text(content: Any) -> str:
    """Parts of text joined by line breaks, as vLLM does for templates that take text (`chat_utils.py`)."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for part in content if isinstance(content, Sequence) else [content]:
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise ValueError(f"a message has a part of type {kind!r}; only text is understood")
        texts.append(text)
    return "\n".join(texts)


def _clean_tool_call(call: Any) -> dict[str, Any]:
    """Arguments parsed, as vLLM and SGLang do before they render the chat template, which prints them as JSON."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not function.get("name"):
        raise ValueError(f"a tool call must have a `function` with a `name`, got {call!r:.60}")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise ValueError(f"arguments of the tool call {function['name']!r} are not JSON ({error})") from error
    cleaned = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return cleaned if call.get("id") is None else {"id": call["id"], **cleaned}


def parse_json(value: Any) -> Any:
    """What a text of JSON holds, and any other value itself: columns of a table often hold JSON as text."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value
