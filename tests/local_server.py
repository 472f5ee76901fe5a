"""A completions server on localhost over a tiny model: answers as vLLM or others do, and fails when told to."""

import collections
import json
import os
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from spec_kd.engines.server.engine import ServerEngine
from spec_kd.losses import SignalSpec
from spec_kd.sampling.options import SamplingOptions

GREEDY = SamplingOptions(max_new_tokens=12, temperature=0.0)
TOKEN_ONLY = SignalSpec("token_only")
TOP_5 = SignalSpec("top_k_tail", top_k=5)
TEXTS = ["a", "hello there", "f(x) = 2x", "the quick brown fox", "b", "1 + 1 ="]


class LocalServer:
    """`/v1/completions` over a Hugging Face model, on a free port, for as long as the context lasts.

    Args:
        model (`PreTrainedModel`): Answers; its log-probabilities are raw.
        tokenizer (`PreTrainedTokenizerBase`): Its own.
        dialect (`str`):
            `"vllm"`: `token_ids` and `"token_id:..."` names; `"strings"`: decoded names and no ids, as older SGLang;
            `"keys"`: names as in the vocabulary; `"llama.cpp"`: entries with ids, no echo, tokens that end inside a
            character left out; `"text"`: takes and gives text alone, as `transformers serve`.
        **traits:
            `drops_eos`, `shifts_echo` (by one, as llama-cpp-python), `most_logprobs` (gives fewer than asked),
            `delay` (seconds per answer), `status` and `message` (refuses everything), `context` (tokens), `edit` (a
            function that changes the answer).

    Attributes:
        requests (`list[dict]`): Bodies in the order of arrival, of refused and failed attempts too.
        headers (`list[Message]`): Of the same.
        times (`list[float]`): `time.monotonic()` of the same.
        faults (`deque`):
            Each is used by one request: a name of `FAULTS`, `SURPLUS` or `STRAY`, or a function of the handler. The
            handler's `body` is the request, and its `answer(**changes)` the right answer to it with these changes.
        most_in_flight (`int`): Most requests that were under way at one time.
    """

    def __init__(self, model: Any, tokenizer: Any, dialect: str = "vllm", **traits: Any):
        self.model, self.tokenizer, self.dialect, self.traits = model, tokenizer, dialect, traits
        self.requests, self.headers, self.times = [], [], []
        self.faults = collections.deque()
        self.most_in_flight = self._in_flight = 0
        self._lock, self._model_lock = threading.Lock(), threading.Lock()

    def __enter__(self) -> "LocalServer":
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                server._handle(self)

            def do_GET(self) -> None:
                page = server.show(self.path)
                send_bytes(self, (page or "{}").encode(), 404 if page is None else 200, Content_Type="text/plain")

            def log_message(self, *_: Any) -> None: ...

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Closes the port: further connections are refused."""
        self._http.shutdown()
        self._http.server_close()

    def show(self, path: str) -> str | None:
        """A page of the server; `None` where it has none."""
        return None

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    def _handle(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            self.requests.append(body)
            self.headers.append(handler.headers)
            self.times.append(time.monotonic())
            fault = self.faults.popleft() if self.faults else None
            self._in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self._in_flight)
        body = self._open(handler.path, body)
        handler.body, handler.answer = body, lambda **changes: self._answer({**body, **changes})[1]
        try:
            if fault is not None:
                ({**FAULTS, **SURPLUS, **STRAY}[fault] if isinstance(fault, str) else fault)(handler)
            elif "status" in self.traits:
                send_json(handler, {"error": {"message": self.traits["message"]}}, self.traits["status"])
            else:
                time.sleep(self.traits.get("delay", 0.0))
                status, answer = self._answer(body)
                send_json(handler, self.traits.get("edit", lambda answer: answer)(answer), status)
        except (BrokenPipeError, ConnectionResetError):
            handler.close_connection = True  # the client went away
        finally:
            with self._lock:
                self._in_flight -= 1

    def _open(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The request in OpenAI's form."""
        return body

    def _answer(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        prompt = body["prompt"]
        if self.dialect == "text":
            if not isinstance(prompt, str):
                return 400, {"detail": "prompt must be a string."}
            prompt = self.tokenizer(prompt)["input_ids"]
        if body.get("echo") and self.dialect == "llama.cpp":
            return 500, {"error": {"message": "Only no echo is supported"}}
        with self._model_lock, torch.no_grad():
            ids, log_p, reason = self._write(prompt, body)
        asked = body.get("logprobs")
        choice = {"index": 0, "text": self._decode(ids), "finish_reason": reason, "logprobs": None, "token_ids": None}
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(ids)}
        if self.traits.get("drops_eos") and reason == "stop":
            ids, log_p = ids[:-1], log_p[:-1]
            usage["completion_tokens"] -= 1
        if self.dialect == "vllm" and body.get("return_token_ids"):
            choice |= {"token_ids": list(ids), "prompt_token_ids": list(prompt)}
        if body.get("echo"):
            with self._model_lock, torch.no_grad():
                echo = self.model(torch.tensor([prompt])).logits[0].log_softmax(-1)  # (L, V)
            shifted = [*echo] if self.traits.get("shifts_echo") else [None, *echo[:-1]]
            ids, log_p = [*prompt, *ids], [*shifted, *log_p]
            choice["text"] = self._decode(ids)
        if asked is not None and self.dialect == "llama.cpp":
            choice["logprobs"] = {"content": self._list_content(ids, log_p, asked)}
        elif asked is not None and self.dialect != "text":
            choice["logprobs"] = self._list_legacy(
                ids, log_p, min(asked, self.traits.get("most_logprobs", asked)), body
            )
        return 200, {"id": "cmpl-1", "object": "text_completion", "choices": [choice], "usage": usage}

    def _write(self, prompt: list[int], body: dict[str, Any]) -> tuple[list[int], list[torch.Tensor], str]:
        ids, log_p = list(prompt), []
        random = torch.Generator().manual_seed(body.get("seed", 0))
        limit = min(body["max_tokens"], self.traits.get("context", 10**6) - len(prompt))
        for _ in range(limit):
            logits = self.model(torch.tensor([ids])).logits[0, -1]  # (V,)
            log_p.append(logits.log_softmax(-1))
            if body["temperature"] == 0:
                ids.append(int(logits.argmax()))
            else:
                p = (logits / body["temperature"]).softmax(-1)
                ids.append(int(torch.multinomial(p, 1, generator=random)))
            if ids[-1] in {self.tokenizer.eos_token_id, *body.get("stop_token_ids", ())}:
                return ids[len(prompt) :], log_p, "stop"
        return ids[len(prompt) :], log_p, "length"

    def _decode(self, ids: list[int], skips_special: bool = True) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=skips_special, clean_up_tokenization_spaces=False)

    def _name(self, id: int, body: dict[str, Any]) -> str:
        if self.dialect == "keys":
            return self.tokenizer.convert_ids_to_tokens(id)
        if self.dialect == "vllm" and body.get("return_tokens_as_token_ids"):
            return f"token_id:{id}"
        return self._decode([id], skips_special=False)

    def _list_legacy(self, ids: list[int], log_p: list[Any], top_k: int, body: dict[str, Any]) -> dict[str, Any]:
        tops = []
        for id, row in zip(ids, log_p, strict=True):
            if row is None:
                tops.append(None)
                continue
            # The token itself first, then the most likely ones, as vLLM has them.
            listed = {id: float(row[id])} | {int(i): float(row[i]) for i in row.topk(top_k).indices}
            tops.append({self._name(i, body): value for i, value in listed.items()})
        return {
            "tokens": [self._name(id, body) for id in ids],
            "token_logprobs": [None if row is None else float(row[id]) for id, row in zip(ids, log_p, strict=True)],
            "top_logprobs": tops,
            "text_offset": [0] * len(ids),
        }

    def _list_content(self, ids: list[int], log_p: list[Any], top_k: int) -> list[dict[str, Any]]:
        entries, written = [], []
        for id, row in zip(ids, log_p, strict=True):
            written.append(id)
            if self._decode(written).endswith("\ufffd"):
                continue
            top = [{"id": int(i), "token": "", "logprob": float(row[i])} for i in row.topk(top_k).indices]
            entries.append({"id": id, "token": "", "logprob": float(row[id]), "top_logprobs": top})
        return entries


