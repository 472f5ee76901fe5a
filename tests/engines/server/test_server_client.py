import asyncio
import email.utils
import importlib.util
import json
import logging
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import pytest
from local_server import FAULTS, GREEDY, TOKEN_ONLY, build_engine, generate_alone, send_json
from tiny import build_tokenizer

from spec_kd.engines.server import client as server_client
from spec_kd.engines.server.client import ServerRequestError
from spec_kd.sampling.options import SamplingOptions

KEY = "sk-a-very-secret-key-0123456789"


@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_faults_that_may_pass_are_tried_again(serve, writer, prompts, fault, caplog):
    server, engine = serve(
        engine_options={"timeout": 0.4 if fault in ("slow", "late answer") else 5.0, "max_retries": 2}
    )
    server.faults.extend([fault] * 2)
    completions = engine.generate(prompts[:3], SamplingOptions(3, 0.0), TOKEN_ONLY)
    assert [c.ids for c in completions] == [generate_alone(writer, prompt, 3) for prompt in prompts[:3]]
    assert len(server.requests) == 5
    assert len([r for r in caplog.records if r.name.startswith("spec_kd")]) == 2
    server.faults.extend([fault] * 3)
    with pytest.raises(ServerRequestError, match="Prompt 0: no usable answer in 3 attempts; the last: ") as raised:
        engine.generate(prompts[:1], GREEDY)
    assert raised.value.index == 0 and len(server.requests) == 8


@pytest.mark.parametrize("fault", ["answer sent twice", "500, then the answer"])
def test_what_comes_after_an_answer_is_no_answer_to_the_next_request(serve, writer, prompts, fault):
    server, engine = serve(engine_options={"max_concurrency": 1, "max_retries": 2})
    server.traits["edit"] = lambda answer: {**answer, "choices": [{**answer["choices"][0], "prompt_token_ids": None}]}
    server.faults.extend([fault, None] * 3)
    completions = engine.generate(prompts, SamplingOptions(3, 0.0), TOKEN_ONLY)
    assert [c.ids for c in completions] == [generate_alone(writer, prompt, 3) for prompt in prompts]


def test_an_answer_to_another_prompt_is_refused(serve, prompts):
    def name_other(answer):
        return {**answer, "choices": [{**answer["choices"][0], "prompt_token_ids": prompts[1]}]}

    _, engine = serve(edit=name_other)
    with pytest.raises(
        ServerRequestError, match=r"Prompt 0: .*belongs to another prompt.*truncates prompts or mixes them up"
    ):
        engine.generate(prompts[:1], GREEDY)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_refusals_are_raised_at_once_with_the_servers_words(serve, prompts, status):
    server, engine = serve(status=status, message="no such model: tiny", engine_options={"max_concurrency": 1})
    with pytest.raises(ServerRequestError, match=f"Prompt 0: .*status {status}: .*no such model: tiny") as raised:
        engine.generate(prompts, GREEDY)
    assert raised.value.status_code == status and len(server.requests) == 1
    assert ("extra_body" in str(raised.value)) == (status in (400, 422))


def test_retry_after_is_honored(serve, prompts):
    server, engine = serve()
    server.faults.append(lambda handler: send_json(handler, {}, 429, Retry_After="0.3"))
    engine.generate(prompts[:1], GREEDY)
    assert len(server.requests) == 2 and server.times[1] - server.times[0] >= 0.3
    server.faults.append(lambda handler: send_json(handler, {}, 429, Retry_After="3600"))
    with pytest.raises(ServerRequestError, match="asks for a pause of 3600 s"):
        engine.generate(prompts[:1], GREEDY)
    assert len(server.requests) == 3
    a_minute_from_now = {"retry-after": email.utils.formatdate(time.time() + 60, usegmt=True)}
    assert 58 <= server_client._read_retry_after(a_minute_from_now) <= 60
    for headers in ({}, {"retry-after": "soon"}):
        assert server_client._read_retry_after(headers) is None


