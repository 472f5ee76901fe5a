"""One record of a log, in the forms that servers, gateways and data sets write, as prompts with answers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from spec_kd.queries.log_messages import Message, clean_messages, parse_json

Record = Mapping[str, Any]

TURNS = ("auto", "all", "last")
SHAREGPT_ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "model": "assistant", "observation": "tool", "function_response": "tool",
}  # fmt: skip
# Where loggers nest what the client sent and what the server answered. `body`: batch files of OpenAI and `vllm
# run-batch`. `proxy_server_request`: rows of LiteLLM_SpendLogs, whose `messages` are empty.
REQUEST_KEYS = ("request", "body", "request_body", "proxy_server_request", "reqPayload", "kwargs", "input", "inputs")
TEXT_KEYS = ("prompt", "text")
RESPONSE_KEYS = ("response", "response_body", "respPayload", "output", "outputs")
CONVERSATION_KEYS = ("conversation_id", "session_id", "litellm_session_id", "thread_id", "chat_id", "trace_id")
USER_KEYS = ("user", "user_id", "end_user", "safety_identifier", "user_api_key_end_user_id", "user_api_key_user_id")
TIME_KEYS = ("timestamp", "created_at", "startTime", "start_time", "created", "requestedAt", "time", "date")
LITELLM_REDACTED = "redacted-by-litellm"  # in place of every text, with `turn_off_message_logging`


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
    """

    prompt: list[Message]
    tools: list[Any] | None = None
    completion: Message | None = None
    conversation_id: str | None = None
    user: str | None = None
    timestamp: float | None = None
    is_whole: bool = False


