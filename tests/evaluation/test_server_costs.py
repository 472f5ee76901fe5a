"""Costs of a server whose times are made up; `tests/benchmarks/test_serving_on_server.py` times a real one."""

import json
import sys
from pathlib import Path

import fake_llama_server as fake
import pytest

from spec_kd.evaluation import (
    Observation,
    ObservedRequest,
    ServingCosts,
    measure_server_costs,
    measure_synthetic_speed,
    read_costs,
    write_costs,
)
from spec_kd.evaluation.cost import MeasurementError
from spec_kd.evaluation.server_costs import read_observed_costs
from spec_kd.evaluation.server_timing import RECORD
from spec_kd.serving.llama_server import LlamaServerError
from spec_kd.serving.observer import DraftCounts

FAST = {"num_rounds": 4, "repeats": 1, "keep_servers": False, "show_progress": False}


@pytest.fixture
def program(tmp_path):
    """The fake server as a program."""
    path = tmp_path / "bin" / "llama-server"
    path.parent.mkdir()
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "{fake.__file__}" "$@"\n')
    path.chmod(0o755)
    return path


@pytest.fixture
def pair(tmp_path):
    """GGUF files of draft and target that nobody reads."""
    paths = [tmp_path / name for name in ("draft.gguf", "target.gguf")]
    for path in paths:
        path.write_bytes(b"GGUF")
    return paths


@pytest.fixture
def set_traits(monkeypatch):
    return lambda **traits: monkeypatch.setenv("FAKE_LLAMA_SERVER", json.dumps(traits))


def get_true_cost(gamma):
    return fake.ROUND[gamma] + fake.ACCEPTED * gamma / 2


def test_costs_of_a_server_are_found_again(program, pair):
    [costs] = measure_server_costs(*pair, server=str(program), gammas=(1, 3, 6), **FAST)
    assert costs.batch_size == 1 and costs.target_step_seconds == pytest.approx(fake.STEP / 1000)
    for gamma in (1, 3, 6):
        assert costs.round_cost[gamma] == pytest.approx(get_true_cost(gamma))
        ends = [fake.ROUND[gamma], fake.ROUND[gamma] + fake.ACCEPTED * gamma]
        assert costs.round_cost_range[gamma] == pytest.approx(ends)
    assert costs.predict_speedup(2.5, 3) == pytest.approx(2.5 / get_true_cost(3))


def test_the_draft_alone_is_timed_too(program, pair, set_traits, tmp_path):
    starts = tmp_path / "starts"
    set_traits(starts=str(starts))
    options = {"server": str(program), "gammas": (1, 3), "output_dir": tmp_path / "out", **FAST}
    [costs] = measure_server_costs(*pair, measure_draft_step=True, **options)
    assert costs.cost_ratio == pytest.approx(fake.DRAFT_STEP)
    assert costs.round_cost == pytest.approx({gamma: get_true_cost(gamma) for gamma in (1, 3)})
    assert costs.verify(3) == pytest.approx(get_true_cost(3) - 3 * fake.DRAFT_STEP)
    assert costs.predict_speedup(2.5, 3) == pytest.approx(2.5 / get_true_cost(3))
    assert starts.read_text().count("start") == 6
    [without] = measure_server_costs(*pair, **options)  # the timings are there already
    assert (without.cost_ratio, without.round_cost) == (None, costs.round_cost)
    assert starts.read_text().count("start") == 6


def test_requests_at_a_time(program, pair):
    costs = measure_server_costs(*pair, server=str(program), gammas=(2,), batch_sizes=[1, 3], **FAST)
    assert [one.batch_size for one in costs] == [1, 3]
    steps = [one.target_step_seconds * 1000 / fake.STEP for one in costs]
    assert steps == pytest.approx([1, 1 + 2 * fake.SLOWER])
    assert [one.round_cost[2] for one in costs] == pytest.approx([get_true_cost(2)] * 2)


