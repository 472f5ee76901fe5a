"""Records of tracing services, runs of LangSmith and observations of Langfuse, as requests with responses."""

from collections.abc import Sequence

from spec_kd.open_types import JsonObject, JsonValue, Record
from spec_kd.prompts.logs.messages import parse_json
from spec_kd.prompts.logs.requests import read_chat

LANGFUSE_TYPES = {
    "GENERATION", "SPAN", "EVENT", "AGENT", "TOOL", "CHAIN", "RETRIEVER", "EVALUATOR", "EMBEDDING", "GUARDRAIL",
}  # fmt: skip
THREAD_KEYS = (
    "session_id",
    "thread_id",
    "conversation_id",
)  # of LangSmith's metadata, in its order


class LeftOutError(ValueError):
    """Error of a record that says of itself that it is no request; the text is the reason."""


def expand_record(record: JsonValue) -> Sequence[JsonValue]:
    """The records inside a record that contains several: a trace of Langfuse, or a page of an export.

    Args:
        record: Any record.

    Returns:
        `list`: The records inside, or the record alone if it is none of these. Observations get the session and the
        user of their trace.
    """
    if not isinstance(record, dict) or "messages" in record or "request" in record or "conversations" in record:
        return [record]
    observations = parse_json(record.get("observations"))
    if isinstance(observations, list) and observations and all(isinstance(item, dict) for item in observations):
        outer = {key: record[key] for key in ("sessionId", "userId", "session_id", "user_id") if record.get(key)}
        return [{"traceId": record.get("id"), **outer, **item} for item in observations]
    if isinstance(record.get("trace"), dict) and isinstance(record["trace"].get("observations"), list):
        return expand_record(record["trace"])
    for key in ("runs", "data", "traces"):
        items = record.get(key)
        if isinstance(items, list) and items and set(record) <= {key, "meta", "cursors", "object", "has_more", "next"}:
            return [inner for item in items for inner in expand_record(item)]
    return [record]


def is_langsmith(record: Record) -> bool:
    """Whether a record is a run of LangSmith."""
    return "run_type" in record and "inputs" in record


def is_langfuse(record: Record) -> bool:
    """Whether a record is an observation of Langfuse."""
    return record.get("type") in LANGFUSE_TYPES and ("traceId" in record or "trace_id" in record)


def unwrap_langsmith(record: Record) -> JsonObject:
    """A run of LangSmith as a request with `messages`, and its response.

    Raises:
        LeftOutError: The run is of another type than `llm`; runs of this type repeat its messages.
        ValueError: The inputs have no messages.
    """
    if record["run_type"] != "llm":
        raise LeftOutError(f"a LangSmith run of the type {record['run_type']!r}, not 'llm'")
    inputs = parse_json(record["inputs"])
    if not isinstance(inputs, dict) or not isinstance(parse_json(inputs.get("messages")), list):
        keys = sorted(map(str, inputs)) if isinstance(inputs, dict) else type(inputs).__name__
        raise ValueError(f"a LangSmith run whose `inputs` have no `messages`: {keys}")
    extra = parse_json(record.get("extra")) or {}
    metadata = {**(extra.get("metadata") or {}), **(parse_json(record.get("metadata")) or {})}
    parameters = extra.get("invocation_params") or {}
    # The `session_id` beside a run is the project's, and the same for all of its runs.
    thread = next((metadata[key] for key in THREAD_KEYS if metadata.get(key)), None)
    return {
        "request": {**parameters, **inputs, "messages": read_chat(inputs["messages"])},
        "output": parse_json(record.get("outputs")),
        "error": record.get("error"),
        "status": record.get("status"),
        "conversation_id": thread,
        "user": metadata.get("user_id"),
        "timestamp": record.get("start_time"),
    }


def unwrap_langfuse(record: Record) -> JsonObject:
    """An observation of Langfuse as a request with `messages`, and its response.

    Raises:
        LeftOutError: The observation is of another type than `GENERATION`.
        ValueError: The input has no messages.
    """
    if record["type"] != "GENERATION":
        raise LeftOutError(f"a Langfuse observation of the type {record['type']!r}, not 'GENERATION'")
    given = parse_json(record.get("input"))
    if isinstance(given, str) and given:
        request: JsonObject = {"messages": [{"role": "user", "content": given}]}
    elif isinstance(given, list):
        request = {"messages": read_chat(given)}
    elif isinstance(given, dict) and "messages" in given:
        request = {**given, "messages": read_chat(given["messages"])}
    elif isinstance(given, dict) and "role" in given:
        request = {"messages": [given]}
    else:
        raise ValueError(f"a Langfuse generation whose `input` is no list of messages: {given!r:.60}")
    parameters = parse_json(record.get("modelParameters") or record.get("model_parameters")) or {}
    return {
        "request": {**parameters, **request} if isinstance(parameters, dict) else request,
        "output": record.get("output"),
        "level": record.get("level"),
        "conversation_id": record.get("sessionId") or record.get("session_id"),
        "user": record.get("userId") or record.get("user_id"),
        "timestamp": record.get("startTime") or record.get("start_time"),
    }
