"""The completion of a logged request: where loggers put it, and whether it is complete."""

from collections.abc import Sequence

from spec_kd.open_types import JsonValue, Record
from spec_kd.prompts.logs.langchain import is_langchain_message, read_langchain_message
from spec_kd.prompts.logs.messages import Message, clean_messages, find_mark, parse_json
from spec_kd.prompts.logs.responses_api import read_items
from spec_kd.prompts.logs.streams import is_stream, join_chunks, join_stream

RESPONSE_KEYS = ("response", "response_body", "respPayload", "output", "outputs")
COMPLETION_KEYS = (
    *RESPONSE_KEYS, "completion", "answer", "reply", "generation", "generations", "generated_text", "prediction",
    "result",
)  # fmt: skip
# Finish reasons by which servers say that the target ended its completion; with any other one it was cut off.
# `stop` counts without a `stop_reason` that is text: there vLLM names the client's stop string.
FINISHED = {
    "stop", "tool_calls", "function_call",  # OpenAI, vLLM, SGLang, llama.cpp, Ollama
    "end_turn", "tool_use",  # Anthropic
    "completed",  # the Responses API
    "eos", "eos_token",  # text-generation-inference, Together
    "complete", "tool_call",  # Cohere
}  # fmt: skip
FAILURE_KEYS = {"status", "type", "level", "status_code", "body", "error"}
FAILURES = ("failure", "failed", "error", "errored", "cancelled", "canceled", "expired")
EMPTY: tuple[JsonValue, ...] = ("", [], {}, "{}", "[]")
REASON_KEYS = ("finish_reason", "finishReason", "stop_reason", "done_reason")
RESPONSE_ONLY = {"type", "object", "container", "context_management", "stop_details"}  # beside an Anthropic message
NOT_GIVEN = "kept although no finish_reason is logged"