def test_a_machine_that_changes_its_pace_is_seen_through(program, pair, set_traits, tmp_path):
    """Settings are compared within a repetition; in one of three somebody else was busy."""
    slow_repetition, one_slow_setting = [4.0] * 3, [1.0, 3.0, 1.0]
    set_traits(paces=[*slow_repetition, *one_slow_setting, 2.0, 2.0, 2.0], starts=str(tmp_path / "starts"))
    [costs] = measure_server_costs(*pair, server=str(program), gammas=(2,), **{**FAST, "repeats": 3})
    assert costs.round_cost[2] == pytest.approx(get_true_cost(2))
    assert costs.target_step_seconds == pytest.approx(2 * fake.STEP / 1000)
    assert costs.round_cost_range[2] == pytest.approx([fake.ROUND[2], 3 * fake.ROUND[2]])


def test_all_servers_run_until_the_end_and_take_turns(program, pair, set_traits, tmp_path):
    starts = tmp_path / "starts"
    set_traits(starts=str(starts))
    options = {**FAST, "repeats": 3, "keep_servers": True}
    [costs] = measure_server_costs(*pair, server=str(program), gammas=(2,), **options)
    assert starts.read_text().count("start") == 3
    assert costs.round_cost[2] == pytest.approx(get_true_cost(2))


def test_a_killed_measurement_continues(program, pair, set_traits, tmp_path):
    starts = tmp_path / "starts"
    options = {"server": str(program), "gammas": (2, 4), "output_dir": tmp_path / "out", **FAST}
    set_traits(starts=str(starts))
    whole = measure_server_costs(*pair, **options)
    assert starts.read_text().count("start") == 5
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    del record["seconds"]["1,1,1,1 #1"]
    (tmp_path / "out" / RECORD).write_text(json.dumps(record))
    assert measure_server_costs(*pair, **options) == whole
    assert starts.read_text().count("start") == 6
    with pytest.raises(ValueError, match="holds timings with other num_rounds"):
        measure_server_costs(*pair, **{**options, "num_rounds": 5})
    # more repetitions are the same measurement, continued
    measure_server_costs(*pair, **{**options, "repeats": 2})
    assert starts.read_text().count("start") == 11


def test_speed_at_given_acceptance_rates(program, pair):
    options = {**FAST, "num_rounds": 400, "server": str(program)}
    [speed] = measure_synthetic_speed(*pair, [0.8, 0.5, 0.1], **options)
    round_cost = fake.ROUND[3] + 1.4 * fake.ACCEPTED
    assert speed.speedup == pytest.approx(2.4 / round_cost, rel=1e-2)  # the rounds accept by chance
    assert speed.plain_tokens_per_second == pytest.approx(1000 / fake.STEP)
    assert speed.tokens_per_second == pytest.approx(speed.speedup * speed.plain_tokens_per_second)
    assert speed.speedup_range == [speed.speedup] * 2


@pytest.mark.parametrize("rates", [[], [0.5, 0.6], [1.2], [0.5, -0.1], [float("nan")]])
def test_rates_that_cannot_be_are_refused(program, pair, rates):
    with pytest.raises(ValueError, match=r"`acceptance_rates` is .* none higher than the one before it"):
        measure_synthetic_speed(*pair, rates, server=str(program))


@pytest.mark.parametrize(
    ("traits", "flags", "error", "message"),
    [
        ({"lacks": "--spec-synth-rates"}, "", ValueError, "has no --spec-synth-rates"),
        ({}, "--flash", LlamaServerError, "did not start.*invalid argument: --flash"),
        ({"dies": True}, "", LlamaServerError, r"ended with status 134 during a request.*GGML_ASSERT\(false\)"),
        ({"drafts": 0.5}, "", MeasurementError, "--spec-draft-p-min"),
        ({"silent": True}, "", MeasurementError, "has no `timings`"),
        ({"paces": [1.0, 0.0], "starts": "STARTS"}, "", MeasurementError, "took no longer than one of"),
        ({}, "'", ValueError, "`server_flags` is .* which no shell could read"),
    ],
)
def test_a_server_that_cannot_be_timed(program, pair, set_traits, tmp_path, traits, flags, error, message):
    set_traits(**{name: str(tmp_path / "starts") if value == "STARTS" else value for name, value in traits.items()})
    with pytest.raises(error, match=f"(?s){message}"):
        measure_server_costs(*pair, server=str(program), server_flags=flags, gammas=(2,), **FAST)


