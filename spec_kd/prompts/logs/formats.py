"""One record of a log, in the forms that servers, gateways and datasets write, as prompts with answers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from spec_kd.open_types import JsonObject, JsonValue, Record
from spec_kd.prompts.logs.completions import check_succeeded, find_completion, find_fault
from spec_kd.prompts.logs.conversations import strip_piece_number
from spec_kd.prompts.logs.fields import (
    KNOWN_KEYS,
    MEDIA_KEYS,
    TEXT_KEYS,
    find_fields,
    find_request,
)
from spec_kd.prompts.logs.messages import MARKS, Message, clean_messages, find_mark, parse_json
from spec_kd.prompts.logs.requests import read_request
from spec_kd.prompts.logs.tracing import LeftOutError, is_langfuse, is_langsmith, unwrap_langfuse, unwrap_langsmith
from spec_kd.prompts.tool_catalog import Tool, dump_tools, read_tools, wrap_tool

TURNS = ("auto", "all", "last")
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
NUM_NAMED = 5


@dataclass(frozen=True)
class LoggedCall:
    """What one answer of the assistant was asked for, and the answer.

    Attributes:
        prompt (`list[dict]`): Messages, the last one of the user or a tool.
        tools (`list[dict]`, *optional*): Schemas of the tools that were offered.
        completion (`dict`, *optional*): The assistant's message.
        conversation_id (`str`, *optional*): As logged.
        user (`str`, *optional*): As logged.
        timestamp (`float`, *optional*): Seconds since 1970.
        is_whole (`bool`): Whether the record is a conversation as a whole, not one request of it.
        notes (`tuple[str, ...]`): What to count of it, such as why an answer that was logged is not kept.
    """

    prompt: list[Message]
    tools: list[JsonValue] | None = None
    completion: Message | None = None
    conversation_id: str | None = None
    user: str | None = None
    timestamp: float | None = None
    is_whole: bool = False
    notes: tuple[str, ...] = field(default=(), compare=False)


def read_record(record: JsonValue, format: str | Callable[[JsonValue], JsonValue] = "auto") -> LoggedCall | None:
    """Reads one record.

    Messages get the form that servers hand to the chat template, see [`clean_messages`].

    Args:
        record (`dict` or `str`): A line of a log; text for plain text.
        format (`str` or `Callable`): A key of [`FORMATS`], or a function from the record to one of these forms, or to
            `None` for a record to leave out.

    Returns:
        `LoggedCall`; `None` for a record that the function leaves out.

    Raises:
        `ValueError`: Says what is missing or not understood.
        `LeftOutError`: The record is no request, by what it says of itself.
    """
    if callable(format):
        record, format = format(record), "auto"
        if record is None:
            return None
    if isinstance(record, Mapping) and not isinstance(record, dict):
        record = dict(record)
    call = FORMATS[format](record)
    if not call.prompt:
        raise ValueError("no messages before the assistant's answer")
    if call.prompt[-1]["role"] not in ("user", "tool"):
        raise ValueError(f"the prompt ends with the {call.prompt[-1]['role']}'s turn, not the user's or a tool's")
    if not any(message["content"].strip() for message in call.prompt if message["role"] in ("user", "tool")):
        raise ValueError("the user's turns are empty")
    for message in call.prompt:
        if message["role"] == "user" and not message["content"].strip():
            raise ValueError("a turn of the user is empty")
        if mark := find_mark(message):
            raise ValueError(f"the text, or a part of it, was left out when it was logged ({mark!r})")
    if call.tools:
        text = dump_tools(call.tools)
        if mark := next((mark for mark in MARKS if mark in text), None):
            raise ValueError(f"a part of the tools was left out when it was logged ({mark!r})")
    return call


def split_turns(call: LoggedCall, turns: str = "auto") -> list[LoggedCall]:
    """One call for each turn of the assistant, with the history that it had.

    Args:
        call (`LoggedCall`): The last turn.
        turns (`str`): `"all"`, `"last"`, or `"auto"`: all of a whole conversation, and the last one of a request, whose
            earlier turns have requests of their own in the log.
    """
    if turns == "last" or (turns == "auto" and not call.is_whole):
        return [call]
    earlier = [
        replace(call, prompt=call.prompt[:position], completion=message)
        for position, message in enumerate(call.prompt)
        if message["role"] == "assistant" and position and call.prompt[position - 1]["role"] in ("user", "tool")
    ]
    return [*earlier, call]


def _read_any(record: JsonValue) -> LoggedCall:
    if isinstance(record, str):
        return _read_text(record)
    if _is_list_of_messages(record):
        record = {"messages": record}
    _check_object(record)
    if is_langsmith(record):
        return _read_openai(unwrap_langsmith(record))
    if is_langfuse(record):
        return _read_openai(unwrap_langfuse(record))
    if "conversations" in record:
        return _read_sharegpt(record)
    prompt = record.get("prompt")
    if isinstance(prompt, list | tuple) or _is_list_of_messages(parse_json(prompt)):
        return _read_trl(record)
    if find_request(record, ("messages",)) is not None or read_request(record) is not None:
        return _read_openai(record)
    if find_request(record, TEXT_KEYS) is not None:
        return _read_text(record)
    raise ValueError(_describe_unknown(record))


def _is_list_of_messages(value: JsonValue) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) and "role" in m for m in value)


def _check_object(record: JsonValue) -> None:
    if not isinstance(record, dict):
        raise ValueError(f"a record must be a JSON object, got {record!r:.60}")


def _describe_unknown(record: Record) -> str:
    keys = f"the keys are {sorted(map(str, record))[:12]}"
    if "custom_id" in record and ("response" in record or "result" in record):
        return f"an answer of a batch without its request ({record['custom_id']!r:.60}): read both files in one call"
    if "role" in record and "content" in record:
        return f"one message alone ({keys}): put the messages of a conversation into one record, as `messages`"
    return f"none of the known forms: {keys}. Give `format` a function that makes `messages` of it"


def _read_openai(record: Record) -> LoggedCall:
    """Requests of the chat completions, Anthropic and Responses APIs, with the response in one object or nested.

    LiteLLM: https://docs.litellm.ai/docs/proxy/logging_spec (`StandardLoggingPayload`).
    """
    _check_object(record)
    request = read_request(record)
    if request is None:
        raise ValueError(f"no `messages`: the keys are {sorted(map(str, record))[:12]}")
    check_succeeded(record)
    messages = request.messages
    completion, note = find_completion(record)
    # A request that ends with the assistant's turn has it continued: that turn is no answer.
    is_ended = bool(messages) and messages[-1]["role"] == "assistant"
    if completion is None and note is None and is_ended and request.source is record:
        return _split_last(record, messages, record["messages"])
    notes = _note_completion(record, completion, note)
    if request.source.get("chat_template_kwargs"):
        notes.append("prompts whose `chat_template_kwargs` are not kept")
    return _build(record, messages, completion, request.tools, False, request.source, notes)


def _read_sharegpt(record: Record) -> LoggedCall:
    """`conversations` of `from` and `value`, as FastChat, LLaMA-Factory and Axolotl read them."""
    turns = parse_json(record.get("conversations"))
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("no `conversations` with a list of turns")
    messages = []
    for turn in turns:
        role = turn.get("from") or turn.get("role")
        rest = {key: value for key, value in turn.items() if key not in ("from", "role", "value", "content")}
        if role in CALL_ROLES:
            message = {"role": "assistant", "tool_calls": _read_function_calls(turn.get("value", turn.get("content")))}
        else:
            content = turn.get("value", turn.get("content"))
            message = {"role": SHAREGPT_ROLES.get(role, role), "content": content}
        messages.append({**rest, **message})
    if record.get("system"):
        messages.insert(0, {"role": "system", "content": record["system"]})
    name = record.get("id")
    names = {} if name is None else {"conversation_id": strip_piece_number(str(name))}
    return _split_last({**names, **record}, clean_messages(messages), turns)


def _read_function_calls(value: JsonValue) -> list[JsonObject]:
    calls = parse_json(value)
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and "name" in call for call in calls):
        raise ValueError(f"a `function_call` turn must be JSON with a `name`, got {value!r:.60}")
    return [{"type": "function", "function": dict(call)} for call in calls]


def _read_trl(record: Record) -> LoggedCall:
    """TRL's conversational forms: `prompt` with or without `completion`, or `messages`."""
    _check_object(record)
    if "prompt" not in record:
        if "messages" not in record:
            raise ValueError(f"neither `prompt` nor `messages`: the keys are {sorted(map(str, record))[:12]}")
        return _split_last(record, clean_messages(parse_json(record["messages"])), record["messages"])
    prompt = clean_messages(parse_json(record["prompt"]))
    completion = parse_json(record.get("completion"))
    if completion is None:
        answer, note = find_completion(record)
        notes = _note_completion(record, answer, note)
        return _build(record, prompt, answer, record.get("tools"), False, record, notes)
    completion = clean_messages(
        [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    )
    messages = prompt + completion
    if messages[-1]["role"] != "assistant":
        raise ValueError("`completion` does not end with the assistant's turn")
    fault = find_fault(record)
    notes = [] if fault is None else [f"answers not kept, {fault}"]
    # A completion of several turns (tool calls and their results) is a conversation of which each turn counts.
    is_whole = len(completion) > 1
    return _build(
        record, messages[:-1], messages[-1] if fault is None else None, record.get("tools"), is_whole, record, notes
    )


def _read_text(record: Record | str) -> LoggedCall:
    """A line of text; or `prompt` or `text` with, where logged, the answer as text or as a response."""
    if isinstance(record, str):
        _check_not_rendered(record)
        return LoggedCall([{"role": "user", "content": record}])
    _check_object(record)
    request = find_request(record, TEXT_KEYS) or record
    text = next((request[key] for key in TEXT_KEYS if request.get(key)), None)
    if not isinstance(text, str):
        raise ValueError(f"no text in `prompt` or `text`: the keys are {sorted(map(str, record))[:12]}")
    _check_speaker(record)
    _check_not_rendered(text)
    if request.get("suffix"):
        raise ValueError("a `suffix`: text between two others is no prompt of a chat")
    check_succeeded(record)
    answer, note = find_completion(record)
    system = [{"role": "system", "content": request["system"]}] if request.get("system") else []
    prompt = clean_messages([*system, {"role": "user", "content": text}])
    notes = _note_completion(record, answer, note)
    return _build(record, prompt, answer, request.get("tools"), False, request, notes)


def _check_not_rendered(text: str) -> None:
    """Text with the marks of turns is a conversation, whose answers would be taken for the user's words."""
    if mark := next((mark for mark in RENDERED_MARKS if mark in text), None):
        raise ValueError(f"a text with the mark of a turn ({mark!r}), a rendered conversation: log its `messages`")


def _check_speaker(record: Record) -> None:
    """A text that says who wrote it is a prompt only if that was the user, at the start of a conversation."""
    for key in SPEAKER_KEYS:
        speaker = record.get(key)
        speaker = speaker.get("role") if isinstance(speaker, dict) else speaker
        if not isinstance(speaker, str):
            continue
        if speaker.lower() in ASSISTANT_ROLES:
            raise LeftOutError(f"a text of the {speaker.lower()}, not the user's (`{key}`)")
        if key == "role" and speaker.lower() not in USER_ROLES:
            raise ValueError(f"a text with the role {speaker!r}, which is not known")
    if "role" in record and record.get("parent_id"):
        raise LeftOutError("a reply whose conversation is in other records (`parent_id`)")


FORMATS: dict[str, Callable[[JsonValue], LoggedCall]] = {
    "auto": _read_any,
    "openai": _read_openai,
    "vllm": _read_openai,
    "litellm": _read_openai,
    "sharegpt": _read_sharegpt,
    "trl": _read_trl,
    "text": _read_text,
}


def _note_completion(record: Record, completion: Message | None, note: str | None) -> list[str]:
    """What to count of a record's answer: what there is to say of it, or keys under which there may be one."""
    if note is not None:
        return [f"answers {note}" if completion is not None else f"answers not kept, {note}"]
    if completion is not None:
        return []
    keys = [key for key in record if key not in KNOWN_KEYS and isinstance(record[key], str | dict | list)]
    keys = sorted(str(key) for key in keys if record[key])
    return [f"records without a known answer, with the unknown keys {keys[:NUM_NAMED]}"] if keys else []


def _split_last(record: Record, messages: list[Message], logged: JsonValue) -> LoggedCall:
    """A conversation as a whole; what the user said after the last answer has none.

    Args:
        record (`dict`): With the conversation.
        messages (`list[dict]`): The conversation.
        logged (`list[dict]`): The same as it was logged, where messages may say how they ended.
    """
    is_answered = bool(messages) and messages[-1]["role"] == "assistant"
    completion = messages.pop() if is_answered else None
    logged = parse_json(logged)
    faults = [find_fault(message) for message in logged if isinstance(message, dict)]
    fault = (faults[-1] or find_fault(record)) if is_answered and faults else None
    # Earlier turns are answers too, if all of them are whole.
    is_whole = not any(faults[:-1])
    notes = [] if is_whole else ["conversations with unfinished turns, of which the last alone is taken"]
    notes += [] if fault is None else [f"answers not kept, {fault}"]
    completion = completion if fault is None else None
    return _build(record, messages, completion, record.get("tools"), is_whole, record, notes)


def _build(
    record: Record,
    prompt: list[Message],
    completion: Message | None,
    tools: JsonValue,
    is_whole: bool,
    request: Record,
    notes: Sequence[str] = (),
) -> LoggedCall:
    for part in (record,) if request is record else (record, request):
        if not MEDIA_KEYS.isdisjoint(part) and (
            media := next((key for key in sorted(MEDIA_KEYS) if part.get(key)), None)
        ):
            raise ValueError(f"the prompt has `{media}`; only text is understood")
    return LoggedCall(
        prompt=prompt,
        tools=_read_tools(tools, request.get("functions")),
        completion=completion,
        **find_fields(record, request),
        is_whole=is_whole,
        notes=tuple(notes),
    )


def _read_tools(tools: JsonValue, functions: JsonValue) -> list[Tool] | None:
    """Tools of the Anthropic and Responses APIs, and `functions`, in OpenAI's form; others as they are."""
    known = [_wrap_foreign(tool) for tool in read_tools(tools) or []]
    known += [wrap_tool(tool) for tool in read_tools(functions, "`functions`") or []]
    return known or None


def _wrap_foreign(tool: Tool) -> Tool:
    if "input_schema" in tool:
        named = {"name": tool["name"], "description": tool.get("description"), "parameters": tool["input_schema"]}
        return wrap_tool({key: value for key, value in named.items() if value is not None})
    if tool.get("type") == "function" and "function" not in tool:
        return wrap_tool({key: value for key, value in tool.items() if key != "type"})
    return tool
