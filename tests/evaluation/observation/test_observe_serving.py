"""A running server, asked: it counts what replay predicts, and every server that is not the right one is named."""

import json
import os
import re
import signal
import time

import forked
import numpy as np
import pytest
import torch
from datasets import Dataset
from engine_loops import sample
from speculating_server import SpeculatingServer, alternates
from tiny import build_llama, build_tokenizer
from toy_grammar import GRAMMAR, make_allow

from spec_kd import compare_observed, describe_observation, observe_serving
from spec_kd.engines.server.client import ServerRequestError
from spec_kd.evaluation import ObservationOptions
from spec_kd.sampling.response_format import ResponseFormat
from spec_kd.serving import find_serving_engine

LIMIT = 12
ENGINES = ["vllm", "llama.cpp", "sglang"]


@pytest.fixture(scope="module")
def pair():
    """A draft that agrees now and then, and a target that ends now and then."""
    target, draft = (build_llama(3, layers=4, tie=False) for _ in range(2))
    with torch.no_grad():
        for p in draft.parameters():
            p.add_(0.012 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
        for model in (target, draft):
            model.lm_head.weight[1] *= 3
    return draft, target


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 9, (10,), generator=generator).tolist()
    return Dataset.from_dict(
        {"prompt_ids": [torch.randint(5, 261, (n,), generator=generator).tolist() for n in lengths]}
    )


@pytest.fixture
def start(pair, tokenizer):
    """Servers with and without the draft, closed at the end."""
    servers = []

    def run(engine, has_draft=True, **traits):
        draft, target = pair
        servers.append(SpeculatingServer(engine, target, draft if has_draft else None, tokenizer, **traits).__enter__())
        return servers[-1]

    yield run
    for server in servers:
        server.stop()


@pytest.fixture
def observe(prompts, tokenizer):
    def run(server, plain=None, **options):
        options = {"serving_engine": server.engine, "max_new_tokens": LIMIT, "show_progress": False, **options}
        plain_url = plain and plain.base_url
        options.setdefault("server_kwargs", {"backoff": 0.001})
        return observe_serving(server.base_url, prompts, processing_class=tokenizer, plain_url=plain_url, **options)

    return run


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("concurrency", [1, 4])
def test_what_a_server_counts_is_what_replay_predicts(start, observe, pair, engine, concurrency):
    server, plain = start(engine), start(engine, has_draft=False)
    observation = observe(server, plain, concurrency=concurrency)
    assert len(observation.requests) == len(observation.plain_requests) == 10
    assert alternates(server, plain) is (concurrency == 1)
    assert server.most_in_flight <= concurrency
    assert {one.finish_reason for one in observation.requests} == {"stop", "length"}
    assert observation.num_equal_completions == 10
    assert observation.counters.rounds == observation.totals.rounds == len(server.rounds)
    assert (observation.drafted.sum(), observation.accepted.sum()) == tuple(map(sum, zip(*server.rounds, strict=True)))

    draft, target = pair
    report = compare_observed(observation, draft, target, num_assistant_tokens=3, show_progress=False)
    assert report.num_equal == report.num_compared == 10
    assert [one.tokens for one in report.prompts] == [len(one.completion_ids) for one in observation.requests]
    for metric in report.metrics:
        assert metric.observed.value == pytest.approx(metric.predicted.value), metric.name
        assert metric.same_tokens.value == pytest.approx(0, abs=1e-12)
    assert 0.1 < report.metrics[0].observed.value < 0.9  # both outcomes occur
    assert len(report.metrics) == 2 + 3
    assert "10 of 10 prompts" in report.headline and report.speedup.low <= report.speedup.value <= report.speedup.high


@pytest.mark.parametrize("engine", ["llama.cpp", "sglang"])
def test_a_sampled_text_decides_which_greedy_drafts_are_accepted(start, observe, pair, engine):
    observation = observe(start(engine, choose=sample), temperature=1.0)
    report = compare_observed(observation, *pair, num_assistant_tokens=3, show_progress=False)
    assert report.num_equal == report.num_compared == 10
    assert observation.accepted.sum() > 0


