"""Messages of LangChain, in the form of chat completions."""

from spec_kd.open_types import JsonObject, JsonValue, Record
from spec_kd.prompts.logs.messages import parse_json

LANGCHAIN_ROLES = {
    "human": "user", "ai": "assistant", "system": "system", "developer": "developer", "tool": "tool",
    "function": "tool",
}  # fmt: skip


def is_langchain_message(message: JsonValue) -> bool:
    """Whether a message is LangChain's, as its serialization, `message_to_dict` or `model_dump` write it."""
    if not isinstance(message, dict):
        return False
    return "lc" in message or (message.get("type") in LANGCHAIN_ROLES and "role" not in message)


def read_langchain_message(message: Record) -> tuple[JsonObject, JsonObject]:
    """A LangChain message in the form of chat completions, and the metadata of the model's server.

    Raises:
        ValueError: The class of the message is not known.
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
    # LangChain lists the calls of all providers; blocks of the Anthropic API repeat them in the content.
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
    """Messages of chat completions or of LangChain; a batch of one conversation counts as that conversation.

    Raises:
        ValueError: The value is no list, or a message's class is not known.
    """
    messages = parse_json(messages)
    if isinstance(messages, list) and len(messages) == 1 and isinstance(messages[0], list):
        messages = messages[0]
    if not isinstance(messages, list) or isinstance(messages, str):
        raise ValueError(f"messages must be a list, got {messages!r:.60}")
    return [read_langchain_message(m)[0] if is_langchain_message(m) else m for m in messages]
