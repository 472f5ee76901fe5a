"""The keys of log records that are known, and how to find them in a record and in what is nested in it."""

from collections.abc import Sequence
from datetime import UTC, datetime

from spec_kd.open_types import JsonObject, JsonValue, Record
from spec_kd.prompts.logs.completions import COMPLETION_KEYS, RESPONSE_KEYS
from spec_kd.prompts.logs.messages import parse_json

# Keys under which loggers nest the request. `body`: batch files of OpenAI and `vllm run-batch`; `params`: of Anthropic.
# `proxy_server_request`: rows of LiteLLM_SpendLogs, whose `messages` are empty.
REQUEST_KEYS = (
    "request", "body", "params", "request_body", "proxy_server_request", "reqPayload", "kwargs", "input", "inputs",
)  # fmt: skip
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


def find_request(record: Record, wanted: Sequence[str]) -> Record | None:
    """The record itself or the request that is nested in it, whichever has one of the wanted keys; otherwise `None`."""
    return _find_part(record, REQUEST_KEYS, wanted)


def find_response(record: Record) -> Record:
    """The response that is nested in a record, or an empty dictionary."""
    return _find_part(record, RESPONSE_KEYS, ("choices", "created", "created_at")) or {}


def _find_part(record: Record, places: Sequence[str], wanted: Sequence[str]) -> Record | None:
    if _has(record, wanted):
        return record
    for key in places:
        if key in record and isinstance(part := parse_json(record[key]), dict):
            if _has(part, wanted):
                return part
            if isinstance(body := part.get("body"), dict) and _has(body, wanted):
                return body
    return None


def _has(part: Record, keys: Sequence[str]) -> bool:
    """Whether one of the keys has a value; LiteLLM writes `"{}"` for a value that it did not keep."""
    for key in keys:
        value = part.get(key)
        if value and value != "{}" and value != "[]":
            return True
    return False


def find_fields(record: Record, request: Record) -> JsonObject:
    """Conversation, user and time of a record, each `None` if it has none."""
    sources = [record] if request is record else [record, request]
    sources += [metadata for source in sources if isinstance(metadata := parse_json(source.get("metadata")), dict)]
    name, user = _find_scalar(sources, CONVERSATION_KEYS), _find_scalar(sources, USER_KEYS)
    time = _find_scalar(sources, TIME_KEYS)
    if time is None:
        time = _find_scalar([find_response(record)], TIME_KEYS)
    return {
        "conversation_id": None if name is None else str(name),
        "user": None if user is None else str(user),
        "timestamp": read_time(time),
    }


def _find_scalar(sources: Sequence[Record], keys: Sequence[str]) -> JsonValue:
    for key in keys:
        for source in sources:
            if key in source:
                value = source[key]
                if value is not None and value != "" and not isinstance(value, dict | list):
                    return value
    return None


def read_time(value: JsonValue) -> float | None:
    """Seconds since 1970, from a number (seconds, milliseconds, microseconds), an ISO 8601 text or a `datetime`.

    `None` for a value that is none of these.
    """
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            try:
                value = datetime.fromisoformat(value.strip())
            except ValueError:
                return None
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    if not isinstance(value, int | float) or not 0 < value < 1e17:
        return None
    while value > 1e11:  # seconds reach that in the year 5138
        value /= 1000
    return float(value)