@pytest.mark.parametrize("engine", ENGINES)
def test_what_a_server_counts_under_a_grammar(start, pair, prompts, tokenizer, engine, tmp_path):
    pytest.importorskip("xgrammar")
    server = start(engine, allow=make_allow(tokenizer))
    wanted = json.dumps({"type": "grammar", "grammar": GRAMMAR})
    rows = prompts.add_column("response_format", [wanted] * 8 + [None] * 2)
    options = {"serving_engine": engine, "max_new_tokens": LIMIT, "show_progress": False, "output_dir": tmp_path}
    observation = observe_serving(server.base_url, rows, processing_class=tokenizer, **options)
    assert [one.response_format is None for one in observation.requests] == [False] * 8 + [True] * 2
    again = observe_serving(server.base_url, rows, processing_class=tokenizer, **options)
    assert again.requests == observation.requests and len(server.requests) == 10  # from the disk
    draft, target = pair
    given = {"num_assistant_tokens": 3, "show_progress": False}
    report = compare_observed(observation, draft, target, processing_class=tokenizer, **given)
    assert report.num_equal == report.num_compared == 10
    assert 0 < observation.accepted.sum() < observation.drafted.sum()
    with pytest.raises(ValueError, match="Pass `processing_class`"):
        compare_observed(observation, draft, target, **given)
    with pytest.raises(ValueError, match="holds an observation with other options"):
        observe_serving(server.base_url, prompts, processing_class=tokenizer, **options)


SCHEMA = {"type": "object", "properties": {"b": {}, "a": {}}}


@pytest.mark.parametrize(
    ("engine", "schema", "grammar"),
    [
        ("vllm", {"structured_outputs": {"json": SCHEMA}}, {"structured_outputs": {"grammar": GRAMMAR}}),
        ("llama.cpp", {"json_schema": SCHEMA}, {"grammar": GRAMMAR}),
        ("sglang", {"json_schema": json.dumps(SCHEMA)}, {"ebnf": GRAMMAR}),
    ],
)
def test_a_format_is_sent_in_the_form_of_the_engine(engine, schema, grammar, tmp_path):
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(SCHEMA))
    observer = find_serving_engine(engine).observer
    for given, fields in (({"json_schema": SCHEMA}, schema), ({"json_schema": str(file)}, schema),
                          ({"grammar": GRAMMAR}, grammar)):  # fmt: skip
        wanted = ObservationOptions(serving_engine=engine, **given).response_format
        assert observer.write_format(wanted) == fields
        assert observer.read_format({}) is None
    if engine == "llama.cpp":
        told = observer.read_format({"generation_settings": {"grammar": GRAMMAR}})
        assert told == ResponseFormat("grammar", GRAMMAR)
        assert observer.read_format({"generation_settings": {"grammar": ""}}) is None


@pytest.mark.parametrize("engine", ["vllm", "llama.cpp"])
def test_counters_alone_give_totals(start, observe, pair, engine):
    observation = observe(start(engine, tells=False))
    assert observation.drafted is None and observation.accepted_by_position is None
    report = compare_observed(observation, *pair, show_progress=False)
    assert report.num_assistant_tokens == 3  # as many as there are positions
    assert report.num_compared == 0 and "predicts" not in report.headline
    for metric in report.metrics:
        assert metric.observed.value == pytest.approx(metric.predicted.value), metric.name
        assert np.isnan(metric.observed.low)


def test_answers_alone_are_enough(start, observe, pair):
    observation = observe(start("vllm", counts=False))
    assert observation.counters is None and observation.num_assistant_tokens == 3
    assert compare_observed(observation, *pair, show_progress=False).num_equal == 10


def test_rounds_that_nobody_tells_of_are_left_out(start, observe, pair):
    observation = observe(start("llama.cpp", counts=False))
    assert np.isnan(observation.mean_acceptance_length.value) and observation.acceptance_rate_per_position == []
    with pytest.raises(ValueError, match="did not tell how many tokens it drafts in a round"):
        compare_observed(observation, *pair)
    report = compare_observed(observation, *pair, num_assistant_tokens=3, show_progress=False)
    assert report.num_equal == 10 and report.metrics[1].same_tokens.value != report.metrics[1].same_tokens.value


def test_counters_that_others_moved_are_not_used(start, observe):
    server = start("llama.cpp", edit=lambda answer: server.rounds.append((3, 1)) or answer)
    observation = observe(server)
    assert observation.counters.drafted == observation.drafted.sum() + 30 and observation.totals is None
    assert any("not of these requests alone" in note for note in describe_observation(observation).notes)


