"""A server that fails again and again loses no completion and doubles none."""

from collections import deque

import pytest
from campaign_table import Table
from local_server import FAULTS, STRAY, SURPLUS, LocalServer, build_engine
from tiny import build_llama, build_tokenizer

from spec_kd import generate_responses
from spec_kd.engines.server.client import ServerRequestError

GENERATE, RESUME, MANY = "retries in one run", "runs that fail and go on", "2,000 requests"
ALL = "all faults in turn"
ROWS = {**{fault: [fault] for fault in (*FAULTS, *SURPLUS, *STRAY)}, ALL: [*FAULTS, *SURPLUS]}
ONE_IS_ENOUGH = {MANY: "the faults in turn cover it"}
NONE_FAILS = {RESUME: "no request fails"}
NOT_RETRIED = {GENERATE: "the job ends at once"}
TABLE = Table(
    "faulty_server",
    ROWS,
    columns=(GENERATE, RESUME, MANY),
    missing={fault: ONE_IS_ENOUGH for fault in FAULTS}
    | {name: ONE_IS_ENOUGH | NONE_FAILS for name in SURPLUS}
    | {name: ONE_IS_ENOUGH | NOT_RETRIED for name in STRAY},
)
NUM_PROMPTS = {GENERATE: 24, RESUME: 24, MANY: 1_600}
FAULT_EVERY = {GENERATE: 3, RESUME: 7, MANY: 4}  # requests
OPTIONS = {
    "max_new_tokens": 2, "temperature": 0.0, "teacher_signal": "token_only", "shard_size": 4, "show_progress": False,
}  # fmt: skip
MOST_RUNS = 60


@pytest.fixture(scope="module")
def model():
    return build_llama(seed=1, layers=1)


def run_until_done(engine, prompts, folder) -> tuple[list[dict], int]:
    """The rows, and how many runs it took."""
    for runs in range(1, MOST_RUNS):
        try:
            return generate_responses(engine, prompts, output_dir=str(folder), **OPTIONS).to_list(), runs
        except ServerRequestError:
            continue
    raise AssertionError(f"{MOST_RUNS} runs did not end")


def test_cell(cell, outcome, model, tmp_path):
    prompts = [f"{i} or {i * 7 % 31}?" for i in range(NUM_PROMPTS[cell.column])]
    with LocalServer(model, build_tokenizer()) as server:
        expected, _ = run_until_done(build_engine(server), prompts, tmp_path / "undisturbed")
    faults, every = TABLE[cell], FAULT_EVERY[cell.column]
    with LocalServer(model, build_tokenizer()) as server:
        planned = [faults[i // every % len(faults)] if i % every == every - 1 else None for i in range(every * 600)]
        server.faults = deque(planned)
        retries = 0 if cell.column == RESUME else 8
        engine = build_engine(server, max_retries=retries, max_concurrency=4, timeout=0.5)
        found, runs = run_until_done(engine, prompts, tmp_path / "faulty")
        num_requests, num_faults = len(server.requests), sum(f is not None for f in planned[: len(server.requests)])
    assert found == expected and len(found) == len(prompts)
    assert num_faults > 0
    assert runs > 1 if cell.column == RESUME else runs == 1
    assert num_requests >= (2_000 if cell.column == MANY else len(prompts))
    assert num_requests <= len(prompts) * 2 + runs * 8  # a shard is asked for again, finished ones are not
    outcome.note(f"{num_requests} requests, {num_faults} of them failed, {runs} runs")