def test_pauses_are_drawn_from_a_range_that_doubles_up_to_a_minute(serve, prompts, monkeypatch):
    server, engine = serve(engine_options={"backoff": 10.0, "max_retries": 5})
    ranges = []
    monkeypatch.setattr(engine._client._random, "uniform", lambda *ends: ranges.append(ends) or 0.0)
    server.faults.extend(["500"] * 5)
    assert len(engine.generate(prompts[:1], SamplingOptions(1, 0.0))) == 1
    assert ranges == [(0.0, 10.0), (0.0, 20.0), (0.0, 40.0), (0.0, 60.0), (0.0, 60.0)]


def test_the_number_of_requests_under_way_is_bounded(serve, prompts):
    server, engine = serve(delay=0.05, engine_options={"max_concurrency": 3})
    engine.generate(prompts * 2, SamplingOptions(1, 0.0))
    assert server.most_in_flight == 3
    server, engine = serve(delay=0.05, engine_options={"max_concurrency": 1})
    engine.generate(prompts[:4], SamplingOptions(1, 0.0))
    assert server.most_in_flight == 1


def test_the_rate_of_requests_is_bounded_over_batches(serve, prompts):
    server, engine = serve(engine_options={"requests_per_minute": 600})
    server.faults.append("500")
    engine.generate(prompts[:3], SamplingOptions(1, 0.0))
    engine.generate(prompts[:2], SamplingOptions(1, 0.0))
    assert len(server.times) == 6 and server.times[-1] - server.times[0] >= 0.45  # 5 pauses of 0.1 s


def test_one_failure_cancels_the_others(serve, prompts):
    server, engine = serve(delay=0.3, engine_options={"max_concurrency": 2, "max_retries": 0})
    server.faults.append("500")
    begin = time.monotonic()
    with pytest.raises(ServerRequestError, match=r"no usable answer in 1 attempts.*out of memory") as raised:
        engine.generate(prompts * 5, GREEDY)
    assert time.monotonic() - begin < 1.5 and len(server.requests) <= 4
    assert raised.value.index in (0, 1)
    assert threading.active_count() < 20


def test_a_server_that_dies_halfway(serve, prompts):
    server, engine = serve(delay=0.02, engine_options={"max_concurrency": 2, "max_retries": 3})

    def die(handler):
        handler.close_connection = True
        threading.Thread(target=server.stop).start()
        server.faults.extend(["dropped connection"] * 10)  # of connections that are open already

    answered = []

    def count(answer):
        answered.append(answer)
        if len(answered) == 3:
            server.faults.append(die)
        return answer

    server.traits["edit"] = count
    begin = time.monotonic()
    with pytest.raises(ServerRequestError, match="no usable answer in 4 attempts; the last: the connection to http"):
        engine.generate(prompts * 5, GREEDY)
    assert time.monotonic() - begin < 5 and 3 <= len(answered) < 30


def test_it_works_inside_a_running_loop(serve, writer, prompts):
    _, engine = serve()

    async def cell():
        return engine.generate(prompts, GREEDY, TOKEN_ONLY), engine.score(prompts[:1], [[70, 71]], TOKEN_ONLY)

    written, scored = asyncio.run(cell())
    assert written[0].ids == generate_alone(writer, prompts[0])
    assert scored[0].ids == [70, 71] and len(scored[0].token_logprobs) == 2
    server, engine = serve(engine_options={"max_retries": 0})
    server.faults.append("500")

    async def failing_cell():
        engine.generate(prompts[:1], GREEDY)

    with pytest.raises(ServerRequestError):
        asyncio.run(failing_cell())


def test_an_interrupt_in_a_notebook_cell_ends_the_batch(serve, prompts):
    server, engine = serve(delay=0.2, engine_options={"max_concurrency": 1})

    async def cell():
        engine.generate(prompts * 20, SamplingOptions(1, 0.0))

    # A background job of a shell starts with the signal ignored
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    loop = asyncio.new_event_loop()  # `asyncio.run` would catch the signal, which IPython does not
    interrupt = threading.Timer(0.7, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT])
    interrupt.start()
    begin = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            loop.run_until_complete(cell())
    finally:
        interrupt.cancel()
        signal.signal(signal.SIGINT, previous)
        loop.close()
    assert time.monotonic() - begin < 5 and 1 <= len(server.requests) < 20


