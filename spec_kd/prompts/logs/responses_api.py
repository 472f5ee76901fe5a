"""Messages of the OpenAI Responses API, in the form of chat completions."""

from spec_kd.open_types import JsonObject, JsonValue, Record


def read_items(items: JsonValue, instructions: JsonValue = None) -> list[JsonObject]:
    """Items of a request or a response of the Responses API as messages.

    Reasoning, text and function calls of one completion are one message of the assistant.

    Args:
        items (`str` or `list[dict]`): The `input` of a request or the `output` of a response.
        instructions (`str`, *optional*): The system prompt; none by default.

    Raises:
        ValueError: An item is of a kind that is not understood, such as a call of the provider's own tools.
    """
    messages: list[JsonObject] = []
    if instructions:
        if not isinstance(instructions, str):
            raise ValueError(f"`instructions` must be text, got {instructions!r:.60}")
        messages.append({"role": "system", "content": instructions})
    if isinstance(items, str):
        return [*messages, {"role": "user", "content": items}]
    if not isinstance(items, list):
        raise ValueError(f"`input` must be text or a list of items, got {items!r:.60}")
    turn: JsonObject | None = None  # the assistant's message, as long as its items go on
    for item in items:
        kind = item.get("type", "message") if isinstance(item, dict) else type(item).__name__
        if kind == "message" and item.get("role") != "assistant":
            turn = None
            messages.append({key: value for key, value in item.items() if key not in ("type", "status", "id")})
        elif kind == "function_call_output":
            turn = None
            output = item.get("output")
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": output})
        elif kind in ("message", "function_call", "reasoning"):
            if turn is None or (kind == "message" and turn["content"]):
                turn = {"role": "assistant", "content": ""}
                messages.append(turn)
            _add(turn, kind, item)
        else:
            raise ValueError(f"an item of type {kind!r}, which is not understood")
    return messages


def _add(turn: JsonObject, kind: str, item: Record) -> None:
    if kind == "message":
        turn["content"] = item.get("content")
    elif kind == "function_call":
        call = {"name": item.get("name"), "arguments": item.get("arguments")}
        turn.setdefault("tool_calls", []).append({"id": item.get("call_id"), "function": call})
    else:
        texts = [part["text"] for part in item.get("content") or () if isinstance(part.get("text"), str)]
        if texts:
            turn["reasoning_content"] = "\n".join(texts)