def test_times_are_the_servers_where_it_tells_them(start, observe):
    server, plain = start("llama.cpp"), start("llama.cpp", has_draft=False)
    observation = observe(server, plain)
    lengths = [len(one.completion_ids) for one in observation.requests]
    assert observation.has_decoding_seconds
    rate = (sum(lengths) - 10) / (0.01 * sum(n for n in lengths if n > 1))
    assert observation.tokens_per_second == observation.plain_tokens_per_second == pytest.approx(rate)
    assert observation.speedup.value == pytest.approx(1)
    observation = observe(start("vllm", delay=0.05), start("vllm", has_draft=False))
    assert not observation.has_decoding_seconds
    assert all(one.request_seconds > 0.05 for one in observation.requests)
    assert describe_observation(observation).timing == "whole requests"


@pytest.mark.parametrize(
    ("engine", "tells", "hint"),
    [
        ("llama.cpp", True, "without `--spec-type draft-simple`"),
        ("llama.cpp", False, "without `--spec-type draft-simple`"),
        ("vllm", False, "without `--speculative-config`"),
        ("sglang", True, "without `--speculative-algorithm STANDALONE`"),
    ],
)
def test_a_server_that_does_not_draft(start, observe, tmp_path, engine, tells, hint):
    server = start(engine, has_draft=False, tells=tells)
    with pytest.raises(ValueError, match=f"The counters did not move while .* it does not draft.*{re.escape(hint)}"):
        observe(server, output_dir=tmp_path)
    assert len(server.requests) < 10
    # its answers are not taken for those of the right one
    assert len(observe(start(engine), output_dir=tmp_path).requests) == 10


@pytest.mark.parametrize("engine", ENGINES)
def test_a_server_that_tells_nothing(start, observe, engine):
    with pytest.raises(ValueError, match=r"Neither the answers nor the counters .* Start the server with `--"):
        observe(start(engine, tells=False, counts=False))


def test_a_server_of_another_engine(start, observe):
    server = start("vllm")
    with pytest.raises(ValueError, match=r"is vLLM, not llama\.cpp\. Set `serving_engine='vllm'`"):
        observe(server, serving_engine="llama.cpp")
    with pytest.raises(ValueError, match=r"is llama\.cpp, not vLLM"):
        observe(server, start("llama.cpp", has_draft=False))
    assert server.requests == []


def test_two_addresses(start, observe):
    server = start("llama.cpp")
    with pytest.raises(ValueError, match="`plain_url` is the address of the server with the draft"):
        observe(server, server)
    with pytest.raises(ValueError, match="drafts too"):
        observe(server, start("llama.cpp"))


def test_a_server_that_lists_no_models(start, observe):
    server = start("vllm", names=False)
    with pytest.raises(ValueError, match=r"lists no model\. Pass `model`"):
        observe(server)
    assert observe(server, model="my-target").model == "my-target"
    assert {body["model"] for body in server.requests} == {"my-target"}


def test_a_server_that_is_not_there(start, observe):
    server = start("vllm")
    server.stop()
    with pytest.raises(ServerRequestError, match="nothing listens there"):
        observe(server, server_kwargs={"max_retries": 0})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"serving_engine": "transformers"}, "must be one of vllm, sglang, llama.cpp"),
        ({"concurrency": 0}, "`concurrency` is 0"),
        ({"temperature": -1.0}, "`temperature` is -1.0"),
        ({"server_kwargs": {"is_text_only": True}}, "`is_text_only` gives text without ids"),
    ],
)
def test_options_are_checked_before_any_request(start, observe, options, message):
    server = start("vllm")
    with pytest.raises(ValueError, match=message):
        observe(server, **options)
    with pytest.raises(TypeError, match=r"has no option `timout`\. Did you mean timeout"):
        observe(server, server_kwargs={"timout": 3})
    assert server.requests == []


def test_prompts_that_are_refused_are_left_out_and_named(start, observe, prompts):
    longest = max(map(len, prompts["prompt_ids"]))
    too_long = [i for i, ids in enumerate(prompts["prompt_ids"]) if len(ids) == longest]
    server = start("vllm", context=longest + LIMIT - 1)
    for concurrency in (1, 4):
        observation = observe(server, concurrency=concurrency)
        assert list(observation.unusable) == too_long and "longer than the context" in observation.unusable[too_long[0]]
        assert [one.row for one in observation.requests] == [i for i in range(10) if i not in too_long]
        assert f"first prompt {too_long[0]}" in describe_observation(observation).notes[-1]
    with pytest.raises(ValueError, match="could use none of the prompts"):
        observe(start("vllm", context=3))


