"""The rows of the table of log forms: what a log may look like, and what becomes of it."""

# ruff: noqa: E501

import json
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Form:
    """A log and what is right.

    Args:
        files (`dict[str, str | bytes]`): By name, in the order in which they are read.
        prompts (`list[str]`): What is kept, as `test_log_forms.show` writes messages.
        answers (`list[str | None]`): Of the prompts; by default none has one.
        malformed (`int`), left_out (`int`): Records.
        says (`str`): A pattern of a reason, a note, a warning or the error.
        options (`dict`): Of `load_query_logs`.
        template (`str`, *optional*): Chat template of the target.
    """

    files: dict[str, Any]
    prompts: list[str] = field(default_factory=list)
    answers: list[str | None] | None = None
    malformed: int = 0
    left_out: int = 0
    says: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    template: str | None = None


def lines(*records: Any) -> dict[str, str]:
    return {"log.jsonl": "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)}


def form(*records: Any, **right: Any) -> Form:
    """A log of JSON lines."""
    return Form(lines(*records), **right)


def text(name: str, content: str | bytes, **right: Any) -> Form:
    """A log of one file."""
    return Form({name: content}, **right)


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def chat(content: str, **more: Any) -> dict[str, Any]:
    return {"messages": [user(content)], **more}


def choices(content: Any, reason: Any = "stop", **message: Any) -> dict[str, Any]:
    answer = {"role": "assistant", "content": content, **message}
    return {"object": "chat.completion", "choices": [{"index": 0, "message": answer, "finish_reason": reason}]}


def ask(content: str, reason: Any = "stop") -> dict[str, Any]:
    """A request whose answer ended so."""
    return {"request": chat(content), "response": choices("Once upon a t", reason)}


def events(*chunks: Any) -> str:
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n"


def delta(reason: str | None = None, **delta: Any) -> dict[str, Any]:
    return {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}


def batch_request(name: str, content: str) -> dict[str, Any]:
    return {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": chat(content, model="m")}


def batch_answer(name: str, content: str) -> dict[str, Any]:
    response = {"status_code": 200, "request_id": "r", "body": choices(content)}
    return {"id": "batch_req_1", "custom_id": name, "response": response, "error": None}


def langsmith(inputs: Any, outputs: Any, **more: Any) -> dict[str, Any]:
    return {"id": "1", "run_type": "llm", "inputs": inputs, "outputs": outputs, "session_id": "the project", **more}


def langfuse(given: Any, output: Any, **more: Any) -> dict[str, Any]:
    return {"id": "1", "traceId": "t1", "type": "GENERATION", "input": given, "output": output, **more}


def langchain(kind: str, content: str, **more: Any) -> dict[str, Any]:
    return {"lc": 1, "type": "constructor", "id": ["langchain", "schema", "messages", f"{kind}Message"],
            "kwargs": {"content": content, **more}}  # fmt: skip


def vllm(prompt: str) -> str:
    return f"DEBUG 01-02 [logger.py:1] Request c-1 details: prompt: {prompt!r}, prompt_token_ids: [1], shape: None.\n"


FUNCTION = {"name": "get_weather", "description": "d", "parameters": {"type": "object"}}
CALL = {"name": "get_weather", "arguments": '{"city": "Bern"}'}
CALLED = '-> get_weather({"city": "Bern"})'
ROLES = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
QWEN = (
    "{% for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n{% if m.role == 'tool' %}"
    "<tool_response>\n{{ m.content }}\n</tool_response>{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
RYE, OWLS = "Is rye a grass?", "Do owls sleep by day, größtenteils?"
TWO = json.dumps([chat(RYE), chat(OWLS)], ensure_ascii=False)
PROMPTS = [f"user: {RYE}", f"user: {OWLS}"]
RESPONSE = {"object": "response", "status": "completed"}
OUTPUT = [{"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Yes."}]}]
ANTHROPIC = {"type": "message", "role": "assistant", "content": [{"type": "text", "text": "They sail."}]}
TOOL_USE = [{"type": "text", "text": "Let me see."}, {"type": "tool_use", "id": "u1", "name": "f", "input": {"a": 1}}]
TOOL_RESULT = [{"type": "tool_result", "tool_use_id": "u1", "content": [{"type": "text", "text": "21"}]}]

ROWS: dict[str, Form] = {
    # finish reasons
    **{f"answer that ended with {reason}": form(ask("Story?", reason), prompts=["user: Story?"], says="unfinished")
       for reason in ("length", "abort", "error", "content_filter", "max_tokens", "repetition", "whatever comes", None)},
    **{f"answer that ended with {reason} is kept": form(ask("Story?", reason), prompts=["user: Story?"], answers=["Once upon a t"])
       for reason in ("stop", "STOP", "eos_token", "end_turn")},
    "no finish reason": form(chat(RYE, choices=[{"message": {"content": "Yes."}}]), prompts=PROMPTS[:1], answers=["Yes."], says="kept although no finish_reason"),
    "stop string of vLLM": form({**chat(RYE), "choices": [{"message": {"content": "Yes"}, "finish_reason": "stop", "stop_reason": "\n"}]}, prompts=PROMPTS[:1], says="unfinished"),
    "reason beside a text": form({"prompt": RYE, "response": "Yes, it", "finish_reason": "length"}, prompts=PROMPTS[:1], says="unfinished"),
    # answers
    "text beside messages": form(chat(RYE, response="Yes."), prompts=PROMPTS[:1], answers=["Yes."]),
    "answer under another key": form(chat(RYE, completion="Yes."), prompts=PROMPTS[:1], answers=["Yes."]),
    "JSON that the target wrote": form(chat(RYE, output='{"grass": true}'), prompts=PROMPTS[:1], answers=['{"grass": true}']),
    "answer of an unknown shape": form(chat(RYE, response={"candidates": [1]}), prompts=PROMPTS[:1], says="not understood: `response`"),
    "answer under an unknown key": form(chat(RYE, bot_says="Yes."), prompts=PROMPTS[:1], says="bot_says"),
    "message of Ollama": form({"request": chat(RYE), "response": {"message": {"role": "assistant", "content": "Yes."}, "done_reason": "stop"}}, prompts=PROMPTS[:1], answers=["Yes."]),
    "a status is no answer": form(chat(RYE, result="success"), prompts=PROMPTS[:1]),
    "reason beside a completion": form({"prompt": [user(RYE)], "completion": "Yes, it", "finish_reason": "length"}, prompts=PROMPTS[:1], says="unfinished"),
    "reason beside a conversation": form({"messages": [user(RYE), {"role": "assistant", "content": "Yes, it"}], "finish_reason": "length"}, prompts=PROMPTS[:1], says="unfinished"),
    "reason within a conversation": form({"messages": [user(RYE), {"role": "assistant", "content": "Yes, it", "finish_reason": "length"}, user("So?"), {"role": "assistant", "content": "Yes.", "finish_reason": "stop"}]}, prompts=[f"user: {RYE} | assistant: Yes, it | user: So?"], answers=["Yes."], says="unfinished turns"),
    "choices as text": text("log.csv", f'prompt,choices\n{RYE},"[{{""text"": ""Yes."", ""finish_reason"": ""stop""}}]"\n', prompts=PROMPTS[:1], answers=["Yes."]),
    "empty answer": form({"request": chat(RYE), "response": choices("")}, prompts=PROMPTS[:1], says="empty"),
    "empty turn of the assistant": form({"messages": [user(RYE), {"role": "assistant", "content": ""}, user("So?")]}, chat(OWLS), prompts=PROMPTS[1:], malformed=1, says="turn of the assistant is empty"),
    "failed request": form({"request": chat(RYE), "response": {"error": {"message": "x"}}}, chat(OWLS), prompts=PROMPTS[1:], malformed=1, says="the request failed"),
    "request that ends with the assistant's turn": form({"request": {"messages": [user(RYE), {"role": "assistant", "content": "Yes"}]}}, chat(OWLS), prompts=PROMPTS[1:], malformed=1, says="ends with the assistant"),
    # messages
    "call of the older form": form({"request": {"messages": [user("Weather?"), {"role": "assistant", "content": None, "function_call": CALL}, {"role": "function", "name": "get_weather", "content": "21"}], "functions": [FUNCTION]}, "response": choices("Sunny.")}, prompts=[f"tools get_weather | user: Weather? | assistant: {CALLED} | tool: 21"], answers=["Sunny."]),
    "call of the older form as the answer": form({"messages": [user("Weather?"), {"role": "assistant", "content": None, "function_call": CALL}], "functions": [FUNCTION]}, prompts=["tools get_weather | user: Weather?"], answers=[CALLED]),
    **{f"turn of the assistant with {next(iter(turn))} alone": form({"messages": [user(RYE), {"role": "assistant", **turn}, user("So?")]}, chat(OWLS), prompts=PROMPTS[1:], malformed=1, says=says)
       for turn, says in (({"refusal": "No."}, "refusal"), ({"content": None}, "no content"), ({"images": ["x"]}, "images"), ({"audio": {"id": "a"}}, "audio"), ({"output": {"x": 1}}, "output"), ({"blob": "text"}, "no content"))},
    "parts as Gemini has them": form({"messages": [{"role": "user", "parts": [{"text": RYE}]}]}, prompts=PROMPTS[:1]),
    "text part with value": form({"messages": [user([{"type": "text", "value": RYE}]), {"role": "assistant", "content": [{"type": "text", "text": {"value": "Yes."}}]}]}, prompts=PROMPTS[:1], answers=["Yes."]),
    "text part without text": form({"messages": [user([{"type": "text", "txt": RYE}])]}, chat(OWLS), prompts=PROMPTS[1:], malformed=1, says="no text in `text` or `value`"),
    "part that is no text": form({"messages": [user([{"type": "text", "text": RYE}, {"type": "image_url", "image_url": {}}])]}, chat(OWLS), prompts=PROMPTS[1:], malformed=1, says="image_url"),
    "images beside the text": form({"messages": [{"role": "user", "content": RYE, "images": ["x"]}]}, chat(OWLS), prompts=PROMPTS[1:], malformed=1, says="images"),
    "image beside conversations": form({"image": "a.jpg", "conversations": [{"from": "human", "value": "<image> What?"}]}, chat(OWLS), prompts=PROMPTS[1:], malformed=1, says="image"),
    "ShareGPT turn without a value": form({"conversations": [{"from": "human", "value": RYE}, {"from": "gpt", "value": None}, {"from": "human", "value": "So?"}]}, chat(OWLS), prompts=PROMPTS[1:], malformed=1, says="no content"),
    "unknown role": form({"messages": [{"role": "narrator", "content": "x"}]}, chat(OWLS), prompts=PROMPTS[1:], malformed=1, says="narrator"),
    "empty last turn": form({"messages": [user(RYE), {"role": "assistant", "content": "Yes."}, user("")], "model": "m"}, chat(OWLS), prompts=PROMPTS[1:], malformed=1, says="turn of the user is empty"),
    # marks of loggers
    "cut by LiteLLM": form({"request_id": "r", "messages": "{}", "proxy_server_request": json.dumps(chat("Dear all... (litellm_truncated skipped 9000 chars) ...bye")), "response": json.dumps(choices("It says"))}, chat(OWLS), prompts=PROMPTS[1:], malformed=1, says="litellm_truncated"),
    "answer cut by LiteLLM": form({"request": chat(RYE), "response": choices("It... (litellm_truncated skipped 700 chars) ...bye")}, prompts=PROMPTS[:1], says="not whole in the log"),
    "answer left out by LiteLLM": form({"request": chat(RYE), "response": choices("redacted-by-litellm")}, prompts=PROMPTS[:1], says="not whole in the log"),
    "left out by Langfuse": form(langfuse("<truncated due to size exceeding limit>", "Yes."), chat(OWLS), prompts=PROMPTS[1:], malformed=1, says="truncated due to size"),
    "tools cut by LiteLLM": form(chat(RYE, tools=[{**FUNCTION, "description": "A (litellm_truncated skipped 9 chars) b"}]), chat(OWLS), prompts=PROMPTS[1:], malformed=1, says="tools was left out"),
    # tools
    "tools one after the other": form(chat(RYE, tools=f"{json.dumps(FUNCTION)}\n\n{json.dumps({**FUNCTION, 'name': 'g'})}"), prompts=[f"tools get_weather, g | user: {RYE}"]),
    "tools that are text": form(chat(RYE, tools="get_weather: tells the weather"), chat(OWLS), prompts=PROMPTS[1:], malformed=1, says="tools"),
    "one tool": form(chat(RYE, tools=FUNCTION), prompts=[f"tools get_weather | user: {RYE}"]),
    "tool without a name": form(chat(RYE, tools=[{"type": "web_search"}]), chat(OWLS), prompts=PROMPTS[1:], malformed=1, says="no name"),
    # APIs
    "Anthropic": form({"request": {"model": "m", "system": "Rhyme.", "messages": [user("Ships?")], "tools": [{"name": "get_weather", "input_schema": {"type": "object"}}]}, "response": {**ANTHROPIC, "stop_reason": "end_turn"}}, prompts=["tools get_weather | system: Rhyme. | user: Ships?"], answers=["They sail."]),
    "Anthropic with system blocks": form({"request": {"system": [{"type": "text", "text": "Rhyme."}, {"type": "text", "text": " Please."}], "messages": [user("Ships?")]}, "response": {**ANTHROPIC, "stop_reason": "max_tokens"}}, prompts=["system: Rhyme. Please. | user: Ships?"], says="max_tokens"),
    "Anthropic with tools": form({"request": {"system": "S", "messages": [user("Weather?"), {"role": "assistant", "content": TOOL_USE}, user(TOOL_RESULT)]}, "response": {**ANTHROPIC, "stop_reason": "end_turn"}}, prompts=['system: S | user: Weather? | assistant: Let me see. -> f({"a": 1}) | tool: 21'], answers=["They sail."]),
    "Anthropic batch": Form({"a_in.jsonl": json.dumps({"custom_id": "1", "params": {"system": "S", "messages": [user("Ships?")]}}), "b_out.jsonl": json.dumps({"custom_id": "1", "result": {"type": "succeeded", "message": {**ANTHROPIC, "stop_reason": "end_turn"}}})}, prompts=["system: S | user: Ships?"], answers=["They sail."]),
    "Responses with text": form({"request": {"model": "m", "input": RYE, "instructions": "Be brief."}, "response": {**RESPONSE, "output": OUTPUT}}, prompts=[f"system: Be brief. | user: {RYE}"], answers=["Yes."]),
    "Responses with items": form({"request": {"input": [user([{"type": "input_text", "text": "Weather?"}]), {"type": "function_call", "call_id": "c", **CALL}, {"type": "function_call_output", "call_id": "c", "output": "21"}], "tools": [{"type": "function", **FUNCTION}]}, "response": {**RESPONSE, "output": OUTPUT}}, prompts=[f"tools get_weather | user: Weather? | assistant: {CALLED} | tool: 21"], answers=["Yes."]),
    "Responses that broke off": form({"request": {"input": RYE}, "response": {**RESPONSE, "status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}, "output": OUTPUT}}, prompts=PROMPTS[:1], says="max_output_tokens"),
    "Responses whose history is on the server": form({"request": {"input": "And owls?", "previous_response_id": "r"}, "response": {**RESPONSE, "output": OUTPUT}}, chat(OWLS), prompts=PROMPTS[1:], malformed=1, says="on the server only"),
    "embeddings are no prompts": form({"request": {"model": "e", "input": "some text"}, "response": {"object": "list"}}, chat(OWLS), prompts=PROMPTS[1:], malformed=1, says="none of the known forms"),
    "OpenAI batch": Form({"input.jsonl": json.dumps(batch_request("a", RYE)) + "\n" + json.dumps(batch_request("b", OWLS)), "output.jsonl": json.dumps(batch_answer("b", "Mostly.")) + "\n" + json.dumps(batch_answer("a", "Yes."))}, prompts=PROMPTS, answers=["Yes.", "Mostly."]),
    "OpenAI batch, answers first": Form({"a.jsonl": json.dumps(batch_answer("a", "Yes.")), "b.jsonl": json.dumps(batch_request("a", RYE))}, prompts=PROMPTS[:1], answers=["Yes."]),
    "answers of a batch alone": Form({"a.jsonl": json.dumps(batch_answer("a", "Yes.")), "b.jsonl": json.dumps(chat(OWLS))}, prompts=PROMPTS[1:], malformed=1, says="without its request"),
    "ids that two batches have": Form({name: json.dumps(record) for name, record in (("a.jsonl", batch_request("1", RYE)), ("b.jsonl", batch_answer("1", "Yes.")), ("c.jsonl", batch_request("1", OWLS)), ("d.jsonl", batch_answer("1", "Mostly.")))}, prompts=PROMPTS, says="several batches"),
    # tracing services
    "LangSmith": form(langsmith({"messages": [[langchain("System", "S"), langchain("Human", RYE)]]}, {"generations": [[{"text": "Yes.", "message": langchain("AI", "Yes.", response_metadata={"finish_reason": "stop"})}]]}), {**langsmith({}, {}), "run_type": "chain"}, prompts=[f"system: S | user: {RYE}"], answers=["Yes."], left_out=1, says="run of the type 'chain'"),
    "LangSmith around OpenAI": form(langsmith({"messages": [user(RYE)], "tools": [FUNCTION]}, choices("Yes.", "length")), prompts=[f"tools get_weather | user: {RYE}"], says="unfinished"),
    "LangSmith run that failed": form(langsmith({"messages": [user(RYE)]}, None, error="Timeout"), chat(OWLS), prompts=PROMPTS[1:], malformed=1, says="the request failed"),
    "Langfuse": form(langfuse([user(RYE)], {"role": "assistant", "content": "Yes."}), {**langfuse(None, None), "type": "SPAN"}, prompts=PROMPTS[:1], answers=["Yes."], left_out=1, says="observation of the type 'SPAN'"),
    "Langfuse trace": text("trace.json", json.dumps({"id": "t", "sessionId": "s", "observations": [langfuse({"messages": [user(RYE)], "tools": [FUNCTION]}, "Yes."), {**langfuse("x", "y"), "type": "EVENT"}]}, indent=1), prompts=[f"tools get_weather | user: {RYE}"], answers=["Yes."], left_out=1),
    "Langfuse as CSV": text("export.csv", f'id,traceId,type,input,output\n1,t,GENERATION,"[{{""role"": ""user"", ""content"": ""{RYE}""}}]",Yes.\n', prompts=PROMPTS[:1], answers=["Yes."]),
    # streams
    "stream as the response": form(chat(RYE, response=events(delta(role="assistant", content=""), delta(content="Ye"), delta(content="s."), delta("stop"))), prompts=PROMPTS[:1], answers=["Yes."]),
    "stream on the lines after": text("log.jsonl", json.dumps(chat(RYE)) + "\n" + events(delta(content="Yes."), delta("stop")) + json.dumps(chat(OWLS)), prompts=PROMPTS, answers=["Yes.", None]),
    "stream of a call": form(chat("Weather?", response=events(delta(tool_calls=[{"index": 0, "id": "c", "function": {"name": "get_weather", "arguments": ""}}]), delta(tool_calls=[{"index": 0, "function": {"arguments": '{"city": '}}]), delta(tool_calls=[{"index": 0, "function": {"arguments": '"Bern"}'}}]), delta("tool_calls"))), prompts=["user: Weather?"], answers=[CALLED]),
    "stream that broke off": form(chat(RYE, response=events(delta(content="Ye"))), prompts=PROMPTS[:1], says="unfinished"),
    "chunks as a list": form(chat(RYE, response=[delta(content="Yes."), delta("stop")]), prompts=PROMPTS[:1], answers=["Yes."]),
    "stream of Anthropic": form(chat("Ships?", response="".join(f"event: {e['type']}\ndata: {json.dumps(e)}\n\n" for e in ({"type": "message_start", "message": {"id": "1", "content": []}}, {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}, {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "They sail."}}, {"type": "content_block_stop", "index": 0}, {"type": "message_delta", "delta": {"stop_reason": "end_turn"}}, {"type": "message_stop"}))), prompts=["user: Ships?"], answers=["They sail."]),
    "stream of the Responses API": form({"request": {"input": RYE, "instructions": "S"}, "response": events({"type": "response.created", "response": {}}, {"type": "response.completed", "response": {**RESPONSE, "output": OUTPUT}})}, prompts=[f"system: S | user: {RYE}"], answers=["Yes."]),
    "stream without a request": text("log.jsonl", events(delta(content="Yes.")) + json.dumps(chat(OWLS)), prompts=PROMPTS[1:], malformed=1, says="without a request"),
    # who speaks
    "rows of a tree": form({"message_id": "a", "parent_id": None, "role": "prompter", "text": RYE}, {"message_id": "b", "parent_id": "a", "role": "assistant", "text": "Yes."}, {"message_id": "c", "parent_id": "b", "role": "prompter", "text": "Why?"}, prompts=PROMPTS[:1], left_out=2, says="a text of the assistant"),
    "one message a record": form({"role": "user", "content": RYE}, chat(OWLS), prompts=PROMPTS[1:], malformed=1, says="one message alone"),
    "list of messages a record": form([user(RYE), {"role": "assistant", "content": "Yes."}], [user(OWLS)], prompts=PROMPTS, answers=["Yes.", None]),
    "rendered conversation": form({"text": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>"}, {"text": "### Human: Hi### Assistant: Hello"}, chat(OWLS), prompts=PROMPTS[1:], malformed=2, says="rendered conversation"),
    # the log of a vLLM server
    "vLLM": text("server.log", "INFO start\n" + vllm(f"<|user|>{RYE}<|end|><|assistant|>"), prompts=PROMPTS[:1], left_out=1, options={"format": "vllm"}, template=ROLES),
    "vLLM with a tool's turn last": text("server.log", vllm('<|user|>Weather?<|end|><|assistant|><call>f()</call><|end|><|tool|>21<|end|><|assistant|>') + vllm(f"<|user|>{OWLS}<|end|><|assistant|>"), prompts=PROMPTS[1:], malformed=1, says="", options={"format": "vllm"}, template=ROLES),
    "vLLM with a tool's turn within": text("server.log", vllm('<|user|>Weather?<|end|><|assistant|>f()<|end|><|tool|>21<|end|><|assistant|>Sun.<|end|><|user|>And?<|end|><|assistant|>') + vllm(f"<|user|>{OWLS}<|end|><|assistant|>"), prompts=PROMPTS[1:], malformed=1, says="turn that is not", options={"format": "vllm"}, template=ROLES),
    "vLLM with a tool's turn as the user's": text("server.log", vllm("<|im_start|>user\nWeather?<|im_end|>\n<|im_start|>assistant\nf()<|im_end|>\n<|im_start|>user\n<tool_response>\n21\n</tool_response><|im_end|>\n<|im_start|>assistant\n") + vllm(f"<|im_start|>user\n{OWLS}<|im_end|>\n<|im_start|>assistant\n"), prompts=PROMPTS[1:], malformed=1, says="turn that is not", options={"format": "vllm"}, template=QWEN),
    "vLLM without prompts": text("server.log", "INFO [logger.py:49] Received request c-1: params: SamplingParams(n=1), lora_request: None.\nINFO Added request c-1.\n", left_out=2, says="DEBUG only since 0.11.2", options={"format": "vllm"}, template=ROLES),
    "vLLM's log read as something else": text("server.log", vllm("x"), malformed=1, says='format="vllm"'),
    # containers
    "text with a mark of Windows": text("log.txt", f"\ufeff{RYE}\r\n{OWLS}\r\n", prompts=PROMPTS),
    "array with a mark of Windows": text("log.json", "\ufeff" + TWO, prompts=PROMPTS),
    "files appended with their marks": text("log.jsonl", "\ufeff" + json.dumps(chat(RYE)) + "\n\ufeff" + json.dumps(chat(OWLS)), prompts=PROMPTS),
    "UTF-16 without a mark": text("log.jsonl", "\n".join(json.dumps(chat(c), ensure_ascii=False) for c in (RYE, OWLS)).encode("utf-16-le"), prompts=PROMPTS),
    "Windows-1252": text("log.jsonl", "\n".join(json.dumps(chat(c), ensure_ascii=False) for c in (OWLS, RYE)).encode("cp1252"), prompts=PROMPTS[:1], malformed=1, says="not UTF-8"),
    "Windows-1252 array": text("log.json", json.dumps([chat(OWLS), chat(RYE)], ensure_ascii=False).encode("cp1252"), prompts=PROMPTS[:1], malformed=1, says="not UTF-8"),
    "Windows-1252 table": text("log.csv", f"prompt\n{OWLS}\n{RYE}\n".replace(",", "").encode("cp1252"), prompts=PROMPTS[:1], malformed=1, says="not UTF-8"),
    "two arrays": text("log.json", f"[{json.dumps(chat(RYE))}]\n[{json.dumps(chat(OWLS))}]\n", prompts=PROMPTS),
    "text after an array": text("log.json", f"{TWO} and so on", prompts=PROMPTS, malformed=1, says="from here on"),
    "array that was cut": text("log.json", TWO[:-1], prompts=PROMPTS, malformed=1, says="cut|from here on"),
    "objects over several lines": text("log.json", json.dumps(chat(RYE), indent=1) + "\n" + json.dumps(chat(OWLS), indent=1), prompts=PROMPTS),
    "array under the name of lines": text("log.jsonl", json.dumps([chat(RYE), chat(OWLS)], indent=1), prompts=PROMPTS),
    "lines under the name of text": text("log.txt", json.dumps(chat(RYE)) + "\n", prompts=PROMPTS[:1]),
    "a question that is JSON": text("log.txt", '{"a": true}\n', prompts=['user: {"a": true}']),
    "CSV": text("log.csv", f'prompt,answer,user\n"{RYE}","Yes, it\nis.",u1\n{RYE[:-1]} really?,,u2\nx\n', prompts=[*PROMPTS[:1], f"user: {RYE[:-1]} really?"], answers=["Yes, it\nis.", None], malformed=1, says="1 cells, but the first row names 3"),
    "CSV with semicolons": text("log.csv", f"prompt;answer\n{OWLS};Mostly.\n", prompts=PROMPTS[1:], answers=["Mostly."]),
    "TSV": text("log.tsv", f"prompt\tanswer\n{OWLS}\tMostly.\n", prompts=PROMPTS[1:], answers=["Mostly."]),
    "CSV without known columns": Form({"a.csv": "question,reply\nx,y\n", "b.jsonl": json.dumps(chat(OWLS))}, prompts=PROMPTS[1:], malformed=1, says="none of the known forms"),
    "brackets within brackets": text("log.jsonl", "[" * 2000 + "\n" + '{"a":' * 2000 + "\n" + json.dumps(chat(OWLS)), prompts=PROMPTS[1:], malformed=2, says="brackets|not JSON|form"),
    "archive": Form({"a.jsonl": b"PK\x03\x04....", "b.jsonl": json.dumps(chat(OWLS))}, prompts=PROMPTS[1:], malformed=1, says="ZIP archive"),
    "damaged Parquet": Form({"a.parquet": b"PAR1 damaged", "b.jsonl": json.dumps(chat(OWLS))}, prompts=PROMPTS[1:], malformed=1, says="Parquet"),
    "nothing at all": text("log.jsonl", "", says="No prompt of 0 records is kept: there is nothing in"),
    "nothing understood": form({"foo": 1}, says="none of the known forms"),
}  # fmt: skip
