"""Brings logged messages to the form in which servers pass them to the chat template.

All that is understood is listed here. Anything else is an error, so that no turn loses its content without notice.
"""

import json
from contextlib import suppress

from spec_kd.open_types import JsonObject, JsonValue, Record

Message = JsonObject

ROLES = ("system", "developer", "user", "assistant", "tool")
ROLE_NAMES = {role: role for role in ROLES} | {"function": "tool"}  # `function`: OpenAI's before `tool`
# Keys with content that is understood, and keys without content.
CONTENT_KEYS = {"content", "text", "parts", "tool_calls", "function_call", "reasoning_content", "reasoning", "thinking"}
OTHER_KEYS = {
    "role", "name", "tool_call_id", "id", "index", "type", "object", "status", "weight", "model", "annotations",
    "citations", "metadata", "logprobs", "usage", "cache_control", "provider_specific_fields", "reasoning_details",
    "thinking_blocks", "stop_reason", "stop_sequence", "finish_reason", "token_ids", "prefix", "phase", "tool_name",
    "additional_kwargs", "response_metadata", "usage_metadata", "invalid_tool_calls", "example", "timestamp",
    "created_at", "feedback", "tags", "loss", "train",
}  # fmt: skip
TEXT_TYPES = {None, "text", "input_text", "output_text"}
REASONING_TYPES = {"thinking": "thinking", "reasoning": "text", "reasoning_text": "text"}
# Marks that loggers write in place of a text, or into a text that they shorten.
REPLACED_TEXTS = {"redacted-by-litellm", "REDACTED_BY_LITELM", "<truncated due to size exceeding limit>"}
MARKS = ("(litellm_truncated", "... (truncated ", "<truncated due to size exceeding limit>", "@@@langfuseMedia:")


def clean_messages(messages: JsonValue) -> list[Message]:
    """Messages with the keys that chat templates know.

    Text in parts is joined by line breaks, arguments of tool calls are parsed, and a call of the older form
    (`function_call`) becomes a tool call. Blocks of the Anthropic API (`tool_use`, `tool_result`, `thinking`) become
    tool calls, messages of tools and reasoning. Keys without content (`annotations`, `logprobs`) are left out.

    Args:
        messages (`list[dict]`): Messages with a role of [`ROLES`] or `"function"`.

    Raises:
        ValueError: A message has another role, content that is not text, no content that is understood, or an unknown
            key with content; a tool call has no name, or arguments that are not JSON.
    """
    if not isinstance(messages, list | tuple):
        raise ValueError(f"messages must be a list, got {messages!r:.60}")
    return [cleaned for message in messages for cleaned in _clean_message(message)]


def _clean_message(message: JsonValue) -> list[Message]:
    # Most messages are a role and a text.
    if isinstance(message, dict) and len(message) == 2:
        role, content = message.get("role"), message.get("content")
        if isinstance(content, str) and role in ROLES and (role != "assistant" or content.strip()):
            return [{"role": role, "content": content}]
    role = message.get("role") if isinstance(message, dict) else None
    known = ROLE_NAMES.get(role) if isinstance(role, str) else None
    if known is None:
        raise ValueError(f"a message must have a role of {', '.join(ROLES)}, got {role!r}")
    content = next((message[key] for key in ("content", "text", "parts") if message.get(key) is not None), None)
    key = next((key for key, value in message.items() if value and not _is_known(key, value)), None)
    if key is not None:
        raise ValueError(f"a message has {key!r}, which is not understood: its keys are {list_keys(message)}")
    if isinstance(content, str) and known != "assistant":
        return [{"role": known, "content": content, **read_names(message)}]
    blocks = _Blocks()
    blocks.read(content)
    # vLLM names it `reasoning` now; chat templates and older versions say `reasoning_content`.
    reasoning = message.get("reasoning_content") or message.get("reasoning") or message.get("thinking")
    reasoning = reasoning or "\n".join(blocks.reasoning)
    if not isinstance(reasoning, str):
        raise ValueError(f"the reasoning of a message must be text, got {reasoning!r:.60}")
    calls = [_clean_tool_call(call) for call in parse_json(message.get("tool_calls")) or []]
    if message.get("function_call"):
        calls.append(_clean_tool_call({"function": parse_json(message["function_call"])}))
    calls += [_clean_tool_call(call) for call in blocks.calls]
    if calls and known != "assistant":
        raise ValueError(f"a message of the {known} holds tool calls")
    if blocks.results and known != "user":
        raise ValueError(f"a message of the {known} holds the results of tools")
    if content is None and not calls:
        raise ValueError(
            f"a message of the {known} has no content that is understood: its keys are {list_keys(message)}"
        )
    text = blocks.join_text()
    if known == "assistant" and not calls and not text.strip():
        raise ValueError("a turn of the assistant is empty")
    more = {key: value for key, value in (("reasoning_content", reasoning), ("tool_calls", calls)) if value}
    cleaned = {"role": known, "content": text, **more, **read_names(message)}
    return blocks.results if blocks.results and not blocks.texts else [*blocks.results, cleaned]


