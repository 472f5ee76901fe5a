"""Whole jobs over a server that cannot name every token: stopped, or gone on with without those rows."""

import logging
import signal

import forked
import pytest
import torch
from datasets import Dataset
from local_server import TEXTS, build_engine, generate_alone
from tiny import build_llama

from spec_kd.data.responses import generate_responses, score_completions
from spec_kd.engines import ServerEngine, UnidentifiedTokensError

FINISHED = "responses.parquet"

TOP_5 = {"teacher_signal": "top_k_tail", "signal_top_k": 5}
KILLED_RUN = """
import os, signal, sys
from tiny import build_tokenizer
from spec_kd.data import shards
from spec_kd.data.responses import generate_responses
from spec_kd.engines import ServerEngine
replace, count = os.replace, 0
def replace_then_die(source, place):
    global count
    count += 1
    if count == 6:  # manifest, two shards with their sums, then the third
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, place)
shards.os.replace = replace_then_die
generate_responses(
    ServerEngine("tiny", build_tokenizer(), sys.argv[1]), sys.argv[3:], max_new_tokens=12, temperature=0.0,
    on_unidentified_token="drop", batch_size=2, shard_size=2, output_dir=sys.argv[2], show_progress=False,
)
"""


def generate(engine, prompts=TEXTS, **options):
    options = {
        "max_new_tokens": 12, "temperature": 0.0, "batch_size": 2, "shard_size": 2, "show_progress": False, **options
    }  # fmt: skip
    return generate_responses(engine, prompts, **options)


@pytest.fixture
def warnings(caplog):
    """What the data room warned of."""
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records if record.name == "spec_kd.data.outcomes"]


def test_rows_without_ids_are_left_out_and_reported(serve, half_writer, prompts, tmp_path, warnings):
    model, broken = half_writer
    server, engine = serve("strings", model=model)
    dataset = Dataset.from_dict({"prompt": TEXTS, "number": range(len(TEXTS))})
    with pytest.raises(UnidentifiedTokensError, match=r'such as .*`on_unidentified_token="drop"`'):
        generate(engine, dataset, output_dir=tmp_path)
    assert not (tmp_path / FINISHED).exists() and not warnings()

    left = generate(engine, dataset, output_dir=tmp_path, on_unidentified_token="drop")  # goes on with what is there
    kept = [row for row, is_broken in enumerate(broken) if not is_broken]
    assert left["number"][:] == kept and left["prompt"][:] == [TEXTS[row] for row in kept]
    assert left["completion_ids"][:] == [generate_alone(model, prompts[row]) for row in kept]
    (warning,) = warnings()
    lost = [row for row, is_broken in enumerate(broken) if is_broken]
    assert warning.startswith(f"{len(lost)} responses have no exact ids") and "such as '\ufffd'" in warning
    assert f"rows {', '.join(map(str, lost))}. They" in warning
    assert warning.endswith(f"the dataset has {len(kept)} rows for {len(TEXTS)} prompts.")

    num_requests = len(server.requests)
    assert generate(engine, dataset, output_dir=tmp_path, on_unidentified_token="drop").to_list() == left.to_list()
    assert warnings() == [warning] * 2
    with pytest.raises(
        ValueError, match=r"was begun with `on_unidentified_token='drop'`: .*no exact ids.*Repeat the call"
    ):
        generate(engine, dataset, output_dir=tmp_path)
    assert len(server.requests) == num_requests
    assert generate(engine, dataset, on_unidentified_token="drop").to_list() == left.to_list()  # in memory
    with pytest.raises(ValueError, match="is 'ignore', but must be one of raise, drop"):
        generate(engine, dataset, on_unidentified_token="ignore")


def test_a_signal_stays_with_its_rows(serve, half_writer):
    model, broken = half_writer
    of_server = generate(serve("strings", model=model)[1], on_unidentified_token="drop", **TOP_5)
    whole = generate(serve("vllm", model=model)[1], **TOP_5)  # which names every token
    kept = whole.select([row for row, is_broken in enumerate(broken) if not is_broken])
    assert of_server.num_rows >= 1 and of_server.column_names == whole.column_names
    rows = {row["prompt"]: row for row in kept}
    for row in of_server:  # a row less where a likely token has no name of its own
        expected = rows[row["prompt"]]
        assert {**row, "teacher_info": None} == {**expected, "teacher_info": None}


def test_a_run_that_was_killed_has_the_same_rows_and_bytes(serve, half_writer, tmp_path, monkeypatch):
    model, broken = half_writer
    server, engine = serve("strings", model=model)
    uninterrupted = generate(engine, output_dir=tmp_path / "whole", on_unidentified_token="drop")
    assert 0 < uninterrupted.num_rows == len(TEXTS) - sum(broken)
    expected = (tmp_path / "whole" / FINISHED).read_bytes()

    killed = forked.run(KILLED_RUN, server.base_url, tmp_path / "killed", *TEXTS)
    assert killed.returncode == -signal.SIGKILL and not (tmp_path / "killed" / FINISHED).exists()
    num_requests = len(server.requests)
    generate(engine, output_dir=tmp_path / "killed", on_unidentified_token="drop")
    assert len(server.requests) == num_requests + 2  # the shard that was lost
    assert (tmp_path / "killed" / FINISHED).read_bytes() == expected

    answer, calls = ServerEngine.generate, []

    def stop_in_second_batch(self, *arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return answer(self, *arguments)

    monkeypatch.setattr(ServerEngine, "generate", stop_in_second_batch)
    with pytest.raises(KeyboardInterrupt):
        generate(engine, output_dir=tmp_path / "stopped", on_unidentified_token="drop")
    generate(build_engine(server), output_dir=tmp_path / "stopped", on_unidentified_token="drop")
    assert len(calls) == 4 and (tmp_path / "stopped" / FINISHED).read_bytes() == expected


def test_nothing_left_is_an_error(serve, tmp_path):
    padded = build_llama(seed=2, vocab_size=320, tie=False)
    with torch.no_grad():
        padded.lm_head.weight[261:] = 50 * padded.lm_head.weight[261:].sign()
    with pytest.raises(ValueError, match=r"6 responses have no exact ids.*rows 0, 1, 2, 3, 4, 5\. Nothing is left"):
        generate(serve(model=padded)[1], output_dir=tmp_path, on_unidentified_token="drop")
    assert not (tmp_path / FINISHED).exists()


def test_scores_without_names_are_left_out(serve, tmp_path, warnings):
    def merge_names(answer):
        """To one text, two of the most likely tokens of the last completion token share a name."""
        choice = answer["choices"][0]
        if choice["text"].startswith(TEXTS[2]):
            top = choice["logprobs"]["top_logprobs"][-2]
            del top[min(top, key=top.get)]
        return answer

    responses = generate(serve()[1])
    _, engine = serve("strings", edit=merge_names)
    options = {**TOP_5, "batch_size": 2, "shard_size": 2, "show_progress": False}
    with pytest.raises(UnidentifiedTokensError, match=r"\(4 names for 5 tokens\)"):
        score_completions(engine, responses, **options)
    scored = score_completions(engine, responses, on_unidentified_token="drop", output_dir=tmp_path, **options)
    assert scored["prompt"][:] == [text for text in TEXTS if text != TEXTS[2]]
    assert len(warnings()) == 1 and "1 responses have no exact ids" in warnings()[0] and "rows 2." in warnings()[0]
    again = score_completions(engine, responses, on_unidentified_token="drop", output_dir=tmp_path, **options)
    assert again.to_list() == scored.to_list()
