"""A server that refuses some prompts: they are named by their row, the others are answered and kept."""

import logging
import re

import pytest
from datasets import Dataset
from local_server import TEXTS, TOKEN_ONLY, send_json

from spec_kd.data.responses import generate_responses, score_completions
from spec_kd.engines import UnusablePromptError
from spec_kd.engines.base import MissingCompletionsError
from spec_kd.engines.server.client import ServerRequestError
from spec_kd.sampling.options import SamplingOptions
from spec_kd.sampling.prompts import PromptBatch

PROMPTS = [f"{text} {i}" for i in range(4) for text in TEXTS[:5]]  # 20
TOO_LONG = "This model's maximum context length is 16 tokens."


def generate(engine, prompts=PROMPTS, **options):
    options = {
        "max_new_tokens": 6, "temperature": 0.0, "batch_size": 4, "shard_size": 8, "show_progress": False, **options
    }  # fmt: skip
    return generate_responses(engine, prompts, **options)


@pytest.fixture
def refusing(serve, tokenizer):
    """A server that refuses the prompts of some rows, with its engine."""

    def start(rows, message=TOO_LONG, status=400, **engine_options):
        server, engine = serve(engine_options=engine_options)
        refused = [tokenizer(PROMPTS[row])["input_ids"] for row in rows]
        answer = server._answer
        server.traits["refused"] = refused

        def refuse(body):
            if any(body["prompt"][: len(ids)] == ids for ids in server.traits["refused"]):
                return status, {"error": {"message": message}}
            return answer(body)

        server._answer = refuse
        return server, engine

    return start


@pytest.mark.parametrize("message", [TOO_LONG, "the content policy forbids this"])
def test_a_refused_row_is_named_and_the_others_are_kept(refusing, tmp_path, message, caplog):
    caplog.set_level(logging.WARNING)
    server, engine = refusing([13], message)
    with pytest.raises(UnusablePromptError, match=r"1 of 20 prompts.*row 13: .*status 400.*kept in") as raised:
        generate(engine, output_dir=tmp_path)
    assert message in str(raised.value) and 'on_unusable_prompt="skip"' in str(raised.value)
    assert len(server.requests) == 20
    with pytest.raises((UnusablePromptError, ServerRequestError), match=r"(?i)row 13"):
        generate(engine, output_dir=tmp_path)
    assert len(server.requests) == 21  # the others were not asked again
    rows = generate(engine, output_dir=tmp_path, on_unusable_prompt="skip")
    assert len(rows) == 19 and PROMPTS[13] not in rows["prompt"][:] and "1 of 20 prompts" in caplog.text
    assert len(server.requests) == 21  # what was refused is remembered
    server.traits["refused"] = []
    assert len(generate(engine, output_dir=tmp_path)) == 20 and len(server.requests) == 22
    assert rows.to_list() == [row for row in generate(engine, output_dir=tmp_path) if row["prompt"] != PROMPTS[13]]


def test_several_rows_and_a_signal(refusing, tmp_path):
    _, engine = refusing([2, 3, 17], status=413)
    rows = generate(engine, output_dir=tmp_path, on_unusable_prompt="skip", teacher_signal="token_only")
    assert rows["prompt"][:] == [text for i, text in enumerate(PROMPTS) if i not in (2, 3, 17)]
    assert all(len(row["completion_ids"]) == len(row["teacher_token_logprobs"]) for row in rows)
    scored = score_completions(
        refusing([5])[1], Dataset.from_list(rows.to_list()), batch_size=4, on_unusable_prompt="skip",
        teacher_signal="token_only", show_progress=False,
    )  # fmt: skip
    assert PROMPTS[5] not in scored["prompt"][:] and len(scored) == 16


def test_a_form_that_the_server_refuses_stops_at_once(refusing):
    server, engine = refusing(range(20), "unknown field: return_token_ids", max_concurrency=3)
    with pytest.raises(ServerRequestError, match=r"status 400.*\nThe request has these fields"):
        generate(engine, batch_size=20)
    assert len(server.requests) <= 3


def test_a_batch_has_the_answers_to_the_others(refusing, prompts):
    _, engine = refusing([0])
    asked = PromptBatch([*prompts[1:3], engine.processing_class(PROMPTS[0])["input_ids"]], [40, 50, 60])
    with pytest.raises(MissingCompletionsError, match=r"^Row 60: the server answered") as raised:
        engine.generate(asked, SamplingOptions(4, 0.0), TOKEN_ONLY)
    assert [c is None for c in raised.value.completions] == [False, False, True] and list(raised.value.reasons) == [2]
    assert isinstance(raised.value, ServerRequestError) and raised.value.status_code == 400


def test_other_failures_name_the_row_too(serve, caplog):
    caplog.set_level(logging.WARNING)
    server, engine = serve(engine_options={"max_retries": 1, "max_concurrency": 1})
    server.faults.extend([lambda handler: send_json(handler, {}, 500)] * 2)
    with pytest.raises(ServerRequestError, match=r"^Row \d+: no usable answer in 2 attempts") as raised:
        generate(engine, ["a", "a longer prompt", "b"], batch_size=3)
    assert str(raised.value).startswith("Row 1:")  # the longest is asked first
    assert any(re.match("Row 1: ", record.getMessage()) for record in caplog.records)
