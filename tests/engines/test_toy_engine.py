"""The engine of docs/architecture.md, from its class to responses and a report."""

import re
from pathlib import Path

import pytest
import torch
from tiny import build_llama

from spec_kd import evaluate_draft, generate_responses, score_completions
from spec_kd.engines import Engine, UnsupportedByEngineError

PAGE = Path(__file__).parents[2] / "docs/architecture.md"
PROMPTS = ["a cell", "an atom", "a leaf"]


@pytest.fixture
def engine(tokenizer) -> Engine:
    code = re.search(r"```python\n((?:(?!```).)*class DiceEngine.*?)```", PAGE.read_text(encoding="utf-8"), re.S)[1]
    namespace = {}
    exec(compile(code, str(PAGE), "exec"), namespace)
    return namespace["DiceEngine"](tokenizer)


def test_it_writes_responses(engine, tmp_path):
    options = {"max_new_tokens": 5, "temperature": 1.0, "show_progress": False, "output_dir": str(tmp_path)}
    responses = generate_responses(engine, PROMPTS, teacher_signal="token_only", **options)
    assert responses["prompt"][:] == PROMPTS and set(responses["finish_reason"]) == {"length"}
    assert all(len(ids) == 5 and set(ids) <= set(range(10, 16)) for ids in responses["completion_ids"])
    assert '"engine": "dice"' in responses[0]["teacher_info"]
    again = generate_responses(engine, PROMPTS, teacher_signal="token_only", **options)
    assert again.to_list() == responses.to_list()


def test_what_it_does_not_have_is_refused(engine):
    with pytest.raises(UnsupportedByEngineError, match="Dice cannot give 'top_k_tail'"):
        generate_responses(engine, PROMPTS, teacher_signal="top_k_tail", show_progress=False)
    responses = generate_responses(engine, PROMPTS, max_new_tokens=2, show_progress=False)
    with pytest.raises(UnsupportedByEngineError, match="'dice' cannot score completions"):
        score_completions(engine, responses, teacher_signal="token_only", show_progress=False)


def test_an_engine_without_anything_of_its_own(engine):
    class Plain(type(engine)):
        check = Engine.check

    plain = Plain(engine.processing_class)
    assert (plain.target_name, plain.default_batch_size, plain.is_reproducible) == (None, None, False)
    with pytest.raises(UnsupportedByEngineError, match="'dice' gives no log-probabilities, so no 'token_only'"):
        generate_responses(plain, PROMPTS, teacher_signal="token_only", show_progress=False)
    with pytest.raises(UnsupportedByEngineError, match="`top_k=3`"):
        generate_responses(plain, PROMPTS, top_k=3, temperature=1.0, show_progress=False)
    assert len(generate_responses(plain, PROMPTS, max_new_tokens=2, show_progress=False)) == 3


def test_a_class_that_is_no_engine_is_refused_before_any_work(engine):
    class Stranger:
        generate = type(engine).generate

    with pytest.raises(ValueError, match=r"`target` is <.*must be a model, its path or Hub id, or an engine"):
        generate_responses(Stranger(), PROMPTS, processing_class=engine.processing_class)


def test_a_draft_is_evaluated_for_it(engine):
    draft = build_llama(seed=0)
    options = {"max_new_tokens": 5, "temperatures": (1.0,)}
    report = evaluate_draft(draft, engine, PROMPTS, **options, costs=None, show_progress=False)
    responses = generate_responses(
        engine, PROMPTS, max_new_tokens=5, temperature=1.0, teacher_signal="token_only", show_progress=False
    )
    expected = []
    for row in responses:  # min(1, q / p) at each token
        ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
        with torch.no_grad():
            log_q = draft(ids).logits[0, -6:-1].log_softmax(-1).gather(-1, ids[0, -5:, None]).squeeze(-1)
        expected.append((log_q.exp() * 6).clamp(max=1))
    setting = report.drafts[0].settings[0]
    assert setting.alpha_kind == "estimate"
    assert setting.alpha.value == pytest.approx(torch.cat(expected).mean().item(), abs=1e-6)
