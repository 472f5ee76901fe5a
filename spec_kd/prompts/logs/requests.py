"""Requests of the chat completions, Anthropic and Responses APIs and of LangChain, with their messages in one form."""

from collections.abc import Sequence
from dataclasses import dataclass

from spec_kd.open_types import JsonObject, JsonValue, Record
from spec_kd.prompts.logs.messages import Message, clean_messages, parse_json, read_names

# Keys under which loggers nest the request. `body`: batch files of OpenAI and `vllm run-batch`; `params`: of Anthropic.
# `proxy_server_request`: rows of LiteLLM_SpendLogs, whose `messages` are empty.
REQUEST_KEYS = (
    "request", "body", "params", "request_body", "proxy_server_request", "reqPayload", "kwargs", "input", "inputs",
)  # fmt: skip
RESPONSES_KEYS = ("instructions", "max_output_tokens", "previous_response_id")  # of the Responses API alone
ELSEWHERE_KEYS = ("previous_response_id", "conversation", "prompt")  # what the Responses API keeps on its server
LANGCHAIN_ROLES = {
    "human": "user", "ai": "assistant", "system": "system", "developer": "developer", "tool": "tool",
    "function": "tool",
}  # fmt: skip


@dataclass(frozen=True)
class Request:
    """The request of a record.

    Attributes:
        source (`dict`): Part of the record that is the request.
        messages (`list[dict]`): Messages that the client sent, as [`clean_messages`] returns them.
        tools: Tools as the client sent them.
    """

    source: Record
    messages: list[Message]
    tools: JsonValue


def find_part(record: Record, wanted: Sequence[str], places: Sequence[str] = REQUEST_KEYS) -> Record | None:
    """The record itself or the part that is nested in it, whichever has one of the wanted keys; otherwise `None`.

    Args:
        record (`dict`): Record of a log.
        wanted (`Sequence[str]`): Keys of which one has a value.
        places (`Sequence[str]`, *optional*): Keys of nested objects; by default those of requests.
    """
    if _has_value(record, wanted):
        return record
    for key in places:
        part = parse_json(record[key]) if key in record else None
        for inner in (part, part.get("body")) if isinstance(part, dict) else ():
            if isinstance(inner, dict) and _has_value(inner, wanted):
                return inner
    return None


def _has_value(part: Record, keys: Sequence[str]) -> bool:
    """Whether one of the keys has a value; LiteLLM writes `"{}"` for a value that it did not keep."""
    for key in keys:  # noqa: SIM110  # `any` over a generator takes twice as long, and each record comes here often
        if (value := part.get(key)) and value not in ("{}", "[]"):
            return True
    return False


def read_request(record: Record) -> Request | None:
    """The request in a record, or `None` if there is none with `messages` or `input`.

    Raises:
        ValueError: The request is not understood.
    """
    source = find_part(record, ("messages",))
    if source is None:
        return _read_input(record)
    messages = read_chat(source["messages"])
    if system := source.get("system"):  # the Anthropic API's
        messages = [{"role": "system", "content": _join_system(system)}, *messages]
    parameters = parse_json(record.get("model_parameters") or record.get("optional_params") or {})
    tools = source.get("tools") or (parameters.get("tools") if isinstance(parameters, dict) else None)
    return Request(source, clean_messages(messages), tools)


def _join_system(system: JsonValue) -> str:
    """The text of `system`, whose blocks vLLM joins without a space."""
    parts = [system] if isinstance(system, str) else system
    texts: list[JsonValue] = [part.get("text") if isinstance(part, dict) else part for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"`system` holds more than text: {system!r:.60}")
    return "".join(texts)


def _read_input(record: Record) -> Request | None:
    """A request of the Responses API, or a list of messages as loggers of function calls write it."""
    source = find_part(record, ("input", "inputs"))
    if source is None:
        return None
    given = parse_json(source.get("input") or source.get("inputs"))
    is_list = isinstance(given, list) and all(isinstance(i, dict) and ("role" in i or "type" in i) for i in given)
    if is_list and (any(map(is_langchain_message, given)) or not given):
        return Request(source, clean_messages(read_chat(given)), source.get("tools")) if given else None
    response = parse_json(record.get("response"))
    response = response.get("body", response) if isinstance(response, dict) else {}
    is_responses = (
        response.get("object") == "response"
        or any(source.get(key) for key in RESPONSES_KEYS)
        or str(record.get("url", "")).endswith("/responses")
    )
    if not is_list and not (is_responses and isinstance(given, str)):
        return None
    # A response repeats values that the request left to defaults on the server.
    said = {**response, **source} if is_responses else source
    if is_responses and (key := next((key for key in ELSEWHERE_KEYS if said.get(key)), None)):
        raise ValueError(f"a part of the prompt was on the server only (`{key}`)")
    return Request(source, clean_messages(read_items(given, said.get("instructions"))), said.get("tools"))


def read_items(items: JsonValue, instructions: JsonValue = None) -> list[JsonObject]:
    """Items of a request or a response of the Responses API as messages.

    Reasoning, text and function calls of one completion are one message of the assistant.

    Args:
        items (`str` or `list[dict]`): The `input` of a request or the `output` of a response.
        instructions (`str`, *optional*): The system prompt; none by default.

    Raises:
        ValueError: An item is of a kind that is not understood, such as a call of the provider's own tools.
    """
    if instructions and not isinstance(instructions, str):
        raise ValueError(f"`instructions` must be text, got {instructions!r:.60}")
    messages: list[JsonObject] = [{"role": "system", "content": instructions}] if instructions else []
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
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")})
        elif kind in ("message", "function_call", "reasoning"):
            if turn is None or (kind == "message" and turn["content"]):
                turn = {"role": "assistant", "content": ""}
                messages.append(turn)
            _add_item(turn, kind, item)
        else:
            raise ValueError(f"an item of type {kind!r}, which is not understood")
    return messages


def _add_item(turn: JsonObject, kind: str, item: Record) -> None:
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
    content, calls = values.get("content"), [_read_call(call) for call in values.get("tool_calls") or ()]
    # LangChain lists the calls of all providers; blocks of the Anthropic API repeat them in the content.
    if calls and isinstance(content, list):
        content = [part for part in content if not (isinstance(part, dict) and part.get("type") == "tool_use")] or ""
    more = {
        "tool_calls": calls or extra.get("tool_calls"),
        "function_call": None if calls else extra.get("function_call"),
        "reasoning_content": extra.get("reasoning_content"),
    }
    more = {key: value for key, value in more.items() if value}
    read = {"role": LANGCHAIN_ROLES[kind], "content": content, **more, **read_names(values)}
    return read, values.get("response_metadata") or {}


def _read_call(call: Record) -> Record:
    named = {"name": call.get("name"), "arguments": call.get("args")}
    return call if "function" in call else {"id": call.get("id"), "function": named}


def read_chat(messages: JsonValue) -> list[JsonValue]:
    """Messages of chat completions or of LangChain; a batch of one conversation counts as that conversation.

    Raises:
        ValueError: The value is no list, or a message's class is not known.
    """
    messages = parse_json(messages)
    if isinstance(messages, list) and len(messages) == 1 and isinstance(messages[0], list):
        messages = messages[0]
    if not isinstance(messages, list):
        raise ValueError(f"messages must be a list, got {messages!r:.60}")
    return [read_langchain_message(m)[0] if is_langchain_message(m) else m for m in messages]
