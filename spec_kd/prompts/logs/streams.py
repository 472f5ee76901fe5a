"""Responses that were logged as they were streamed: server-sent events, put together again."""

import json
from collections.abc import Iterable, Iterator, Sequence

from spec_kd.open_types import JsonObject, JsonValue, Record
from spec_kd.prompts.logs.messages import list_keys

EVENT_FIELDS = ("data:", "event:", "id:", "retry:", ":")


def is_stream(text: str) -> bool:
    """Whether a text begins like a stream of server-sent events."""
    return text.lstrip().startswith(("data:", "event:"))


def join_stream(text: str) -> JsonObject:
    """The response that was sent as a stream of server-sent events.

    Args:
        text (`str`): The events, as OpenAI-compatible servers and Anthropic send them: `data: {...}` lines.

    Returns:
        `dict`: See [`join_chunks`].

    Raises:
        ValueError: The data of an event is not JSON, or [`join_chunks`] raises it.
    """
    chunks = []
    for line in filter(None, map(str.strip, text.splitlines())):
        if not line.startswith(EVENT_FIELDS):
            raise ValueError(f"a line of the stream is no event: {line!r:.60}")
        data = line.removeprefix("data:").strip()
        if line.startswith("data:") and data != "[DONE]":
            try:
                chunks.append(json.loads(data))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"an event of the stream is not JSON ({error})") from error
    return join_chunks(chunks)


def join_chunks(chunks: Sequence[JsonValue]) -> JsonObject:
    """The response that was sent as the chunks of a stream.

    A stream that broke off has no finish reason, so its completion counts as unfinished.

    Args:
        chunks (`list[dict]`): Chunks of chat completions, text completions, the Responses API or the Anthropic API.

    Returns:
        `dict`: A response with `choices`, of the Anthropic API, or of the Responses API.

    Raises:
        ValueError: The chunks are of another kind, or the server sent an error.
    """
    chunks = [chunk for chunk in chunks if not (isinstance(chunk, dict) and chunk.get("type") == "ping")]
    if not chunks or not all(isinstance(chunk, dict) for chunk in chunks):
        raise ValueError("the stream holds no chunks that are JSON objects")
    if any(chunk.get("error") or chunk.get("type") == "error" for chunk in chunks):
        raise ValueError("the request failed")
    if any(str(chunk.get("type", "")).startswith("response.") for chunk in chunks):
        return _join_responses(chunks)
    if any(chunk.get("type") == "message_start" for chunk in chunks):
        return _join_anthropic(chunks)
    if all(isinstance(chunk.get("choices"), list) for chunk in chunks):
        return _join_choices(chunks)
    raise ValueError(f"the stream holds chunks of an unknown kind: the keys are {list_keys(chunks[0])}")


def _join_choices(chunks: Sequence[Record]) -> JsonObject:
    message: JsonObject = {"role": "assistant", "content": None}
    calls: dict[JsonValue, JsonObject] = {}
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice.get("index", 0) == 0]
    for key, value in (item for choice in choices for item in (choice.get("delta") or {}).items()):
        if key == "tool_calls":
            for call in value or ():
                _add_call(calls.setdefault(call.get("index", 0), {}), call)
        elif key == "function_call" and value:
            _add_call(calls.setdefault(key, {}), {"function": value})
        elif key in ("content", "reasoning", "reasoning_content", "refusal") and isinstance(value, str):
            message[key] = (message.get(key) or "") + value
        elif key not in ("role", "token_ids") and value:
            message[key] = value  # `clean_messages` decides about it
    if calls:
        message["tool_calls"] = list(calls.values())
    texts = [choice["text"] for choice in choices if isinstance(choice.get("text"), str)]
    reason = next((reason for choice in reversed(choices) if (reason := choice.get("finish_reason"))), None)
    joined = {"text": "".join(texts)} if texts else {"message": message}
    names = {key: chunks[0][key] for key in ("id", "created") if key in chunks[0]}
    return {**names, "choices": [{**joined, "finish_reason": reason}]}


def _add_call(call: JsonObject, piece: Record) -> None:
    if piece.get("id"):
        call["id"] = piece["id"]
    function = call.setdefault("function", {"name": "", "arguments": ""})
    for key, value in (piece.get("function") or {}).items():
        if isinstance(value, str):
            function[key] = function.get(key, "") + value


def _join_anthropic(chunks: Sequence[Record]) -> JsonObject:
    response: JsonObject = {}
    blocks: dict[JsonValue, JsonObject] = {}
    for chunk in chunks:
        kind = chunk.get("type")
        if kind == "message_start":
            response = {**chunk["message"], "stop_reason": None}
        elif kind == "content_block_start":
            blocks[chunk["index"]] = dict(chunk["content_block"])
        elif kind == "content_block_delta":
            block, delta = blocks[chunk["index"]], chunk["delta"]
            key = {"text_delta": "text", "thinking_delta": "thinking", "input_json_delta": "partial_json"}.get(
                delta.get("type")
            )
            if key is not None:
                block[key] = block.get(key, "") + delta[key]
            elif delta.get("type") not in ("signature_delta", "citations_delta"):
                raise ValueError(f"the stream has a piece of type {delta.get('type')!r}, which is not understood")
        elif kind == "message_delta":
            response["stop_reason"] = chunk["delta"].get("stop_reason")
    for block in blocks.values():
        if text := block.pop("partial_json", None):
            block["input"] = json.loads(text)
    return {**response, "type": "message", "role": "assistant", "content": list(blocks.values())}


def _join_responses(chunks: Sequence[Record]) -> JsonObject:
    """The last events contain the whole response."""
    ends = ("response.completed", "response.incomplete", "response.failed")
    responses = [chunk["response"] for chunk in chunks if chunk.get("type") in ends]
    return dict(responses[-1]) if responses else {"object": "response", "status": "in_progress", "output": []}


class StreamLine(str):
    """A line of a file that is an event of a stream."""


def attach_streams(records: Iterable[tuple[int, JsonValue]], longest: int) -> Iterator[tuple[int, JsonValue]]:
    """Adds a stream of events to the record on the line before it, as its `response`.

    Args:
        records (`Iterable[tuple[int, Any]]`): Line numbers with their records, or with a [`StreamLine`].
        longest (`int`): Most characters of a stream.

    Returns:
        `Iterator[tuple[int, Any]]`: The records without the events. A stream without a request before it is replaced by
        a `ValueError`.
    """
    before: list[tuple[int, JsonValue]] = []  # the last record, as long as events may follow it
    events: list[tuple[int, str]] = []
    size = 0
    for number, record in records:
        if isinstance(record, StreamLine):
            size += len(record)
            if size <= longest:
                events.append((number, record))
        else:
            yield from _attach(before, events, size > longest)
            before, events, size = [(number, record)], [], 0
    yield from _attach(before, events, size > longest)


def _attach(
    before: list[tuple[int, JsonValue]], events: list[tuple[int, str]], is_cut: bool
) -> Iterator[tuple[int, JsonValue]]:
    number, record = before[0] if before else (0, None)
    is_answered = isinstance(record, dict) and any(record.get(key) for key in ("response", "choices", "output"))
    if events and isinstance(record, dict) and not is_answered and not is_cut:
        yield number, {**record, "response": "\n".join(event for _, event in events)}
        return
    yield from before
    if events:
        reason = "is too long" if is_cut else "without a request on the line before it"
        yield events[0][0], ValueError(f"a stream of events {reason}")
