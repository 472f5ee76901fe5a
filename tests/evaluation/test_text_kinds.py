"""Metrics without looping completions and without untemplated prompts are those of the other responses alone."""

import math

import numpy as np
import pytest
import torch
from chat_templates import FORMS
from tiny import build_tokenizer

from spec_kd import ServingCosts, SpeculativeEvalCallback, evaluate_draft, generate_assisted, replay
from spec_kd.data.prompt_rendering import render_prompt_ids
from spec_kd.end_of_turn import find_template_marks
from spec_kd.evaluation import response_replay
from spec_kd.evaluation.lookup_replay import replay_lookup
from spec_kd.evaluation.report import tables
from spec_kd.evaluation.text_kinds import EITHER, LOOPING, UNTEMPLATED, find_kinds

CONVERSATIONS = [
    [{"role": "user", "content": "Hi"}],
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "How are you?"},
    ],
]
LLAMA_2 = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }} </s>"
    "{% endif %}{% endfor %}"
)


def find_untemplated(tokenizer, texts):
    prompts = [
        *render_prompt_ids([{"prompt": one} for one in CONVERSATIONS], tokenizer),
        *tokenizer(texts)["input_ids"],
    ]
    return find_kinds(prompts, [[1]] * len(prompts), tokenizer)[UNTEMPLATED].tolist()


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_templates_are_told_from_plain_text(form):
    texts = ["Hi", "User: Hi\nAssistant:", "Tell me  about\n\n</b> and <think>."]
    assert find_untemplated(form.build(), texts) == [False] * 2 + [True] * 3


def test_a_bos_of_every_text_is_no_mark():
    from tokenizers.processors import TemplateProcessing

    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": ["</s>"]})
    single, ids = "<s> $A", [("<s>", tokenizer.convert_tokens_to_ids("<s>"))]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=ids)
    tokenizer.chat_template = LLAMA_2
    assert tokenizer("")["input_ids"] == [tokenizer.bos_token_id]
    assert find_template_marks(tokenizer) == ["[/INST]"]
    assert find_untemplated(tokenizer, ["Hi", "Use [INST]."]) == [False, False, True, True]


@pytest.mark.parametrize("template", [None, "{{ messages[0].content }}", "{{ raise_exception('no') }}"])
def test_without_a_template_of_its_own_nothing_is_said_of_prompts(template):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    assert find_template_marks(tokenizer) == []
    assert list(find_kinds([[7]], [[8]], tokenizer)) == [LOOPING] == list(find_kinds([[7]], [[8]]))


