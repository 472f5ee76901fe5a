"""One record of a log, in the forms that servers, gateways and datasets write, as a prompt with its completion."""

from collections.abc import Callable, Mapping

from spec_kd.open_types import JsonObject, JsonValue, Record
from spec_kd.prompts.logs.completions import check_succeeded, find_completion, find_fault
from spec_kd.prompts.logs.conversations import strip_piece_number
from spec_kd.prompts.logs.logged_call import TEXT_KEYS, LoggedCall, build_call, build_conversation, note_completion
from spec_kd.prompts.logs.messages import MARKS, clean_messages, find_mark, list_keys, parse_json
from spec_kd.prompts.logs.requests import find_part, read_request
from spec_kd.prompts.logs.tracing import LeftOutError, is_langfuse, is_langsmith, unwrap_langfuse, unwrap_langsmith
from spec_kd.prompts.tool_catalog import dump_tools

SHAREGPT_ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "model": "assistant", "observation": "tool", "function_response": "tool", "tool_response": "tool",
}  # fmt: skip
CALL_ROLES = ("function_call", "tool_call")
USER_ROLES = ("user", "human", "prompter")  # of a text alone
ASSISTANT_ROLES = ("assistant", "gpt", "chatgpt", "model", "ai", "bot", "system", "tool", "function")
SPEAKER_KEYS = ("role", "from", "author", "speaker", "sender")
RENDERED_MARKS = (
    "<|im_start|>", "<|start_header_id|>", "<|start|>assistant", "<start_of_turn>", "<|assistant|>", "[/INST]",
    "### Assistant:", "\n\nAssistant:",
)  # fmt: skip


def read_record(record: JsonValue, format: str | Callable[[JsonValue], JsonValue] = "auto") -> LoggedCall | None:
    """Reads one record.

    The messages get the form in which servers pass them to the chat template, see [`clean_messages`].

    Args:
        record (`dict` or `str`): A record of a log; a `str` is a line of plain text.
        format (`str` or `Callable`, *optional*, defaults to `"auto"`): A key of [`FORMATS`], or a function that gets
            the record and returns it in one of these forms, or `None` to leave it out.

    Returns:
        `LoggedCall` or `None`: `None` for a record that the function leaves out.

    Raises:
        ValueError: Something is missing or not understood; the text says what.
        LeftOutError: The record says of itself that it is no request.
    """
    if callable(format):
        record, format = format(record), "auto"
        if record is None:
            return None
    return read_form(record, format)


def read_form(record: JsonValue, format: str = "auto") -> LoggedCall:
    """Reads one record in a form of [`FORMATS`], as [`read_record`] does."""
    if isinstance(record, str) and format in ("auto", "text"):
        _check_not_rendered(record)
        call = LoggedCall([{"role": "user", "content": record}])
    else:
        if format == "auto" and _is_list_of_messages(record):
            record = {"messages": record}
        if not isinstance(record, Mapping):
            raise ValueError(f"a record must be a JSON object, got {record!r:.60}")
        call = FORMATS[format](dict(record))
    if not call.prompt:
        raise ValueError("there are no messages before the assistant's turn")
    if call.prompt[-1]["role"] not in ("user", "tool"):
        raise ValueError(f"the prompt ends with the {call.prompt[-1]['role']}'s turn, not the user's or a tool's")
    if not any(message["content"].strip() for message in call.prompt if message["role"] in ("user", "tool")):
        raise ValueError("the user's turns are empty")
    for message in call.prompt:
        if message["role"] == "user" and not message["content"].strip():
            raise ValueError("a turn of the user is empty")
        if mark := find_mark(message):
            raise ValueError(f"the text, or a part of it, was left out when it was logged ({mark!r})")
    tools = dump_tools(call.tools) if call.tools else ""
    if mark := next((mark for mark in MARKS if mark in tools), None):
        raise ValueError(f"a part of the tools was left out when it was logged ({mark!r})")
    return call


def _is_list_of_messages(value: JsonValue) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) and "role" in m for m in value)


def _read_any(record: Record) -> LoggedCall:
    if is_langsmith(record):
        return _read_openai(unwrap_langsmith(record))
    if is_langfuse(record):
        return _read_openai(unwrap_langfuse(record))
    if "conversations" in record:
        return _read_sharegpt(record)
    prompt = record.get("prompt")
    if isinstance(prompt, list | tuple) or _is_list_of_messages(parse_json(prompt)):
        return _read_trl(record)
    if find_part(record, ("messages",)) is not None or read_request(record) is not None:
        return _read_openai(record)
    if find_part(record, TEXT_KEYS) is not None:
        return _read_text(record)
    keys = f"the keys are {list_keys(record)}"
    if "custom_id" in record and ("response" in record or "result" in record):
        raise ValueError(
            f"a batch response without its request ({record['custom_id']!r:.60}): read both files in one call"
        )
    if "role" in record and "content" in record:
        raise ValueError(
            f"one message alone ({keys}): put the messages of a conversation into one record, as `messages`"
        )
    raise ValueError(f"none of the known forms: {keys}. Give `format` a function that makes `messages` of it")