def find_completion(record: Record) -> tuple[Message | None, str | None]:
    """The assistant's message of a record, if there is one that is understood and complete.

    Args:
        record (`dict`): Record with the completion beside the request or nested in it: choices, a message, text or a
            stream.

    Returns:
        `tuple`: The message or `None`, and a note to count or `None`. The note says why a completion is not kept, or
        that it is kept although the log does not say how it ended.

    Raises:
        FailedRequestError: The record says that the request failed.
    """
    key, value = _find_value(record)
    if key is None:
        return None, None
    try:
        message, reason = _read(value)
        if message is None:
            return None, f"not understood: `{key}` ({_describe(value)})"
        if reason is _ABSENT:
            reason = next((record[k] for k in REASON_KEYS if k in record), _ABSENT)
        fault = _find_fault(reason)
        if fault is not None:
            return None, fault
        (completion,) = clean_messages([{**message, "role": "assistant"}])
    except FailedRequestError:
        raise
    except (ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        return None, f"not understood: `{key}` ({error})"
    if not completion["content"].strip() and not completion.get("tool_calls"):
        return None, "empty"
    if mark := find_mark(completion):
        return None, f"not whole in the log: {mark}"
    return completion, NOT_GIVEN if reason is _ABSENT else None


class FailedRequestError(ValueError):
    """Error of a record whose request failed on the server."""

    def __init__(self) -> None:
        super().__init__("the request failed")


class _Absent:
    """No finish reason was logged."""


_ABSENT = _Absent()


def check_succeeded(record: Record) -> None:
    """Raises `FailedRequestError` if a record or its response says that the request failed."""
    if _has_failed(record):
        raise FailedRequestError
    for key in (*RESPONSE_KEYS, "result"):
        if key in record and isinstance(part := parse_json(record[key]), dict) and _has_failed(part):
            raise FailedRequestError


def _has_failed(part: Record) -> bool:
    if FAILURE_KEYS.isdisjoint(part):
        return False
    for key in ("status", "type", "level"):
        if key in part and isinstance(part[key], str) and part[key].lower() in FAILURES:
            return True
    if "status_code" in part and isinstance(part["status_code"], int) and part["status_code"] >= 400:
        return True
    body = part.get("body")
    return bool(part.get("error") or (isinstance(body, dict) and body.get("error")))


def _find_value(record: Record) -> tuple[str | None, JsonValue]:
    if record.get("choices"):
        return "choices", record
    for key in COMPLETION_KEYS:
        value = record.get(key)
        if key == "result" and not isinstance(value, dict):  # of Anthropic's batches; elsewhere "success"
            continue
        if value is not None and value not in EMPTY:
            return key, value
    return None, None


def find_fault(record: Record) -> str | None:
    """Why a completion is not kept, by its finish reason in a record or a message; `None` if it is kept."""
    return _find_fault(_find_reason(record))


def _find_fault(reason: JsonValue) -> str | None:
    """Why a completion with this finish reason is not kept; `None` if it is kept."""
    if reason is _ABSENT:
        return None
    if isinstance(reason, str) and reason.lower() in FINISHED:
        return None
    return f"unfinished: {reason!r:.40}"


def _read(value: JsonValue) -> tuple[Record | None, JsonValue]:
    """The message in a response and its finish reason."""
    if isinstance(value, str):
        if is_stream(value):
            return _read(join_stream(value))
        parsed = parse_json(value)
        if parsed is not value:
            message, reason = _read(parsed)
            if message is not None:
                return message, reason
        # text, or JSON that the target wrote
        return {"content": value}, _ABSENT
    if isinstance(value, dict):
        return _read_object(value)
    if isinstance(value, list) and value:
        return _read_list(value)
    return None, _ABSENT


def _read_object(value: Record) -> tuple[Record | None, JsonValue]:
    for key in ("body", "message"):  # batch files; Ollama and Anthropic's batches
        inner = value.get(key)
        if isinstance(inner, dict) and "choices" not in value:
            message, reason = _read_object(inner)
            return message, _find_reason(value) if reason is _ABSENT else reason
    if choices := parse_json(value.get("choices")):
        return _read_choice(choices[0] if isinstance(choices, list) else None)
    if value.get("generations"):
        return _read_generation(value["generations"])
    output = value.get("output")
    if value.get("object") == "response" or isinstance(output, list):
        return _read_responses(value)
    if isinstance(output, dict | str) and output:
        return _read(output)
    if isinstance(value.get("messages"), list) and value["messages"]:
        return _read_list(value["messages"])
    if is_langchain_message(value):
        message, metadata = read_langchain_message(value)
        return (message if message["role"] == "assistant" else None), _find_reason(metadata)
    if value.get("role") not in (None, "assistant", "ai", "model"):
        return None, _ABSENT
    if {"content", "tool_calls", "function_call"} & set(value):
        return {key: value[key] for key in value if key not in RESPONSE_ONLY}, _find_reason(value)
    text = next((value[key] for key in ("text", "generated_text") if isinstance(value.get(key), str)), None)
    return (None if text is None else {"content": text}), _find_reason(value)


def _read_choice(choice: JsonValue) -> tuple[Record | None, JsonValue]:
    """The first choice: a prompt with several completions counts once."""
    if not isinstance(choice, dict):
        return None, _ABSENT
    reason = choice.get("finish_reason", _ABSENT)
    stop = choice.get("stop_reason")
    if isinstance(stop, str) and reason == "stop":
        reason = f"stop string {stop}"
    if isinstance(choice.get("text"), str):
        return {"content": choice["text"]}, reason
    message = choice.get("message")
    return (message if isinstance(message, dict) else None), reason


def _read_responses(value: Record) -> tuple[Record | None, JsonValue]:
    status = value.get("status", _ABSENT)
    if status == "incomplete":
        status = (value.get("incomplete_details") or {}).get("reason") or status
    messages = read_items(value.get("output") or [])
    if not messages:
        return {"content": ""}, status
    return (messages[0] if len(messages) == 1 and messages[0]["role"] == "assistant" else None), status


def _read_generation(value: JsonValue) -> tuple[Record | None, JsonValue]:
    """LangChain's result: for each prompt a list of its completions."""
    while isinstance(value, list) and not isinstance(value, str) and value:
        value = value[0]
    if isinstance(value, str):
        return {"content": value}, _ABSENT
    if not isinstance(value, dict):
        return None, _ABSENT
    reason = _find_reason(value.get("generation_info") or {})
    if isinstance(value.get("message"), dict):
        message, metadata = read_langchain_message(value["message"])
        return message, _find_reason(metadata) if reason is _ABSENT else reason
    return ({"content": value["text"]} if isinstance(value.get("text"), str) else None), reason


def _read_list(value: Sequence[JsonValue]) -> tuple[Record | None, JsonValue]:
    first = value[0]
    if isinstance(first, dict):
        chunk_type = str(first.get("type", ""))
        is_chunk = str(first.get("object", "")).endswith(".chunk") or chunk_type in (
            "message_start",
            "response.created",
        )
        if is_chunk or (isinstance(first.get("choices"), list) and len(value) > 1):
            return _read(join_chunks(value))
        if all(isinstance(item, dict) and "role" not in item and "type" in item for item in value):
            if chunk_type in ("function_call", "reasoning", "message"):
                return _read_responses({"output": value})
            return {"content": value}, _ABSENT
    if len(value) != 1:
        return None, _ABSENT
    return _read(first)


def _find_reason(value: Record) -> JsonValue:
    return next((value[key] for key in REASON_KEYS if key in value), _ABSENT)


def _describe(value: JsonValue) -> str:
    if isinstance(value, dict):
        return f"an object with the keys {sorted(map(str, value))[:8]}"
    return f"{type(value).__name__} {value!r:.40}"
