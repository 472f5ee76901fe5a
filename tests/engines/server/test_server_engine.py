import copy
import hashlib
import json

import numpy as np
import pytest
import torch
from local_server import GREEDY, TOKEN_ONLY, TOP_5, build_engine, generate_alone
from tiny import build_tokenizer

from spec_kd.engines.base import UnsupportedByEngineError
from spec_kd.engines.server.client import ServerRequestError
from spec_kd.engines.server.logprobs import UnidentifiedTokensError
from spec_kd.losses import SignalSpec
from spec_kd.sampling.options import SamplingOptions
from spec_kd.sampling.prompts import UnusablePromptError


def compute_log_p(model, prompt, completion, temperature=1.0):
    """float32 `(T, V)`, of the completion's positions."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *completion]])).logits[0]
    return (logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1)


def check_signal(model, prompt, completion, signal):
    log_p = compute_log_p(model, prompt, completion.ids)
    expected = log_p.gather(-1, torch.tensor(completion.ids)[:, None])[:, 0]
    assert torch.tensor(completion.token_logprobs) == pytest.approx(expected, abs=1e-4)
    if signal.method == "token_only":
        assert completion.sparse is None
        return
    sparse = completion.sparse
    assert len(sparse.ids) == len(sparse.log_p) == len(completion.ids) and sparse.counts is None
    for ids, values, row in zip(sparse.ids, sparse.log_p, log_p, strict=True):
        assert ids.dtype == np.int32 and values.dtype == np.float32 and len(set(ids.tolist())) == signal.top_k
        assert values == pytest.approx(row.topk(signal.top_k).values.numpy(), abs=1e-4)
        assert values == pytest.approx(row[torch.from_numpy(ids).long()].numpy(), abs=1e-4)


@pytest.mark.parametrize("dialect", ["vllm", "strings", "keys", "llama.cpp"])
@pytest.mark.parametrize("signal", [None, TOKEN_ONLY, TOP_5], ids=["no signal", "token_only", "top_k_tail"])
def test_greedy_answers_and_their_signal_are_the_models_own(serve, writer, prompts, dialect, signal):
    server, engine = serve(dialect)
    completions = engine.generate(prompts, GREEDY, signal)
    reasons = set()
    for prompt, completion in zip(prompts, completions, strict=True):
        assert completion.ids == generate_alone(writer, prompt)
        assert completion.finish_reason == ("stop" if completion.ids[-1] == 1 else "length")
        reasons.add(completion.finish_reason)
        if signal is None:
            assert completion.token_logprobs is None and completion.sparse is None
        else:
            check_signal(writer, prompt, completion, signal)
    assert reasons == {"stop", "length"}
    assert len(server.requests) == len(prompts)
    assert all(r["temperature"] == 0 and r["top_p"] == 1 and "seed" not in r for r in server.requests)


def test_sampling_from_a_part_of_the_softmax_is_refused(serve, prompts):
    server, engine = serve()
    for options in (SamplingOptions(4, 1.0, top_k=5), SamplingOptions(4, 1.0, top_p=0.9)):
        with pytest.raises(UnsupportedByEngineError, match="use the transformers engine"):
            engine.generate(prompts, options)
    assert not server.requests
    assert len(engine.generate(prompts[:1], SamplingOptions(4, 0.0, top_k=5))) == 1  # greedy text is the same


def test_sampled_answers_have_seeds_of_their_own_and_raw_logprobs(serve, writer, prompts):
    server, engine = serve()
    options = SamplingOptions(max_new_tokens=12, temperature=1.7, seed=3)
    one, again = engine.generate(prompts * 2, options, TOP_5), engine.generate(prompts * 2, options, TOP_5)
    assert [c.ids for c in one] == [
        c.ids for c in again
    ]  # this server honors seeds; `is_reproducible` does not count on it
    assert engine.is_reproducible is False and engine.logprobs_mode == "raw" and engine.name == "server"
    assert [c.ids for c in one[: len(prompts)]] != [c.ids for c in one[len(prompts) :]]
    other = engine.generate(prompts * 2, options, seed="another batch")
    assert [c.ids for c in other] != [c.ids for c in one]
    for prompt, completion in zip(prompts * 2, one, strict=True):
        check_signal(writer, prompt, completion, TOP_5)  # of the model at temperature 1, not at 1.7
    seeds = [r["seed"] for r in server.requests[: len(prompts) * 2]]
    assert len(set(seeds)) == len(seeds) and all(0 <= s < 2**31 for s in seeds)
    assert int(hashlib.sha256(b"3::0").hexdigest()[:8], 16) >> 1 in seeds
    sent = server.requests[0]
    assert sent["temperature"] == 1.7 and sent["top_p"] == 1.0 and sent["top_k"] == -1 and sent["min_p"] == 0.0


@pytest.mark.parametrize("dialect", ["vllm", "strings"])
@pytest.mark.parametrize("signal", [TOKEN_ONLY, TOP_5], ids=["token_only", "top_k_tail"])
def test_scores_are_the_models_own(serve, writer, prompts, dialect, signal):
    server, engine = serve(dialect)
    written = [[70, 71, 72, 90], [1], [100], [80, 81, 1], [95] * 9, [66, 99]]
    scored = engine.score(prompts, written, signal)
    for prompt, ids, completion in zip(prompts, written, scored, strict=True):
        assert completion.ids == ids and completion.finish_reason == ("stop" if ids[-1] == 1 else "length")
        check_signal(writer, prompt, completion, signal)
    num_requests = len(server.requests)
    assert num_requests > len(prompts)  # some texts to verify the echo with
    engine.score(prompts, written, signal)
    assert len(server.requests) == num_requests + len(prompts)
    assert engine.score([], [], signal) == []


@pytest.mark.parametrize(
    ("dialect", "traits", "message"),
    [
        ("llama.cpp", {}, "cannot score, because it refuses `echo`.*Only no echo is supported"),
        ("vllm", {"shifts_echo": True}, "shifted by one token"),
        ("strings", {"shifts_echo": True}, "shifted by one token"),
        ("strings", {"edit": lambda a: strip_echo(a)}, "log-probabilities of 1 positions for a row of"),
        ("vllm", {"edit": lambda a: blank_echo(a)}, "without a log-probability for each token"),
    ],
)
def test_servers_that_cannot_score_are_refused(serve, writer, prompts, dialect, traits, message):
    # Sharp, as real models are: a flat one gives all tokens much the same log-probability, shifted or not.
    sharp = copy.deepcopy(writer)
    with torch.no_grad():
        sharp.lm_head.weight.mul_(4)
    _, engine = serve(dialect, model=sharp, engine_options={"max_retries": 1}, **traits)
    with pytest.raises(UnsupportedByEngineError, match=message):
        engine.score(prompts, [[70, 71]] * 6, TOKEN_ONLY)


def count_echoes(server):
    return sum(bool(request.get("echo")) for request in server.requests)


def test_a_refused_echo_is_told_without_waiting(serve, prompts, monkeypatch):
    server, engine = serve("llama.cpp")  # status 500
    monkeypatch.setattr(engine._client._random, "uniform", lambda *_: pytest.fail("it waits to try again"))
    with pytest.raises(UnsupportedByEngineError, match=r"refuses `echo`\. Use vLLM, SGLang or the transformers"):
        engine.score(prompts, [[70, 71]] * 6, TOKEN_ONLY)
    assert count_echoes(server) == 3

    server, engine = serve("llama.cpp")
    answer = server._answer
    monkeypatch.setattr(server, "_answer", lambda body: (400, {"error": {}}) if body.get("echo") else answer(body))
    with pytest.raises(UnsupportedByEngineError, match=r"refuses `echo`.*status 400"):
        engine.score(prompts, [[70, 71]] * 6, TOKEN_ONLY)
    assert count_echoes(server) == 1


@pytest.mark.parametrize(
    ("faults", "num_echoes"),
    [({4: 1}, 2), ({4: 1, 5: 1}, 3), ({4: 3}, 2)],
    ids=["once", "twice", "with and without echo"],
)
def test_trouble_that_passes_is_no_refusal(serve, writer, prompts, faults, num_echoes):
    """Faults begin after so many answers: four short texts are written, then the first is echoed."""
    server, engine = serve()
    answered = []

    def fail_next(answer):
        answered.append(answer)
        server.faults.extend(["500"] * faults.get(len(answered), 0))
        return answer

    server.traits["edit"] = fail_next
    for prompt, completion in zip(prompts, engine.score(prompts, [[70, 71]] * 6, TOKEN_ONLY), strict=True):
        check_signal(writer, prompt, completion, TOKEN_ONLY)
    assert not server.faults and count_echoes(server) == num_echoes + 4 + 6  # then all short texts, and the rows


def test_trouble_that_stays_is_no_refusal_either(serve, prompts):
    server, engine = serve(engine_options={"max_retries": 2})

    def fail_from_now_on(answer):
        server.faults.extend(["500"] * 20)
        return answer

    server.traits["edit"] = fail_from_now_on
    with pytest.raises(ServerRequestError, match=r"no usable answer in 3 attempts.*out of memory"):
        engine.score(prompts[:1], [[70, 71]], TOKEN_ONLY)


def strip_echo(answer):
    """`echo` is ignored: log-probabilities of the one generated token alone."""
    logprobs = answer["choices"][0]["logprobs"]
    if logprobs["token_logprobs"][0] is None:
        answer["choices"][0]["logprobs"] = {name: values[-1:] for name, values in logprobs.items()}
    return answer


def blank_echo(answer):
    logprobs = answer["choices"][0]["logprobs"]
    if logprobs["token_logprobs"][0] is None:
        logprobs["token_logprobs"] = [None] * len(logprobs["tokens"])
    return answer


def test_an_echo_of_another_text_is_an_error(serve, prompts):
    def add_bos(answer):
        answer["choices"][0]["prompt_token_ids"].insert(0, 0)
        return answer

    def change_token(answer):
        logprobs = answer["choices"][0]["logprobs"]
        if logprobs["token_logprobs"][0] is None:
            logprobs["tokens"][0] = "another"
        return answer

    for dialect, edit in (("vllm", add_bos), ("strings", change_token)):
        _, engine = serve(dialect, edit=edit)
        with pytest.raises(ServerRequestError, match=r"echoed another row than the one that was sent; .*\(0, "):
            engine.score(prompts[:1], [[70, 71]], TOKEN_ONLY)


def test_methods_that_servers_do_not_give_are_refused_before_any_request(serve, prompts):
    server, engine = serve()
    for method in ("sampled_counts", "sampled_logprobs"):
        for call in (
            lambda signal: engine.generate(prompts, GREEDY, signal),
            lambda signal: engine.score(prompts, prompts, signal),
        ):
            with pytest.raises(UnsupportedByEngineError, match=r"'top_k_tail' or 'token_only'.*transformers engine"):
                call(SignalSpec(method, num_draws=4))
    with pytest.raises(ValueError, match="Unknown method 'top_p'"):
        engine.generate(prompts, GREEDY, SignalSpec("top_p"))
    with pytest.raises(ValueError, match="`top_k` of at least 1, got None"):
        engine.generate(prompts, GREEDY, SignalSpec("top_k_tail"))
    with pytest.raises(UnsupportedByEngineError, match="`top_k=262` is more than the 261 ids"):
        engine.generate(prompts, GREEDY, SignalSpec("top_k_tail", top_k=262))
    with pytest.raises(ValueError, match="Prompt 1 has no tokens"):
        engine.generate([[5], []], GREEDY)
    with pytest.raises(ValueError, match="`max_new_tokens` is 0, but must be at least 1"):
        engine.generate(prompts, SamplingOptions(0))
    with pytest.raises(ValueError, match="contains id 261, but the tokenizer has 261"):
        engine.generate([[5, 261]], GREEDY)
    with pytest.raises(ValueError, match="`temperature` is -1, but must be at least 0"):
        engine.check(prompts, SamplingOptions(1, temperature=-1), None)
    engine.check(prompts, None, TOP_5)  # nothing is to be written, as for scores
    with pytest.raises(ValueError, match="6 prompts and 1 completions"):
        engine.score(prompts, [[5]], TOKEN_ONLY)
    with pytest.raises(ValueError, match="Row 1 has an empty prompt or completion"):
        engine.score([[5], [6]], [[7], []], TOKEN_ONLY)
    assert engine.generate([], GREEDY, TOP_5) == [] and not server.requests


@pytest.mark.parametrize("dialect", ["vllm", "strings"])
def test_fewer_logprobs_than_asked_are_an_error(serve, prompts, dialect):
    _, engine = serve(dialect, most_logprobs=3)
    with pytest.raises(ServerRequestError, match=r"lists 3 most likely tokens at .* 5 were asked .*--max-logprobs"):
        engine.generate(prompts, GREEDY, TOP_5)
    assert len(engine.generate(prompts, GREEDY, SignalSpec("top_k_tail", top_k=3))) == len(prompts)


def test_most_likely_tokens_that_share_a_name_are_counted(serve, prompts):
    def merge(dialect, text):
        def edit(answer):
            choice = answer["choices"][0]
            if choice["text"] == text:  # the least likely of the first token is named as another
                top = choice["logprobs"]["top_logprobs"][0]
                del top[min(top, key=top.get)]
            return answer

        return serve(dialect, edit=edit)[1]

    whole = serve("strings")[1].generate(prompts, GREEDY, TOP_5)
    text = build_tokenizer().decode(whole[0].ids, skip_special_tokens=True)
    with pytest.raises(
        UnidentifiedTokensError, match=r"1 tokens, in 1 of 6 completions.*\(4 names for 5 tokens\)"
    ) as raised:
        merge("strings", text).generate(prompts, GREEDY, TOP_5)
    assert [c and c.ids for c in raised.value.completions] == [None, *(c.ids for c in whole[1:])]
    with pytest.raises(ServerRequestError, match="lists 4 most likely tokens at token 0"):
        merge("vllm", text).generate(prompts, GREEDY, TOP_5)


def test_a_log_p_of_zero_probability_is_minus_infinity(serve, prompts):
    def write_floor(answer):
        for top in answer["choices"][0]["logprobs"]["top_logprobs"]:
            top[min(top, key=top.get)] = -9999.0
        return answer

    _, engine = serve(edit=write_floor)
    for completion in engine.generate(prompts, GREEDY, TOP_5):
        assert all(np.isfinite(v[:4]).all() for v in completion.sparse.log_p)
        assert any(v[4] == -np.inf for v in completion.sparse.log_p)


def test_text_alone_is_refused_unless_declared(serve, prompts):
    def keep_text(answer):
        answer["choices"][0] |= {"logprobs": None}
        answer["choices"][0].pop("token_ids")
        return answer

    _, engine = serve(edit=keep_text)
    with pytest.raises(UnsupportedByEngineError, match=r"only text.*is_text_only=True"):
        engine.generate(prompts, GREEDY)

    def keep_ids(answer):
        answer["choices"][0]["logprobs"] = None
        return answer

    _, engine = serve(edit=keep_ids)
    assert engine.generate(prompts, GREEDY)[0].token_logprobs is None
    with pytest.raises(UnsupportedByEngineError, match=r"no log-probabilities.*'token_only'.*transformers engine"):
        engine.generate(prompts, GREEDY, TOKEN_ONLY)
    with pytest.raises(UnsupportedByEngineError, match="returns no log-probabilities of exact ids"):
        engine.score(prompts, prompts, TOKEN_ONLY)


def test_text_only_servers_serve_black_box(serve, writer, prompts, tokenizer):
    server, engine = serve("text", engine_options={"is_text_only": True})
    for prompt, completion in zip(prompts, engine.generate(prompts, GREEDY), strict=True):
        assert completion.ids == generate_alone(
            writer, prompt
        )  # one token, one character: nothing can be cut otherwise
        assert completion.finish_reason == ("stop" if completion.ids[-1] == 1 else "length")
        assert completion.token_logprobs is None
    assert [r["prompt"] for r in server.requests] and all(isinstance(r["prompt"], str) for r in server.requests)
    known = {"model", "prompt", "max_tokens", "temperature", "top_p", "presence_penalty", "frequency_penalty"}
    assert set(server.requests[0]) == known | {"generation_config"}
    assert json.loads(server.requests[0]["generation_config"])["do_sample"] is False
    assert engine.describe()["completion_ids"] == "text tokenized again"
    num_requests = len(server.requests)
    for call in (
        lambda: engine.generate(prompts, GREEDY, TOKEN_ONLY),
        lambda: engine.score(prompts, prompts, TOKEN_ONLY),
    ):
        with pytest.raises(UnsupportedByEngineError, match=r"text-only.*'token_only'.*transformers engine"):
            call()
    half = tokenizer("é")["input_ids"][:1]
    with pytest.raises(UnusablePromptError, match="Prompt 1 cannot be sent as text"):
        engine.generate([prompts[0], half], GREEDY)
    assert len(server.requests) == num_requests
    with pytest.raises(ServerRequestError, match=r"prompt must be a string.*(?s:.)*is_text_only=True"):
        build_engine(server).generate(prompts, GREEDY)