def send_json(handler: BaseHTTPRequestHandler, answer: Any, status: int = 200, **headers: str) -> None:
    """Sends a whole JSON answer."""
    send_bytes(handler, json.dumps(answer).encode(), status, **headers)


def send_bytes(handler: BaseHTTPRequestHandler, data: bytes, status: int = 200, **headers: str) -> None:
    """Sends an answer that claims to be JSON."""
    handler.send_response(status)
    for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(data)


def _drop_connection(handler: BaseHTTPRequestHandler) -> None:
    handler.close_connection = True


def _reset_connection(handler: BaseHTTPRequestHandler) -> None:
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    os.close(handler.connection.detach())
    handler.close_connection = True


def _reset_within_the_answer(handler: BaseHTTPRequestHandler) -> None:
    send_bytes(handler, b'{"choices": [{"text": "ab', Content_Length="1000")
    _reset_connection(handler)


def _send_twice(handler: BaseHTTPRequestHandler, first_status: int = 200) -> None:
    """In one piece, so that the second is there when the first is read."""
    data = json.dumps(handler.answer()).encode()
    heads = [f"HTTP/1.1 {status} -\r\nContent-Length: {len(data)}\r\n\r\n".encode() for status in (first_status, 200)]
    handler.wfile.write(heads[0] + data + heads[1] + data)


