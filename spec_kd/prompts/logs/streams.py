"""Responses that were logged as they were streamed: server-sent events, put together again."""

import json
from collections.abc import Iterable, Iterator, Sequence

from spec_kd.open_types import JsonObject, JsonValue, Record

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
    for line in text.splitlines():
        if not (line := line.strip()):
            continue
        if not line.startswith(EVENT_FIELDS):
            raise ValueError(f"a line of the stream is no event: {line!r:.60}")
        data = line.removeprefix("data:").strip()
        if not line.startswith("data:") or data == "[DONE]":
            continue
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
    raise ValueError(f"the stream holds chunks of an unknown kind: the keys are {sorted(map(str, chunks[0]))[:12]}")


def _join_choices(chunks: Iterable[Record]) -> JsonObject:
    message: JsonObject = {"role": "assistant", "content": None}
    calls: dict[JsonValue, JsonObject] = {}
    text, reason = None, None
    first: Record = {}
    for chunk in chunks:
        first = first or chunk
        for choice in chunk["choices"]:
            if choice.get("index", 0) != 0:
                continue
            reason = choice.get("finish_reason") or reason
            if isinstance(choice.get("text"), str):
                text = (text or "") + choice["text"]
            for key, value in (choice.get("delta") or {}).items():
                if key == "tool_calls":
                    for call in value or ():
                        _add_call(calls.setdefault(call.get("index", 0), {}), call)
                elif key == "function_call":
                    if value:
                        _add_call(calls.setdefault(key, {}), {"function": value})
                elif key in ("content", "reasoning", "reasoning_content", "refusal") and isinstance(value, str):
                    message[key] = (message.get(key) or "") + value
                elif key not in ("role", "token_ids") and value:
                    message[key] = value  # `clean_messages` decides about it
    if calls:
        message["tool_calls"] = list(calls.values())
    choice = {"message": message} if text is None else {"text": text}
    return {**{k: first[k] for k in ("id", "created") if k in first}, "choices": [{**choice, "finish_reason": reason}]}


def _add_call(call: JsonObject, piece: Record) -> None:
    if piece.get("id"):
        call["id"] = piece["id"]
    function = call.setdefault("function", {"name": "", "arguments": ""})
    for key, value in (piece.get("function") or {}).items():
        if isinstance(value, str):
            function[key] = function.get(key, "") + value


def _join_anthropic(chunks: Iterable[Record]) -> JsonObject:
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


def _join_responses(chunks: Iterable[Record]) -> JsonObject:
    """The last events contain the whole response."""
    for chunk in reversed(list(chunks)):
        if chunk.get("type") in ("response.completed", "response.incomplete", "response.failed"):
            return dict(chunk["response"])
    return {"object": "response", "status": "in_progress", "output": []}


class StreamLine(str):
    """A line of a file that is an event of a stream."""

    __slots__ = ()


def attach_streams(records: Iterable[tuple[int, JsonValue]], longest: int) -> Iterator[tuple[int, JsonValue]]:
    """Adds a stream of events to the record on the line before it, as its `response`.

    Args:
        records (`Iterable[tuple[int, Any]]`): Line numbers with their records, or with a [`StreamLine`].
        longest (`int`): Most characters of a stream.

    Returns:
        `Iterator[tuple[int, Any]]`: The records without the events. A stream without a request before it is replaced by
        a `ValueError`.
    """
    held: tuple[int, JsonValue] | None = None
    lines: list[str] = []
    start = size = 0
    failure = None
    try:
        for number, record in records:
            if isinstance(record, StreamLine):
                start = start if lines else number
                size += len(record)
                if size <= longest:
                    lines.append(record)
                continue
            if lines:
                yield from _attach(held, start, lines, size > longest)
                lines, size = [], 0
            elif held is not None:
                yield held
            held = (number, record)
    except (GeneratorExit, KeyboardInterrupt):
        raise
    except Exception as error:  # raised after the record that is held back
        failure = error
    if lines:
        yield from _attach(held, start, lines, size > longest)
    elif held is not None:
        yield held
    if failure is not None:
        raise failure


def _attach(
    held: tuple[int, JsonValue] | None, start: int, lines: list[str], is_cut: bool
) -> Iterator[tuple[int, JsonValue]]:
    record = held[1] if held is not None else None
    if is_cut:
        if held is not None:
            yield held
        yield start, ValueError("a stream of events is too long")
    elif (
        held is not None
        and isinstance(record, dict)
        and not any(record.get(key) for key in ("response", "choices", "output"))
    ):
        yield held[0], {**record, "response": "\n".join(lines)}
    else:
        if held is not None:
            yield held
        yield start, ValueError("a stream of events without a request on the line before it")
