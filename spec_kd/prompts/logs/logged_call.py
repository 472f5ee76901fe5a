"""One turn of the assistant in a log: the prompt before it, its completion, and what the log says about both."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from spec_kd.open_types import JsonObject, JsonValue, Record
from spec_kd.prompts.logs.completions import COMPLETION_KEYS, RESPONSE_KEYS, find_fault
from spec_kd.prompts.logs.messages import Message, parse_json
from spec_kd.prompts.logs.requests import REQUEST_KEYS, find_part
from spec_kd.prompts.tool_catalog import Tool, read_tools, wrap_tool

TURNS = ("auto", "all", "last")
NUM_NAMED = 5
TEXT_KEYS = ("prompt", "text")
# Ids of one request, such as a trace's, are not among these: each request of a conversation has its own.
CONVERSATION_KEYS = (
    "conversation_id", "conversationId", "session_id", "sessionId", "litellm_session_id", "thread_id", "threadId",
    "chat_id", "chatId",
)  # fmt: skip
USER_KEYS = (
    "user", "user_id", "userId", "end_user", "safety_identifier", "user_api_key_end_user_id", "user_api_key_user_id",
)  # fmt: skip
TIME_KEYS = ("timestamp", "created_at", "startTime", "start_time", "created", "requestedAt", "time", "date")
MEDIA_KEYS = {"image", "images", "video", "videos", "audio", "audios", "image_path", "documents"}
OTHER_KEYS = (
    "messages", "conversations", "conversation", "completion", "system", "tools", "functions", "metadata", "model",
    "id", "custom_id", "method", "url", "error", "status", "model_parameters", "optional_params", "request_id",
    "trace_id", "message_id", "parent_id", "role", "call_type", "object", "usage", "source",
    "split", "language", "response_cost", "endTime", "end_time",
)  # fmt: skip
KNOWN_KEYS = {
    *REQUEST_KEYS, *COMPLETION_KEYS, *TEXT_KEYS, *CONVERSATION_KEYS, *USER_KEYS, *TIME_KEYS, *MEDIA_KEYS, *OTHER_KEYS,
}  # fmt: skip


@dataclass(frozen=True)
class LoggedCall:
    """A prompt of a log and its completion.

    Attributes:
        prompt (`list[dict]`): Messages, the last one of the user or a tool.
        tools (`list[dict]`, *optional*): Schemas of the tools that were offered.
        completion (`dict`, *optional*): The assistant's message; `None` where the log has none that can be kept.
        conversation_id (`str`, *optional*): Name of the conversation in the log.
        user (`str`, *optional*): Name of the user in the log.
        timestamp (`float`, *optional*): Time of the request, in seconds since 1970.
        is_whole (`bool`): Whether the record is a whole conversation, and not one request of it.
        notes (`tuple[str, ...]`): Things to count, such as why a completion that was logged is not kept.
    """

    prompt: list[Message]
    tools: list[JsonValue] | None = None
    completion: Message | None = None
    conversation_id: str | None = None
    user: str | None = None
    timestamp: float | None = None
    is_whole: bool = False
    notes: tuple[str, ...] = field(default=(), compare=False)


def split_turns(call: LoggedCall, turns: str = "auto") -> list[LoggedCall]:
    """One call for each turn of the assistant, each with the history before it.

    Args:
        call (`LoggedCall`): The call of the last turn.
        turns (`str`, *optional*, defaults to `"auto"`): `"all"`, `"last"`, or `"auto"`: all turns of a whole
            conversation, and the last one of a request, because its earlier turns have requests of their own in the
            log.
    """
    if turns == "last" or (turns == "auto" and not call.is_whole):
        return [call]
    earlier = [
        replace(call, prompt=call.prompt[:position], completion=message)
        for position, message in enumerate(call.prompt)
        if message["role"] == "assistant" and position and call.prompt[position - 1]["role"] in ("user", "tool")
    ]
    return [*earlier, call]


def note_completion(record: Record, completion: Message | None, note: str | None) -> list[str]:
    """Notes on a record's completion: what `find_completion` says of it, or keys under which there may be one."""
    if note is not None:
        return [f"completions {note}" if completion is not None else f"completions not kept, {note}"]
    if completion is not None:
        return []
    unknown = (key for key in record if key not in KNOWN_KEYS and isinstance(record[key], str | dict | list))
    keys = sorted(str(key) for key in unknown if record[key])
    return [f"records without a known completion, with the unknown keys {keys[:NUM_NAMED]}"] if keys else []