def _send_late(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(0.6)
    send_json(handler, handler.answer())


def _send_half(handler: BaseHTTPRequestHandler) -> None:
    send_bytes(handler, b'{"choices": [{"text": "ab', Content_Length="1000")
    handler.close_connection = True


FAULTS = {
    "dropped connection": _drop_connection,
    "half a body": _send_half,
    "truncated JSON": lambda handler: send_bytes(handler, b'{"choices": [{"text": "ab'),
    "not JSON": lambda handler: send_bytes(handler, b"<html>Bad gateway</html>"),
    "not UTF-8": lambda handler: send_bytes(handler, b'{"choices": "\xff\xfe"}'),
    "JSON without choices": lambda handler: send_json(handler, {"error": {"message": "still loading"}}),
    "408": lambda handler: send_json(handler, {}, 408),
    "409": lambda handler: send_json(handler, {}, 409),
    "429": lambda handler: send_json(handler, {"error": {"message": "slow down"}}, 429),
    "500": lambda handler: send_json(handler, {"error": {"message": "out of memory"}}, 500),
    "503 as text": lambda handler: send_bytes(handler, b"upstream gone", 503),
    "429 with Retry-After": lambda handler: send_json(handler, {}, 429, Retry_After="0"),
    "502 as HTML": lambda handler: send_bytes(handler, b"<html>Bad gateway</html>", 502, Content_Type="text/html"),
    "HTML": lambda handler: send_bytes(handler, b"<html>Sign in</html>", Content_Type="text/html"),
    "empty body": lambda handler: send_bytes(handler, b""),
    "empty choices": lambda handler: send_json(handler, {"choices": []}),
    "connection reset": _reset_connection,
    "connection reset within the answer": _reset_within_the_answer,
    "500, then the answer": lambda handler: _send_twice(handler, 500),
    "slow": lambda handler: time.sleep(0.6),
    "late answer": _send_late,
}

# Right answers, followed by bytes that are not the answer to the next request.
SURPLUS = {"answer sent twice": _send_twice}

# Whole answers to another prompt, which end the job.
STRAY = {
    "answer to another prompt": lambda handler: send_json(handler, handler.answer(prompt=handler.body["prompt"][:-1]))
}


def build_engine(server: LocalServer, **options: Any) -> ServerEngine:
    """An engine for the server, in no mood to wait."""
    options = {"backoff": 0.001, "timeout": 5.0, "tokenizer": server.tokenizer, **options}
    return ServerEngine("tiny", options.pop("tokenizer"), options.pop("base_url", server.base_url), **options)


def generate_alone(model: Any, prompt: list[int], max_new_tokens: int = 12) -> list[int]:
    """What the model writes greedily without a server."""
    ids = torch.tensor([prompt])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_new_tokens)
    return output[0, len(prompt) :].tolist()