@pytest.fixture
def rows(target, tokenizer):
    """Twelve responses: four loop, four prompts lack the template, one of them both."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(12):
        text = "".join(chr(97 + int(n)) for n in torch.randint(0, 26, (5,), generator=generator))
        prompt = next(render_prompt_ids([{"prompt": [{"role": "user", "content": text}]}], tokenizer))
        completion = torch.randint(5, 261, (30 + i,), generator=generator).tolist()
        if i % 3 == 0:
            completion[4:] = (completion[4 : 5 + i // 3] * 30)[: len(completion) - 4]
        rows.append(
            {"prompt_ids": tokenizer(text)["input_ids"] if i in (1, 4, 5, 6) else prompt}
            | {"completion_ids": completion}
        )
    return rows


IS_LOOPING = np.arange(12) % 3 == 0
IS_UNTEMPLATED = np.isin(np.arange(12), (1, 4, 5, 6))
WITHOUT = {LOOPING: IS_LOOPING, UNTEMPLATED: IS_UNTEMPLATED, EITHER: IS_LOOPING | IS_UNTEMPLATED}


def test_metrics_without_are_those_of_the_others_alone(pair, rows, tokenizer):
    draft, target = pair
    options = {"temperature": 1.0, "max_new_tokens": 48, "show_progress": False}
    whole = replay(draft, target, rows, processing_class=tokenizer, **options)
    assert {kind: mask.tolist() for kind, mask in whole.kinds.items()} == {k: m.tolist() for k, m in WITHOUT.items()}
    logged = whole.to_metrics("eval", "_t1")
    for one in whole.left_out:
        mask = WITHOUT[one.kind]
        alone = replay(draft, target, [row for row, out in zip(rows, mask, strict=True) if not out], **options)
        alpha, efficiency = one.metrics
        assert (alpha.name, efficiency.name) == ("alpha", "block_efficiency")
        assert (one.responses, one.share) == (mask.sum(), mask.mean())
        assert alpha.of_all == whole.alpha and efficiency.of_all == whole.block_efficiency
        assert alpha.without == pytest.approx(alone.alpha) and alpha.without.value != pytest.approx(whole.alpha.value)
        assert efficiency.without == pytest.approx(alone.block_efficiency)
        assert logged[f"eval_share_{one.kind}_t1"] == mask.mean()
        assert logged[f"eval_alpha_without_{one.kind}_t1"] == alpha.without.value
        assert logged[f"eval_block_efficiency_without_{one.kind}_t1"] == efficiency.without.value
        chosen = whole.select(~mask)
        assert chosen.acceptance_rate_per_position[4] == pytest.approx(alone.acceptance_rate_per_position[4])
        assert chosen.kinds.keys() == whole.kinds.keys() and not chosen.kinds[one.kind].any()


def test_where_none_or_all_are_of_a_kind(pair, rows, tokenizer):
    draft, target = pair
    options = {"temperature": 1.0, "max_new_tokens": 48, "show_progress": False, "processing_class": tokenizer}
    looping = [row for row, is_looping in zip(rows, IS_LOOPING & ~IS_UNTEMPLATED, strict=True) if is_looping]
    of_loops, of_prompts = replay(draft, target, looping, **options).left_out
    assert of_loops.share == 1 and [metric.without for metric in of_loops.metrics] == [None, None]
    assert of_prompts.share == 0 and all(metric.without == metric.of_all for metric in of_prompts.metrics)
    logged = replay(draft, target, looping, **options).to_metrics()
    assert logged["eval_share_looping"] == 1 and logged["eval_share_untemplated"] == 0
    assert not any("without" in name for name in logged)


def test_lookups_and_assisted_generation_find_loops_too(pair, rows):
    metrics = replay_lookup(rows, max_new_tokens=48, temperature=0.0)
    assert metrics.kinds[LOOPING].tolist() == IS_LOOPING.tolist()
    (left_out,) = metrics.left_out
    assert [metric.name for metric in left_out.metrics] == ["block_efficiency"]  # lookups have no alpha
    assert left_out.metrics[0].without.value < left_out.metrics[0].of_all.value
    draft, target = pair
    assisted = generate_assisted(target, draft, [rows[0]["prompt_ids"], rows[1]["prompt_ids"]], max_new_tokens=40)
    assert assisted.kinds[LOOPING].shape == (2,) and len(assisted.select(np.array([True, False])).tokens) == 1


def test_the_report_shows_both(pair, tokenizer):
    draft, target = pair
    prompts = [[{"role": "user", "content": text}] for text in ("Hi", "Ho")]
    common = {"processing_class": tokenizer, "temperatures": [0.0], "max_new_tokens": 40, "costs": "none"}
    options = {"gammas": [5], "show_progress": False, **common}
    report = evaluate_draft(draft, target, prompts, **options)
    of_loops, of_prompts = report.draft.settings[0].left_out
    assert (of_loops.kind, of_prompts.kind, of_prompts.responses) == (LOOPING, UNTEMPLATED, 0)
    plain = evaluate_draft(draft, target, ["Hi", "Ho"], **options)
    of_prompts = plain.draft.settings[0].left_out[1]
    assert of_prompts.share == 1 and of_prompts.metrics[0].without is None
    table = tables.tabulate_left_out(plain)
    cells = dict(zip(table.header, table.rows[1], strict=True))
    assert cells["left out"] == "prompts without the chat template" and cells["share"] == "100.0%"
    assert cells["alpha without them"] == cells["block efficiency without them"] == "–" != cells["alpha"]
    assert type(plain).from_json(plain.to_json()).draft.settings[0].left_out[1] == of_prompts


def test_every_number_of_drafted_tokens_is_also_reported_without_them(pair, tokenizer, monkeypatch):
    """The first of three prompts counts as looping: the others alone give the same."""
    draft, target = pair
    prompts = [[{"role": "user", "content": text}] for text in ("Hi", "Ho", "Who?")]
    costs = [ServingCosts(cost_ratio=0.1, verify_cost={1: 1.2, 3: 1.5})]
    common = {"processing_class": tokenizer, "temperatures": [0.0], "max_new_tokens": 40, "costs": costs}
    options = {"gammas": [1, 3], "num_assistant_tokens": 3, "show_progress": False, **common}

    def find(prompts, completions, processing_class=None):
        return {LOOPING: np.arange(len(prompts)) == 3 - len(prompts)}

    monkeypatch.setattr(response_replay, "find_kinds", find)
    (whole,) = evaluate_draft(draft, target, prompts, **options).draft.settings
    monkeypatch.setattr(response_replay, "find_kinds", lambda *_: {LOOPING: np.zeros(2, dtype=bool)})
    report = evaluate_draft(draft, target, prompts[1:], **options)
    (others,) = report.draft.settings
    for gamma in (1, 3):
        assert repr(whole.at_gamma(gamma).without[LOOPING]) == repr(others.at_gamma(gamma))  # NaN equals NaN in text
        assert others.at_gamma(gamma).without == {} and "1" in others.at_gamma(gamma).predicted_speedup
    found = type(report).from_json(report.to_json()).expect(1)["greedy"]
    assert found["left_out"] == {LOOPING: 0.0} and found["without"] == {}


def test_the_callback_tells_loops_and_prompts(pair, tokenizer):
    draft, target = pair
    callback = SpeculativeEvalCallback(
        ["Hi", "Ho"], target, temperatures=[0.0], max_new_tokens=40, processing_class=tokenizer
    )
    metrics = callback._measure(draft, target, 0.0)
    assert metrics.kinds[UNTEMPLATED].all()
    assert metrics.to_metrics()["eval_share_untemplated"] == 1 and not math.isnan(
        metrics.to_metrics()["eval_share_looping"]
    )