def observe_until_killed(url, folder, prompts):
    observe_serving(
        url, prompts, processing_class=build_tokenizer(), serving_engine="llama.cpp", max_new_tokens=LIMIT,
        output_dir=folder, show_progress=False,
    )  # fmt: skip


def test_a_killed_run_asks_only_what_is_missing(start, observe, prompts, tmp_path):
    server = start("llama.cpp", delay=0.2)
    process = forked.start(observe_until_killed, server.base_url, str(tmp_path), prompts)
    lines = tmp_path / "requests.jsonl"
    start_time = time.monotonic()
    while not (lines.exists() and lines.read_bytes().count(b"\n") >= 3):
        assert time.monotonic() - start_time < 100 and process.exitcode is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    num_kept = lines.read_bytes().count(b"\n")
    with lines.open("a") as file:
        file.write('{"side": "draft", "row": 5, "comp')  # a line that the kill cut
    time.sleep(0.3)
    num_asked = len(server.requests)
    observation = observe(server, output_dir=tmp_path)
    assert 3 <= num_kept < 10 and len(server.requests) == num_asked + 10 - num_kept
    assert observation.requests == observe(server, output_dir=tmp_path).requests  # all is there: nobody is asked
    assert len(server.requests) == num_asked + 10 - num_kept
    fresh = observe(server)
    assert [one.completion_ids for one in observation.requests] == [one.completion_ids for one in fresh.requests]
    # the counters of the killed run are lost, and are not taken for those of all requests
    assert observation.counted_requests == 10 - num_kept and observation.totals is None


def test_the_plain_server_may_come_later(start, observe, tmp_path):
    server, plain = start("llama.cpp"), start("llama.cpp", has_draft=False)
    observe(server, output_dir=tmp_path)
    observation = observe(server, plain, output_dir=tmp_path)
    assert len(server.requests) == len(plain.requests) == 10 and observation.num_equal_completions == 10


def test_a_folder_of_other_options_is_refused(start, observe, tmp_path, prompts, tokenizer):
    server = start("llama.cpp")
    observe(server, output_dir=tmp_path)
    with pytest.raises(ValueError, match=r"with other options \(max_new_tokens: 12 before, 5 now\)"):
        observe(server, output_dir=tmp_path, max_new_tokens=5)
    with pytest.raises(ValueError, match=r"with other options \(prompts: "):
        observe_serving(
            server.base_url, prompts.select(range(3)), processing_class=tokenizer, output_dir=tmp_path,
            serving_engine="llama.cpp", max_new_tokens=LIMIT, server_kwargs={"backoff": 0.001},
        )  # fmt: skip
    lines = tmp_path / "requests.jsonl"
    lines.write_text(lines.read_text().replace('"row": 3', '"column": 3'))
    with pytest.raises(ValueError, match=r"damaged in line 4 \(KeyError|damaged in line 4 \(TypeError"):
        observe(server, output_dir=tmp_path)
    manifest = tmp_path / ".observation.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 9}))
    with pytest.raises(ValueError, match="has the format 9, but this version reads 1"):
        observe(server, output_dir=tmp_path)


def test_a_password_is_sent_and_shown_nowhere(start, prompts, tokenizer, tmp_path):
    server = start("llama.cpp")
    url = server.base_url.replace("127.0.0.1", "me:pa55word@127.0.0.1").removesuffix("/v1")
    options = {"serving_engine": "llama.cpp", "max_new_tokens": LIMIT, "show_progress": False}
    observe_serving(url, prompts, processing_class=tokenizer, output_dir=tmp_path, **options)
    assert all("Authorization" in headers for headers in server.headers)
    plain = start("llama.cpp", has_draft=False)
    url = plain.base_url.replace("127.0.0.1", "me:pa55word@127.0.0.1")
    with pytest.raises(ValueError) as raised:
        observe_serving(url, prompts, processing_class=tokenizer, **options)
    assert "127.0.0.1" in str(raised.value) and "pa55word" not in str(raised.value)
    assert not any("pa55word" in path.read_text() for path in tmp_path.iterdir())