def _read_openai(record: Record) -> LoggedCall:
    """Requests of the chat completions, Anthropic and Responses APIs, with the response in one object or nested.

    LiteLLM: https://docs.litellm.ai/docs/proxy/logging_spec (`StandardLoggingPayload`).
    """
    request = read_request(record)
    if request is None:
        raise ValueError(f"no `messages`: the keys are {list_keys(record)}")
    check_succeeded(record)
    messages = request.messages
    completion, note = find_completion(record)
    # Where the response is logged beside such messages, the client asked to continue the assistant's turn.
    is_ended = bool(messages) and messages[-1]["role"] == "assistant"
    if completion is None and note is None and is_ended and request.source is record:
        return build_conversation(record, messages, record["messages"])
    notes = note_completion(record, completion, note)
    if request.source.get("chat_template_kwargs"):
        notes.append("prompts whose `chat_template_kwargs` are not kept")
    return build_call(record, messages, completion, request.tools, request=request.source, notes=notes)


def _read_sharegpt(record: Record) -> LoggedCall:
    """`conversations` of `from` and `value`, as FastChat, LLaMA-Factory and Axolotl read them."""
    turns = parse_json(record.get("conversations"))
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("no `conversations` with a list of turns")
    messages = []
    for turn in turns:
        role, content = turn.get("from") or turn.get("role"), turn.get("value", turn.get("content"))
        rest = {key: value for key, value in turn.items() if key not in ("from", "role", "value", "content")}
        if role in CALL_ROLES:
            messages.append({**rest, "role": "assistant", "tool_calls": _read_function_calls(content)})
        else:
            messages.append({**rest, "role": SHAREGPT_ROLES.get(role, role), "content": content})
    if record.get("system"):
        messages.insert(0, {"role": "system", "content": record["system"]})
    names = {} if record.get("id") is None else {"conversation_id": strip_piece_number(str(record["id"]))}
    return build_conversation({**names, **record}, clean_messages(messages), turns)


def _read_function_calls(value: JsonValue) -> list[JsonObject]:
    calls = parse_json(value)
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and "name" in call for call in calls):
        raise ValueError(f"a `function_call` turn must be JSON with a `name`, got {value!r:.60}")
    return [{"type": "function", "function": dict(call)} for call in calls]


def _read_trl(record: Record) -> LoggedCall:
    """TRL's conversational forms: `prompt` with or without `completion`, or `messages`."""
    if "prompt" not in record:
        if "messages" not in record:
            raise ValueError(f"neither `prompt` nor `messages`: the keys are {list_keys(record)}")
        return build_conversation(record, clean_messages(parse_json(record["messages"])), record["messages"])
    prompt, tools = clean_messages(parse_json(record["prompt"])), record.get("tools")
    logged = parse_json(record.get("completion"))
    if logged is None:
        completion, note = find_completion(record)
        return build_call(record, prompt, completion, tools, notes=note_completion(record, completion, note))
    turns = clean_messages([{"role": "assistant", "content": logged}] if isinstance(logged, str) else logged)
    messages = prompt + turns
    if not messages or messages[-1]["role"] != "assistant":
        raise ValueError("`completion` does not end with the assistant's turn")
    fault = find_fault(record)
    notes = [] if fault is None else [f"completions not kept, {fault}"]
    # A completion of several turns (tool calls and their results) is a conversation of which each turn counts.
    last = None if fault else messages[-1]
    return build_call(record, messages[:-1], last, tools, is_whole=len(turns) > 1, notes=notes)


def _read_text(record: Record) -> LoggedCall:
    """`prompt` or `text` and, where it was logged, the completion as text or in a response."""
    request = find_part(record, TEXT_KEYS) or record
    text = next((request[key] for key in TEXT_KEYS if request.get(key)), None)
    if not isinstance(text, str):
        raise ValueError(f"no text in `prompt` or `text`: the keys are {list_keys(record)}")
    _check_speaker(record)
    _check_not_rendered(text)
    if request.get("suffix"):
        raise ValueError("a `suffix`: text between two others is no prompt of a chat")
    check_succeeded(record)
    completion, note = find_completion(record)
    system = [{"role": "system", "content": request["system"]}] if request.get("system") else []
    prompt = clean_messages([*system, {"role": "user", "content": text}])
    notes = note_completion(record, completion, note)
    return build_call(record, prompt, completion, request.get("tools"), request=request, notes=notes)


def _check_not_rendered(text: str) -> None:
    """Refuses text with the marks of turns: a conversation, whose completions would be taken for the user's words."""
    if mark := next((mark for mark in RENDERED_MARKS if mark in text), None):
        raise ValueError(f"a text with the mark of a turn ({mark!r}), a rendered conversation: log its `messages`")


def _check_speaker(record: Record) -> None:
    """Refuses text that someone else than the user wrote, or that is not the start of a conversation."""
    for key in SPEAKER_KEYS:
        value = record.get(key)
        speaker = value.get("role") if isinstance(value, dict) else value
        if isinstance(speaker, str) and speaker.lower() in ASSISTANT_ROLES:
            raise LeftOutError(f"a text of the {speaker.lower()}, not the user's (`{key}`)")
        if isinstance(speaker, str) and key == "role" and speaker.lower() not in USER_ROLES:
            raise ValueError(f"a text with the role {speaker!r}, which is not known")
    if "role" in record and record.get("parent_id"):
        raise LeftOutError("a reply whose conversation is in other records (`parent_id`)")


FORMATS: dict[str, Callable[[Record], LoggedCall]] = {
    "auto": _read_any,
    "openai": _read_openai,
    "vllm": _read_openai,
    "litellm": _read_openai,
    "sharegpt": _read_sharegpt,
    "trl": _read_trl,
    "text": _read_text,
}
