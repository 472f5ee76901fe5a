"""Records as real servers and datasets write them."""

from datetime import UTC, datetime

import pytest

from spec_kd.prompts.logs.formats import read_record
from spec_kd.prompts.logs.logged_call import LoggedCall, split_turns

TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
ANSWER = {"role": "assistant", "content": "Hi."}
RESPONSE = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1_700_000_000,
    "choices": [{"index": 0, "message": {**ANSWER, "refusal": None, "tool_calls": []}, "finish_reason": "stop"}],
    "usage": {"total_tokens": 9},
}
CALL_AS_LOGGED = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {
            "id": "c1",
            "type": "function",
            "index": 0,
            "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'},
        }
    ],
}
CALL_AS_RENDERED = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Rome"}}}
    ],
}


@pytest.mark.parametrize(
    "record",
    [
        {"messages": MESSAGES, "choices": RESPONSE["choices"], "created": 1_700_000_000},
        {"request": {"model": "m", "messages": MESSAGES}, "response": RESPONSE},
        # a line of a batch file with the response of `vllm run-batch` beside it
        {
            "custom_id": "r1",
            "method": "POST",
            "body": {"messages": MESSAGES},
            "response": {"status_code": 200, "body": RESPONSE},
            "error": None,
        },
        # LiteLLM_SpendLogs, exported with its JSON columns as text
        {
            "request_id": "r1",
            "messages": "{}",
            "response": '{"created": 1700000000, "choices": [{"message": {"role": "assistant", "content": "Hi."}}]}',
            "proxy_server_request": '{"messages": [{"role": "system", "content": "Be brief."}, '
            '{"role": "user", "content": "Hello"}]}',
        },
    ],
)
def test_chat_completions_in_every_nesting(record):
    call = read_record(record)
    assert (call.prompt, call.completion, call.timestamp) == (MESSAGES, ANSWER, 1_700_000_000)
    assert not call.is_whole


def test_litellm_standard_payload():
    call = read_record(
        {
            "id": "chatcmpl-1",
            "trace_id": "not a conversation",
            "call_type": "acompletion",
            "status": "success",
            "startTime": 1_700_000_000.5,
            "end_user": "u7",
            "metadata": {"user_api_key_user_id": "key-owner", "session_id": "s1"},
            "messages": MESSAGES,
            "response": RESPONSE,
            "model_parameters": {"tools": TOOLS, "temperature": 1.0},
        },
        "litellm",
    )
    assert call == LoggedCall(MESSAGES, TOOLS, ANSWER, "s1", "u7", 1_700_000_000.5)


def test_tool_calls_are_what_the_template_gets():
    parts = [{"type": "text", "text": "21"}, {"type": "text", "text": "C"}]
    result = {"role": "tool", "tool_call_id": "c1", "content": parts}
    record = {
        "messages": [*MESSAGES, CALL_AS_LOGGED, result],
        "tools": TOOLS,
        "choices": [{"message": CALL_AS_LOGGED}],
    }
    call = read_record(record, "openai")
    assert call.prompt == [
        *MESSAGES,
        CALL_AS_RENDERED,
        {"role": "tool", "content": "21\nC", "tool_call_id": "c1"},
    ]
    assert (call.completion, call.tools) == (CALL_AS_RENDERED, TOOLS)


def test_answers_that_were_cut_off_are_not_the_answer():
    call = read_record({"messages": MESSAGES, "choices": [{"message": ANSWER, "finish_reason": "length"}]})
    assert (call.prompt, call.completion) == (MESSAGES, None)


def test_reasoning_is_kept_under_the_name_of_templates():
    record = {"messages": MESSAGES, "choices": [{"message": {**ANSWER, "reasoning": "A greeting."}}]}
    assert read_record(record).completion == {**ANSWER, "reasoning_content": "A greeting."}