def test_the_key_is_sent_and_never_shown(serve, prompts, monkeypatch, caplog):
    monkeypatch.setenv("MY_KEY", f" {KEY}\n")
    for name in ("", "openai", "httpx", "httpx2", "httpcore", "spec_kd"):
        caplog.set_level(logging.DEBUG, logger=name)
    options = {"api_key_env": "MY_KEY", "max_retries": 1, "timeout": 0.4}
    server, engine = serve(engine_options=options)
    shown = [repr(engine), str(engine), str(engine.describe()), str(vars(engine)), str(vars(engine._client))]
    for fault in sorted(FAULTS):
        server.faults.append(fault)
        engine.generate(prompts[:1], SamplingOptions(1, 0.0))
    assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {KEY}"}

    def echo_key(handler):
        send_json(handler, {"error": {"message": f"Incorrect API key provided: {KEY}"}}, 401)

    for faults in (["dropped connection"] * 2, ["slow"] * 2, ["500"] * 2, ["truncated JSON"] * 2, [echo_key]):
        server.faults.extend(faults)
        with pytest.raises(ServerRequestError) as raised:
            engine.generate(prompts[:1], GREEDY)
        shown += list_all_of(raised.value)
    assert any("Incorrect API key provided: [API key]" in text for text in shown)
    shown += [record.getMessage() + str(vars(record)) for record in caplog.records]
    assert caplog.records and not [text for text in shown if KEY in text]


def list_all_of(error):
    """Everything that a report of an error may show: messages, chain, attributes, and those of the attributes."""
    shown = ["".join(traceback.format_exception(error))]
    seen = []
    while error is not None and error not in seen:
        seen.append(error)
        shown += [repr(error), repr(error.args), repr(vars(error))]
        for value in vars(error).values():
            shown.append(repr(getattr(value, "headers", "")) + str(dict(getattr(value, "headers", None) or {})))
        error = error.__cause__ or error.__context__
    return shown


def test_a_password_in_the_address_is_sent_and_never_shown(serve, prompts, caplog):
    for name in ("", "openai", "httpx", "httpx2", "httpcore", "spec_kd"):
        caplog.set_level(logging.DEBUG, logger=name)
    server, _ = serve()
    address = server.base_url.replace("http://", "http://me:p%40ss-word-77@")
    engine = build_engine(server, base_url=address, max_retries=0)
    engine.generate(prompts[:1], SamplingOptions(1, 0.0))
    assert server.headers[-1]["Authorization"] == "Basic bWU6cEBzcy13b3JkLTc3"

    def echo(handler):
        send_json(handler, {"error": {"message": f"{address}: p@ss-word-77, {handler.headers['Authorization']}"}}, 403)

    shown = [repr(engine), str(engine.describe()), str(vars(engine)), str(vars(engine._client))]
    for fault in (echo, "dropped connection", "500"):
        server.faults.append(fault)
        with pytest.raises(ServerRequestError) as raised:
            engine.generate(prompts[:1], GREEDY)
        shown += list_all_of(raised.value)
    shown += [record.getMessage() + str(vars(record)) for record in caplog.records]
    assert any(server.base_url in text for text in shown)
    for secret in ("p%40ss-word-77", "p@ss-word-77", "bWU6cEBzcy13b3JkLTc3"):
        assert not [text for text in shown if secret in text]


@pytest.mark.parametrize("end", ["?api_key=very-secret", "?token=very-secret", "#very-secret"])
def test_a_query_in_the_address_is_refused_without_being_shown(serve, end):
    server, _ = serve()
    with pytest.raises(ValueError, match=r"`\?\.\.\.` or `#.*environment variable MY_KEY") as raised:
        build_engine(server, base_url=server.base_url + end, api_key_env="MY_KEY")
    assert not [text for text in list_all_of(raised.value) if "very-secret" in text]


def test_a_key_in_the_extra_body_is_in_no_description(serve):
    server, _ = serve()
    engine = build_engine(server, extra_body={"api_key": KEY, "options": {"token": KEY, "mode": 3}})
    assert KEY not in str(engine.describe()) and engine.describe()["request_fields"]["options"] == {"mode": 3}