def _is_known(key: str, value: JsonValue) -> bool:
    """Whether a key is understood. A scalar is a note of the logger; lists and objects hold images and the like."""
    is_note = not isinstance(value, dict | list) and key not in ("refusal", "audio", "images", "value")
    return is_note or key in CONTENT_KEYS or key in OTHER_KEYS


def read_names(message: Record) -> JsonObject:
    """The name and the id of a call that a message has."""
    return {key: message[key] for key in ("tool_call_id", "name") if message.get(key) is not None}


class _Blocks:
    """The parts of one message's content, by their kind."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.reasoning: list[str] = []
        self.calls: list[JsonObject] = []
        self.results: list[Message] = []

    def join_text(self) -> str:
        """The parts of text, joined by line breaks as vLLM does for templates that take text (`chat_utils.py`)."""
        return "\n".join(self.texts)

    def read(self, content: JsonValue) -> None:
        if isinstance(content, dict) and "parts" in content:  # ChatGPT's export
            if content.get("content_type", "text") != "text":
                raise ValueError(f"a message has content of type {content['content_type']!r}; only text is understood")
            content = content["parts"]
        if isinstance(content, list) and not content:
            raise ValueError("a message has an empty list as content")
        parts = content if isinstance(content, list) else [] if content is None else [content]
        for part in parts:
            self._read_part({"text": part} if isinstance(part, str) else part)

    def _read_part(self, part: JsonValue) -> None:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if not isinstance(part, dict) or not isinstance(kind, str | None):
            raise ValueError(f"a message has a part of type {kind!r}; only text is understood")
        if kind in TEXT_TYPES:
            text = part.get("text", part.get("value"))
            text = text.get("value") if isinstance(text, dict) else text  # OpenAI's Assistants
            if not isinstance(text, str):
                raise ValueError(
                    f"a part of a message has no text in `text` or `value`: its keys are {list_keys(part)}"
                )
            self.texts.append(text)
        elif kind in REASONING_TYPES and isinstance(text := part.get(REASONING_TYPES[kind]), str):
            self.reasoning.append(text)
        elif kind == "tool_use":
            call = {"name": part.get("name"), "arguments": part.get("input")}
            self.calls.append({"id": part.get("id"), "function": call})
        elif kind == "tool_result":
            result = _Blocks()
            result.read(part.get("content"))
            if result.reasoning or result.calls or result.results:
                raise ValueError("the result of a tool holds more than text")
            name = {} if part.get("tool_use_id") is None else {"tool_call_id": part["tool_use_id"]}
            self.results.append({"role": "tool", "content": result.join_text(), **name})
        else:
            raise ValueError(f"a message has a part of type {kind!r}; only text is understood")


def _clean_tool_call(call: JsonValue) -> JsonObject:
    """A tool call with its arguments parsed, as vLLM and SGLang do before the chat template prints them as JSON."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not function.get("name"):
        raise ValueError(f"a tool call must have a `function` with a `name`, got {call!r:.60}")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"arguments of the tool call {function['name']!r} are not JSON ({error})") from error
    if not isinstance(arguments, dict):
        raise ValueError(f"arguments of the tool call {function['name']!r} are no object: {arguments!r:.60}")
    cleaned = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return cleaned if call.get("id") is None else {"id": call["id"], **cleaned}


def find_mark(message: Message) -> str | None:
    """The mark of a logger in a message whose text it did not keep as a whole; `None` for a whole message."""
    texts = [message["content"]]
    if len(message) > 2:
        calls = (json.dumps(call["function"]["arguments"]) for call in message.get("tool_calls", ()))
        texts += [message.get("reasoning_content", ""), *calls]
    marks = [mark for text in texts for mark in MARKS if mark in text]
    return next((text for text in texts if text in REPLACED_TEXTS), marks[0] if marks else None)


def parse_json(value: JsonValue) -> JsonValue:
    """The value of a JSON text, and any other value as it is: columns of a table often hold JSON as text."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        with suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def list_keys(value: Record) -> list[str]:
    """The first keys of an object that is not understood, for an error."""
    return sorted(map(str, value))[:12]