def test_sharegpt_and_its_turns():
    record = {
        "id": "QWJhYvA_17",
        "system": "Be brief.",
        "tools": '[{"name": "add"}]',
        "conversations": [
            {"from": "human", "value": "one"},
            {"from": "gpt", "value": "1"},
            {"from": "human", "value": "two plus two"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2, "b": 2}}'},
            {"from": "observation", "value": "4"},
            {"from": "gpt", "value": "It is 4."},
        ],
    }
    call = read_record(record)
    assert call.is_whole and call.conversation_id == "QWJhYvA" and call.tools == [{"name": "add"}]
    turns = split_turns(call)
    assert [len(turn.prompt) for turn in turns] == [2, 4, 6]
    assert [turn.completion["content"] for turn in turns] == ["1", "", "It is 4."]
    assert turns[1].completion["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 2, "b": 2}}
    assert [turn.prompt[-1]["role"] for turn in turns] == ["user", "user", "tool"]
    assert split_turns(call, "last") == [call]


def test_a_request_counts_once_unless_asked_otherwise():
    messages = [*MESSAGES, ANSWER, {"role": "user", "content": "And now?"}]
    call = read_record({"messages": messages, "choices": RESPONSE["choices"]})
    assert split_turns(call) == [call]
    first, last = split_turns(call, "all")
    assert (first.prompt, first.completion, last) == (MESSAGES, ANSWER, call)


def test_trl_forms():
    assert read_record({"prompt": MESSAGES}).completion is None
    assert read_record({"prompt": MESSAGES, "completion": [ANSWER]}) == LoggedCall(MESSAGES, completion=ANSWER)
    whole = read_record({"messages": [*MESSAGES, ANSWER]}, "trl")
    assert whole == LoggedCall(MESSAGES, completion=ANSWER, is_whole=True)
    assert read_record({"messages": [*MESSAGES, ANSWER]}) == whole  # as `auto`


def test_plain_text():
    user = [{"role": "user", "content": "Hello"}]
    assert read_record("Hello", "text") == read_record({"text": "Hello"}) == LoggedCall(user)
    assert read_record({"prompt": "Hello", "response": "Hi."}).completion == ANSWER
    assert read_record({"request": {"prompt": "Hello"}, "response": {"choices": [{"text": "Hi."}]}}) == LoggedCall(
        user, completion=ANSWER
    )


def test_a_function_makes_one_of_the_forms():
    def read(record):
        return (
            None if record["secret"] else {"messages": [{"role": "user", "content": record["q"]}], "user": record["by"]}
        )

    assert read_record({"secret": True}, read) is None
    call = read_record({"secret": False, "q": "Hello", "by": 7}, read)
    assert call == LoggedCall([{"role": "user", "content": "Hello"}], user="7")


@pytest.mark.parametrize(
    "logged",
    [
        1_700_000_000,
        1_700_000_000_000,
        1_700_000_000_000_000,
        "1700000000",
        "2023-11-14T22:13:20Z",
        "2023-11-14 22:13:20",
        "2023-11-14T23:13:20+01:00",
        datetime(2023, 11, 14, 22, 13, 20),
        datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC),
    ],
)
def test_times(logged):
    assert read_record({"messages": MESSAGES, "timestamp": logged}).timestamp == 1_700_000_000


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"foo": 1}, "none of the known forms"),
        (17, "JSON object"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "role"),
        ({"messages": "Hello"}, "must be a list"),
        ({"messages": [{"role": "system", "content": "x"}]}, "ends with the system"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "before the assistant's turn"),
        ({"messages": [{"role": "user", "content": " "}]}, "empty"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "image_url"),
        ({"messages": [*MESSAGES, {**CALL_AS_LOGGED, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
                       *MESSAGES]}, "not JSON"),
        ({"messages": [{"role": "user", "content": "redacted-by-litellm"}]}, "left out when it was logged"),
        ({"messages": MESSAGES, "status": "failure", "response": {}}, "failed"),
        ({"messages": MESSAGES, "status": "cancelled"}, "failed"),  # OpenAI's batches
        ({"messages": MESSAGES, "status": "canceled"}, "failed"),  # Anthropic's
        ({"text": 3}, "no text"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_said(record, reason):
    with pytest.raises(ValueError, match=reason):
        read_record(record)