def test_files_that_are_not_there(program, pair):
    with pytest.raises(FileNotFoundError, match="`nowhere/llama-server` is no program"):
        measure_server_costs(*pair, server="nowhere/llama-server")
    with pytest.raises(FileNotFoundError, match=r"`draft` is `nothing\.gguf`, which is no file"):
        measure_server_costs("nothing.gguf", pair[1], server=str(program))


def test_no_server_is_left_behind(program, pair, tmp_path):
    logs = tmp_path / "out"
    measure_server_costs(*pair, server=str(program), gammas=(1,), output_dir=logs, **FAST)
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not any(str(pair[1]).encode() in command for command in commands)
    assert {path.name for path in logs.glob("*.log")} == {
        f"llama-server-{setting}.log" for setting in ("plain", "1-0", "1-1")
    }


def test_costs_as_a_file(tmp_path):
    whole = ServingCosts(
        round_cost={1: 1.5, 4: 2.75}, round_cost_range={1: [1.4, 1.6], 4: [2.5, 3.0]}, target_step_seconds=0.02
    )
    parts = ServingCosts(cost_ratio=0.1, verify_cost={4: 1.4}, round_overhead=0.1, batch_size=8)
    both = ServingCosts(cost_ratio=0.1, round_cost={2: 1.5})
    write_costs([whole, parts, both], tmp_path / "costs.json")
    assert read_costs(tmp_path / "costs.json") == [whole, parts, both]
    assert whole.find_round_cost(4) == 2.75 and whole.find_round_cost(2) == pytest.approx(1.5 + 1.25 / 3)
    assert parts.find_round_cost(4) == pytest.approx(0.4 + 1.4 + 0.1)
    assert whole.verify(4) is None and whole.max_gamma == 4


def observe_made_up(gamma, num_plain=3, tells_rounds=True, seconds=0.02):
    """Three prompts whose rounds take 2.5 steps, on a machine that gets slower from prompt to prompt."""
    requests, plain = [], []
    for row, (length, accepted) in enumerate(((31, 20), (21, 5), (1, 0))):
        rounds, step = length - 1 - accepted, seconds and seconds * (1 + row)
        counts = DraftCounts(rounds * 3, accepted, rounds if tells_rounds else None)
        common = {"row": row, "completion_ids": [7] * length, "finish_reason": "length", "request_seconds": 9.0}
        requests.append(ObservedRequest(**common, decoding_seconds=step and 2.5 * rounds * step, counts=counts))
        plain.append(ObservedRequest(**common, decoding_seconds=step and (length - 1) * step))
    return Observation(
        serving_engine="vllm", model="target", temperature=0.0, max_new_tokens=31, concurrency=4,
        num_assistant_tokens=gamma, prompt_ids=[[1]] * 3, requests=requests, plain_requests=plain[:num_plain],
    )  # fmt: skip


@pytest.mark.parametrize("tells_rounds", [True, False])
def test_costs_of_observed_requests(tells_rounds):
    costs = read_observed_costs(observe_made_up(3, tells_rounds=tells_rounds))
    assert costs.round_cost == {3: pytest.approx(2.5)} and costs.round_cost_range == {3: pytest.approx([2.5, 2.5])}
    assert costs.batch_size == 4 and costs.target_step_seconds == pytest.approx(0.03)
    assert costs.source == "2 requests to vLLM, with and without the draft"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_plain": 0}, "Observe it with `plain_url` too"),
        ({"seconds": None}, "--enable-per-request-metrics"),
        ({"gamma": None}, "`num_assistant_tokens`"),
    ],
)
def test_observed_requests_that_tell_too_little(options, message):
    with pytest.raises(ValueError, match=message):
        read_observed_costs(observe_made_up(**{"gamma": 3, **options}))