def read_record(record: Any, format: str | Callable[[Any], Any] = "auto") -> LoggedCall | None:
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
    """
    if callable(format):
        record, format = format(record), "auto"
        if record is None:
            return None
    call = FORMATS[format](record)
    if not call.prompt:
        raise ValueError("no messages before the assistant's answer")
    if call.prompt[-1]["role"] not in ("user", "tool"):
        raise ValueError(f"the prompt ends with the {call.prompt[-1]['role']}'s turn, not the user's or a tool's")
    if not any(message["content"].strip() for message in call.prompt if message["role"] in ("user", "tool")):
        raise ValueError("the user's turns are empty")
    if any(message["content"] == LITELLM_REDACTED for message in call.prompt):
        raise ValueError(f"the text was left out when it was logged ({LITELLM_REDACTED!r})")
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


def _read_any(record: Any) -> LoggedCall:
    if isinstance(record, str):
        return _read_text(record)
    if not isinstance(record, Mapping):
        raise ValueError(f"a record must be a JSON object, got {record!r:.60}")
    if "conversations" in record:
        return _read_sharegpt(record)
    if isinstance(record.get("prompt"), list | tuple):
        return _read_trl(record)
    if _find_part(record, REQUEST_KEYS, ("messages",)) is not None:
        return _read_openai(record)
    if _find_part(record, REQUEST_KEYS, TEXT_KEYS) is not None:
        return _read_text(record)
    raise ValueError(
        f"none of the known forms: the keys are {sorted(map(str, record))[:12]}. Give `format` a function that makes "
        "`messages` of it"
    )


def _read_openai(record: Record) -> LoggedCall:
    """Chat completions: the request and the response in one object or nested, also of vLLM and LiteLLM.

    LiteLLM: https://docs.litellm.ai/docs/proxy/logging_spec (`StandardLoggingPayload`).
    """
    request = _find_part(record, REQUEST_KEYS, ("messages",))
    if request is None:
        raise ValueError(f"no `messages`: the keys are {sorted(map(str, record))[:12]}")
    if record.get("status") == "failure" or record.get("error"):
        raise ValueError("the request failed")
    messages = clean_messages(parse_json(request["messages"]))
    completion = _find_completion(record)
    is_whole = completion is None and bool(messages) and messages[-1]["role"] == "assistant"
    if is_whole:
        *messages, completion = messages
    parameters = parse_json(record.get("model_parameters") or record.get("optional_params") or {})
    return _build(record, messages, completion, request.get("tools") or parameters.get("tools"), is_whole, request)


def _read_sharegpt(record: Record) -> LoggedCall:
    """`conversations` of `from` and `value`, as FastChat, LLaMA-Factory and Axolotl read them."""
    turns = parse_json(record.get("conversations"))
    if not isinstance(turns, Sequence) or not all(isinstance(turn, Mapping) for turn in turns):
        raise ValueError("no `conversations` with a list of turns")
    messages = []
    for turn in turns:
        role = turn.get("from") or turn.get("role")
        if role == "function_call":
            messages.append({"role": "assistant", "tool_calls": _read_function_calls(turn.get("value"))})
        else:
            content = turn.get("value", turn.get("content"))
            messages.append({"role": SHAREGPT_ROLES.get(role, role), "content": content})
    if record.get("system"):
        messages.insert(0, {"role": "system", "content": record["system"]})
    # Long conversations were cut into pieces with the ids `x_0`, `x_17`, ...
    name = record.get("id")
    parts = str(name).rsplit("_", 1)
    names = {} if name is None else {"conversation_id": parts[0] if parts[-1].isdigit() else name}
    return _split_last({**names, **record}, clean_messages(messages))


def _read_function_calls(value: Any) -> list[dict[str, Any]]:
    calls = parse_json(value)
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, Mapping) and "name" in call for call in calls):
        raise ValueError(f"a `function_call` turn must be JSON with a `name`, got {value!r:.60}")
    return [{"type": "function", "function": dict(call)} for call in calls]


def _read_trl(record: Record) -> LoggedCall:
    """TRL's conversational forms: `prompt` with or without `completion`, or `messages`."""
    if "prompt" not in record:
        if "messages" not in record:
            raise ValueError(f"neither `prompt` nor `messages`: the keys are {sorted(map(str, record))[:12]}")
        return _split_last(record, clean_messages(parse_json(record["messages"])))
    prompt = clean_messages(parse_json(record["prompt"]))
    completion = parse_json(record.get("completion"))
    if completion is None:
        return _build(record, prompt, None, record.get("tools"), False)
    completion = clean_messages(
        [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    )
    messages = prompt + completion
    if messages[-1]["role"] != "assistant":
        raise ValueError("`completion` does not end with the assistant's turn")
    # A completion of several turns (tool calls and their results) is a conversation of which each turn counts.
    return _build(record, messages[:-1], messages[-1], record.get("tools"), len(completion) > 1)


def _read_text(record: Record | str) -> LoggedCall:
    """A line of text; or `prompt` or `text` with, where logged, `completion`, `response` or `choices`."""
    if isinstance(record, str):
        return LoggedCall([{"role": "user", "content": record}])
    request = _find_part(record, REQUEST_KEYS, TEXT_KEYS) or {}
    text = next((request[key] for key in TEXT_KEYS if request.get(key)), None)
    if not isinstance(text, str):
        raise ValueError(f"no text in `prompt` or `text`: the keys are {sorted(map(str, record))[:12]}")
    answer = next((record[key] for key in ("completion", "response", "answer") if record.get(key)), None)
    completion = {"role": "assistant", "content": answer} if isinstance(answer, str) else _find_completion(record)
    system = [{"role": "system", "content": request["system"]}] if request.get("system") else []
    prompt = clean_messages([*system, {"role": "user", "content": text}])
    return _build(record, prompt, completion, request.get("tools"), False, request)


FORMATS: dict[str, Callable[[Any], LoggedCall]] = {
    "auto": _read_any,
    "openai": _read_openai,
    "vllm": _read_openai,
    "litellm": _read_openai,
    "sharegpt": _read_sharegpt,
    "trl": _read_trl,
    "text": _read_text,
}


def _split_last(record: Record, messages: list[Message]) -> LoggedCall:
    """A conversation as a whole; what the user said after the last answer has none."""
    is_answered = bool(messages) and messages[-1]["role"] == "assistant"
    completion = messages.pop() if is_answered else None
    return _build(record, messages, completion, record.get("tools"), True)


def _build(
    record: Record,
    prompt: list[Message],
    completion: Message | None,
    tools: Any,
    is_whole: bool,
    request: Record | None = None,
) -> LoggedCall:
    sources = [record, request or {}]
    sources += [metadata for source in sources if isinstance(metadata := parse_json(source.get("metadata")), Mapping)]
    sources.append(_find_response(record) or {})  # `created`

    def find(keys: Sequence[str]) -> Any:
        return next((s[key] for key in keys for s in sources if s.get(key) not in (None, "")), None)

    name, user = find(CONVERSATION_KEYS), find(USER_KEYS)
    return LoggedCall(
        prompt=prompt,
        tools=parse_json(tools) or None,
        completion=completion,
        conversation_id=None if name is None else str(name),
        user=None if user is None else str(user),
        timestamp=_read_time(find(TIME_KEYS)),
        is_whole=is_whole,
    )


def _find_part(record: Record, places: Sequence[str], wanted: Sequence[str]) -> Record | None:
    """The record itself or what is nested in it, whichever has one of the wanted keys."""
    nested = (parse_json(record[key]) for key in places if record.get(key))
    for candidate in (record, *nested):
        if isinstance(candidate, Mapping):
            for part in (candidate, candidate.get("body")):
                if isinstance(part, Mapping) and any(parse_json(part.get(key)) for key in wanted):
                    return part
    return None


def _find_response(record: Record) -> Record | None:
    return _find_part(record, RESPONSE_KEYS, ("choices",))


def _find_completion(record: Record) -> Message | None:
    """The first choice: prompts with several answers count once. One that was cut off is not the target's answer."""
    response = _find_response(record)
    if response is None:
        return None
    choice = response["choices"][0]
    if choice.get("finish_reason") in ("length", "content_filter"):
        return None
    if isinstance(choice.get("text"), str):
        return {"role": "assistant", "content": choice["text"]}
    message = choice.get("message")
    if not isinstance(message, Mapping) or not any(message.get(key) for key in ("content", "tool_calls")):
        return None
    return clean_messages([{**message, "role": "assistant"}])[0]


def _read_time(value: Any) -> float | None:
    """Seconds since 1970 of a number (seconds, milliseconds, microseconds), an ISO 8601 text or a `datetime`."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            try:
                value = datetime.fromisoformat(value.strip())
            except ValueError:
                return None
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    if not isinstance(value, int | float) or not 0 < value < 1e17:
        return None
    while value > 1e11:  # seconds reach that in the year 5138
        value /= 1000
    return float(value)
