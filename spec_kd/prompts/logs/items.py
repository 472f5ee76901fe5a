"""Messages of the OpenAI Responses API and of LangChain, in the form of chat completions."""

from spec_kd.open_types import JsonObject, JsonValue, Record
from spec_kd.prompts.logs.messages import parse_json

LANGCHAIN_ROLES = {
    "human": "user", "ai": "assistant", "system": "system", "developer": "developer", "tool": "tool",
    "function": "tool",
}  # fmt: skip


def read_items(items: JsonValue, instructions: JsonValue = None) -> list[JsonObject]:
    """Items of a request or a response of the Responses API as messages.

    What the target writes in one go (reasoning, text, calls of functions) is one message of the assistant.

    Args:
        items (`str` or `list[dict]`): `input` or `output`.
        instructions (`str`, *optional*): The system prompt.

    Raises:
        `ValueError`: Items of a kind that is not understood, such as calls of the provider's own tools.
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
    turn: JsonObject | None = None  # of the assistant, as long as it goes on
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


def is_langchain_message(message: JsonValue) -> bool:
    """Whether a message is one of LangChain: as it serializes them, `message_to_dict` or `model_dump`."""
    if not isinstance(message, dict):
        return False
    return "lc" in message or (message.get("type") in LANGCHAIN_ROLES and "role" not in message)


def read_langchain_message(message: Record) -> tuple[JsonObject, JsonObject]:
    """A LangChain message in the form of chat completions, and what the model's server said about it.

    Raises:
        `ValueError`: A class of messages that is not known.
    """
    values = message.get("kwargs") or message.get("data") or message
    kind = values.get("type") or message.get("type")
    if "lc" in message and kind not in LANGCHAIN_ROLES:  # ["langchain", "schema", "messages", "HumanMessage"]
        kind = str((message.get("id") or [""])[-1]).removesuffix("Chunk").removesuffix("Message").lower()
    if kind not in LANGCHAIN_ROLES:
        raise ValueError(f"a LangChain message of the kind {kind!r}, which is not known")
    extra = values.get("additional_kwargs") or {}
    metadata = values.get("response_metadata") or {}
    read = {"role": LANGCHAIN_ROLES[kind], "content": values.get("content")}
    # Blocks of the Anthropic API repeat the calls, which LangChain lists for all providers.
    calls = [_read_call(call) for call in values.get("tool_calls") or ()]
    if calls and isinstance(read["content"], list):
        read["content"] = [p for p in read["content"] if not (isinstance(p, dict) and p.get("type") == "tool_use")]
        read["content"] = read["content"] or ""
    if calls or extra.get("tool_calls"):
        read["tool_calls"] = calls or extra["tool_calls"]
    if extra.get("function_call") and not calls:
        read["function_call"] = extra["function_call"]
    for key in ("tool_call_id", "name"):
        if values.get(key) is not None:
            read[key] = values[key]
    if extra.get("reasoning_content"):
        read["reasoning_content"] = extra["reasoning_content"]
    return read, metadata


def _read_call(call: Record) -> Record:
    if "function" in call:
        return call
    return {"id": call.get("id"), "function": {"name": call.get("name"), "arguments": call.get("args")}}


def read_chat(messages: JsonValue) -> list[JsonValue]:
    """Messages of chat completions or of LangChain; a batch of one conversation counts as this one.

    Raises:
        `ValueError`: A batch of several conversations, or no list.
    """
    messages = parse_json(messages)
    if isinstance(messages, list) and len(messages) == 1 and isinstance(messages[0], list):
        messages = messages[0]
    if not isinstance(messages, list) or isinstance(messages, str):
        raise ValueError(f"messages must be a list, got {messages!r:.60}")
    return [read_langchain_message(m)[0] if is_langchain_message(m) else m for m in messages]