@pytest.mark.parametrize("bad", [f"{KEY}\nX-Injected: 1", f"{KEY}\u2019", f"{KEY}\x7f"])
def test_a_key_that_cannot_be_sent_is_refused_without_being_shown(serve, prompts, monkeypatch, bad):
    monkeypatch.setenv("OPENAI_API_KEY", bad)
    server, engine = serve()
    with pytest.raises(ValueError, match="environment variable OPENAI_API_KEY has characters") as raised:
        engine.generate(prompts[:1], GREEDY)
    assert not [text for text in list_all_of(raised.value) if KEY in text] and not server.requests


def test_without_a_key_a_placeholder_is_sent(serve, prompts, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server, engine = serve()
    engine.generate(prompts[:1], SamplingOptions(1, 0.0))
    assert server.headers[0]["Authorization"] == "Bearer EMPTY"


def test_description(serve, prompts):
    server, _ = serve()
    with_password = server.base_url.replace("http://", f"http://user:{KEY}@")
    engine = build_engine(
        server, base_url=with_password, logprobs_mode="processed", extra_body={"top_k": 0, "min_p": None, "priority": 3}
    )
    described = engine.describe()
    assert json.loads(json.dumps(described)) == described
    assert KEY not in json.dumps(described) and KEY not in repr(engine) and server.base_url in repr(engine)
    assert described["model"] == engine.target_name == "tiny" and described["logprobs_mode"] == "processed"
    assert described["completion_ids"] == "of the server" and described["eos_token_ids"] == [1]
    # A job goes on after its server came back elsewhere.
    assert build_engine(server, max_retries=1).describe() == build_engine(server, base_url="http://other/v1").describe()
    engine.generate(prompts[:1], SamplingOptions(1, 0.0))
    sent = server.requests[-1]
    assert sent["top_k"] == 0 and sent["priority"] == 3 and "min_p" not in sent
    assert {name: sent[name] for name in described["request_fields"]} == described["request_fields"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_url": "localhost:8000/v1"}, "not the address of a server"),
        ({"base_url": "http://localhost:99999/v1"}, "not the address of a server"),
        ({"base_url": "http://[::1/v1"}, "not the address of a server"),
        ({"logprobs_mode": "cooked"}, "is 'cooked', but must be one of raw, processed"),
        ({"max_concurrency": 0}, "`max_concurrency` is 0, but must be at least 1"),
        ({"max_retries": -1}, "`max_retries` is -1, but must be at least 0"),
        ({"requests_per_minute": 0}, "`requests_per_minute` is 0, but must be above 0"),
        ({"timeout": 0}, "`timeout` is 0, but must be above 0"),
        ({"backoff": -1}, "`backoff` is -1, but must be at least 0"),
        ({"extra_body": {"stop": ["\n"], "temperature": 1}}, "has stop, temperature"),
    ],
)
def test_bad_options_are_refused(serve, options, message):
    server, _ = serve()
    with pytest.raises(ValueError, match=message):
        build_engine(server, **options)


def test_a_tokenizer_without_eos_needs_eos_ids(serve):
    server, _ = serve()
    bare = build_tokenizer()
    bare.eos_token = None
    assert build_engine(server, tokenizer=bare).eos_token_ids == [1]  # what its template writes after a reply
    bare.chat_template = None
    with pytest.raises(ValueError, match="Give `eos_token_ids`"):
        build_engine(server, tokenizer=bare)
    assert build_engine(server, tokenizer=bare, eos_token_ids=[7, 3, 7]).eos_token_ids == [3, 7]


def test_without_the_openai_package_the_error_says_what_to_install(serve, monkeypatch):
    server, _ = serve()
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError, match=r"pip install spec_kd\[server\]"):
        build_engine(server)


def test_the_modules_can_be_imported_without_the_openai_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    paths = sorted(Path(server_client.__file__).parent.glob("*.py"))
    assert len(paths) == 8
    for path in paths:
        spec = importlib.util.spec_from_file_location(f"fresh_{path.stem}", path)
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