def build_conversation(record: Record, messages: list[Message], logged: JsonValue) -> LoggedCall:
    """The call of a whole conversation; a prompt without completion where the user has the last word.

    Args:
        record (`dict`): The record with the conversation.
        messages (`list[dict]`): The conversation, of which the last message of the assistant is taken.
        logged (`list[dict]`): The same messages as they were logged, where they may say how they ended.
    """
    has_completion = bool(messages) and messages[-1]["role"] == "assistant"
    completion = messages.pop() if has_completion else None
    faults = [find_fault(message) for message in parse_json(logged) if isinstance(message, dict)]
    fault = (faults[-1] or find_fault(record)) if has_completion and faults else None
    # Earlier turns are completions too, if none of them was cut off.
    is_whole = not any(faults[:-1])
    notes = [] if is_whole else ["conversations with unfinished turns, of which the last alone is taken"]
    notes += [] if fault is None else [f"completions not kept, {fault}"]
    return build_call(record, messages, None if fault else completion, record.get("tools"), is_whole, notes=notes)


def build_call(
    record: Record,
    prompt: list[Message],
    completion: Message | None,
    tools: JsonValue,
    is_whole: bool = False,
    request: Record | None = None,
    notes: Sequence[str] = (),
) -> LoggedCall:
    """The call of a record.

    Args:
        record (`dict`): The record, which may name conversation, user and time.
        prompt (`list[dict]`): Messages.
        completion (`dict`, *optional*): Message of the assistant.
        tools: Tools as the client sent them.
        is_whole (`bool`, *optional*, defaults to `False`): Whether the record is a whole conversation.
        request (`dict`, *optional*): Part of the record that the client sent; the record itself by default.
        notes (`Sequence[str]`, *optional*, defaults to `()`): Things to count.

    Raises:
        ValueError: The prompt has images or other media, or tools that are not understood.
    """
    request = record if request is None else request
    if media := [key for part in (record, request) for key in sorted(MEDIA_KEYS.intersection(part)) if part[key]]:
        raise ValueError(f"the prompt has `{media[0]}`; only text is understood")
    known = [_wrap_foreign(tool) for tool in read_tools(tools) or []]
    known += [wrap_tool(tool) for tool in read_tools(request.get("functions"), "`functions`") or []]
    return LoggedCall(
        prompt=prompt,
        tools=known or None,
        completion=completion,
        **_find_fields(record, request),
        is_whole=is_whole,
        notes=tuple(notes),
    )


def _wrap_foreign(tool: Tool) -> Tool:
    """A tool of the Anthropic or Responses API in OpenAI's form, and any other tool as it is."""
    if "input_schema" in tool:
        named = {"name": tool["name"], "description": tool.get("description"), "parameters": tool["input_schema"]}
        return wrap_tool({key: value for key, value in named.items() if value is not None})
    if tool.get("type") == "function" and "function" not in tool:
        return wrap_tool({key: value for key, value in tool.items() if key != "type"})
    return tool


def _find_fields(record: Record, request: Record) -> JsonObject:
    """Conversation, user and time of a record, each `None` if it has none."""
    sources = [record] if request is record else [record, request]
    sources += [metadata for source in sources if isinstance(metadata := parse_json(source.get("metadata")), dict)]
    name, user, time = (_find_scalar(sources, keys) for keys in (CONVERSATION_KEYS, USER_KEYS, TIME_KEYS))
    if time is None:
        response = find_part(record, ("choices", "created", "created_at"), RESPONSE_KEYS)
        time = _find_scalar([response or {}], TIME_KEYS)
    return {
        "conversation_id": None if name is None else str(name),
        "user": None if user is None else str(user),
        "timestamp": read_time(time),
    }


def _find_scalar(sources: Sequence[Record], keys: Sequence[str]) -> JsonValue:
    for value in [source[key] for key in keys for source in sources if key in source]:
        if value not in (None, "") and not isinstance(value, dict | list):
            return value
    return None


def read_time(value: JsonValue) -> float | None:
    """Seconds since 1970, from a number (seconds, milliseconds, microseconds), an ISO 8601 text or a `datetime`.

    `None` for a value that is none of these.
    """
    if isinstance(value, str):
        for read in (float, datetime.fromisoformat):
            with suppress(ValueError):
                value = read(value.strip())
                break
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    if not isinstance(value, int | float) or not 0 < value < 1e17:
        return None
    while value > 1e11:  # seconds reach that in the year 5138
        value /= 1000
    return float(value)
