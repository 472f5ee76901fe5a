"""Requests of the chat completions, Anthropic and Responses APIs, in one form."""

from dataclasses import dataclass

from spec_kd.open_types import JsonValue, Record
from spec_kd.prompts.logs.langchain import is_langchain_message, read_chat
from spec_kd.prompts.logs.messages import Message, clean_messages, parse_json
from spec_kd.prompts.logs.record_keys import find_request
from spec_kd.prompts.logs.responses_api import read_items

RESPONSES_KEYS = ("instructions", "max_output_tokens", "previous_response_id")  # of the Responses API alone
ELSEWHERE_KEYS = ("previous_response_id", "conversation", "prompt")  # what the Responses API keeps on its server


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


def read_request(record: Record) -> Request | None:
    """The request in a record, or `None` if there is none with `messages` or `input`.

    Raises:
        ValueError: The request is not understood.
    """
    source = find_request(record, ("messages",))
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
    if isinstance(system, str):
        return system
    texts: list[JsonValue] = [part.get("text") if isinstance(part, dict) else part for part in system]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"`system` holds more than text: {system!r:.60}")
    return "".join(texts)


def _read_input(record: Record) -> Request | None:
    """A request of the Responses API, or a list of messages as loggers of function calls write it."""
    source = find_request(record, ("input", "inputs"))
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
