"""The completion of a logged request: where loggers put it, and whether it is complete."""

from collections.abc import Sequence

from spec_kd.open_types import JsonValue, Record
from spec_kd.prompts.logs.messages import Message, clean_messages, find_mark, list_keys, parse_json
from spec_kd.prompts.logs.requests import is_langchain_message, read_items, read_langchain_message
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
_ABSENT: JsonValue = object()  # in place of a finish reason, which may be `None`


def find_completion(record: Record) -> tuple[Message | None, str | None]:
    """The assistant's message of a record, if there is one that is understood and complete.

    Args:
        record (`dict`): Record with the completion beside the request or nested in it: choices, a message, text or a
            stream.

    Returns:
        `tuple`: The message or `None`, and a note to count or `None`. The note says why a completion is not kept, or
        that it is kept although the log does not say how it ended.
    """
    key, value = _find_value(record)
    if key is None:
        return None, None
    try:
        message, reason = _read(value)
        if message is None:
            kind = f"{type(value).__name__} {value!r:.40}"
            shown = f"an object with the keys {list_keys(value)[:8]}" if isinstance(value, dict) else kind
            return None, f"not understood: `{key}` ({shown})"
        reason = _find_reason(record) if reason is _ABSENT else reason
        if fault := find_fault({"finish_reason": reason}):
            return None, fault
        (completion,) = clean_messages([{**message, "role": "assistant"}])
    except (ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        return None, f"not understood: `{key}` ({error})"
    if not completion["content"].strip() and not completion.get("tool_calls"):
        return None, "empty"
    if mark := find_mark(completion):
        return None, f"not whole in the log: {mark}"
    return completion, "kept although no finish_reason is logged" if reason is _ABSENT else None


def check_succeeded(record: Record) -> None:
    """Raises `ValueError` if a record or its response says that the request failed."""
    parts = [record, *(parse_json(record[key]) for key in (*RESPONSE_KEYS, "result") if key in record)]
    if any(isinstance(part, dict) and _has_failed(part) for part in parts):
        raise ValueError("the request failed")


def _has_failed(part: Record) -> bool:
    if FAILURE_KEYS.isdisjoint(part):  # as of most records, which this is called for
        return False
    words = [part[key] for key in ("status", "type", "level") if isinstance(part.get(key), str)]
    code, body = part.get("status_code"), part.get("body")
    errors = [part.get("error"), isinstance(body, dict) and body.get("error"), isinstance(code, int) and code >= 400]
    return any(word.lower() in FAILURES for word in words) or any(errors)


def _find_value(record: Record) -> tuple[str | None, JsonValue]:
    if record.get("choices"):
        return "choices", record
    for key in COMPLETION_KEYS:
        value = record.get(key)
        is_completion = key != "result" or isinstance(value, dict)  # of Anthropic's batches; elsewhere "success"
        if value is not None and value not in EMPTY and is_completion:
            return key, value
    return None, None


def find_fault(record: Record) -> str | None:
    """Why a completion is not kept, by its finish reason in a record or a message; `None` if it is kept."""
    reason = _find_reason(record)
    is_whole = reason is _ABSENT or (isinstance(reason, str) and reason.lower() in FINISHED)
    return None if is_whole else f"unfinished: {reason!r:.40}"


def _read(value: JsonValue) -> tuple[Record | None, JsonValue]:
    """The message in a response and its finish reason."""
    if isinstance(value, str) and is_stream(value):
        return _read(join_stream(value))
    if isinstance(value, str):
        parsed = parse_json(value)
        message, reason = (None, _ABSENT) if parsed is value else _read(parsed)
        # text, or JSON that the target wrote
        return ({"content": value}, _ABSENT) if message is None else (message, reason)
    if isinstance(value, list) and value:
        return _read_list(value)
    return _read_object(value) if isinstance(value, dict) else (None, _ABSENT)


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
    reason, stop = choice.get("finish_reason", _ABSENT), choice.get("stop_reason")
    if isinstance(stop, str) and reason == "stop":
        reason = f"stop string {stop}"
    message = {"content": choice["text"]} if isinstance(choice.get("text"), str) else choice.get("message")
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
    while isinstance(value, list) and value:
        value = value[0]
    if not isinstance(value, dict):
        return ({"content": value} if isinstance(value, str) else None), _ABSENT
    reason = _find_reason(value.get("generation_info") or {})
    if isinstance(value.get("message"), dict):
        message, metadata = read_langchain_message(value["message"])
        return message, _find_reason(metadata) if reason is _ABSENT else reason
    return ({"content": value["text"]} if isinstance(value.get("text"), str) else None), reason


def _read_list(value: Sequence[JsonValue]) -> tuple[Record | None, JsonValue]:
    first = value[0]
    if isinstance(first, dict):
        kind = str(first.get("type", ""))
        is_chunk = str(first.get("object", "")).endswith(".chunk") or kind in ("message_start", "response.created")
        if is_chunk or (isinstance(first.get("choices"), list) and len(value) > 1):
            return _read(join_chunks(value))
        if all(isinstance(item, dict) and "role" not in item and "type" in item for item in value):
            is_output = kind in ("function_call", "reasoning", "message")
            return _read_responses({"output": value}) if is_output else ({"content": value}, _ABSENT)
    return _read(first) if len(value) == 1 else (None, _ABSENT)


def _find_reason(value: Record) -> JsonValue:
    return next((value[key] for key in REASON_KEYS if key in value), _ABSENT)
