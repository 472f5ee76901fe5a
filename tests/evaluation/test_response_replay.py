import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from spec_kd.evaluation import response_scoring
from spec_kd.evaluation.response_replay import replay, score_responses
from spec_kd.evaluation.response_scoring import ResponseScorer
from spec_kd.finite import NonFiniteError


def compute_reference(draft, target, rows, temperature, draft_sampling, vocab_size=261):
    """a_i and alpha of every token, from full float64 logits of each text on its own."""
    expected = []
    for row in rows:
        ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
        start = len(row["prompt_ids"]) - 1
        with torch.no_grad():
            q, p = (m(input_ids=ids).logits[0, start:-1, :vocab_size].double() for m in (draft, target))
        tokens = ids[0, start + 1 :]
        choice = q.argmax(-1)
        if temperature == 0:
            a = alpha = (choice == tokens).double()
        else:
            p, q = (p / temperature).softmax(-1), (q / temperature).softmax(-1)
            row_index = torch.arange(len(tokens))
            if draft_sampling == "greedy":
                a, alpha = (choice == tokens).double(), p[row_index, choice]
            else:
                a = (q / p)[row_index, tokens].clamp(max=1)
                alpha = torch.minimum(p, q).sum(-1)
        expected.append((a, alpha.sum()))
    return expected


@pytest.mark.parametrize(
    ("temperature", "draft_sampling"),
    [(0.0, "stochastic"), (0.7, "stochastic"), (1.0, "stochastic"), (0.7, "greedy"), (0.0, "greedy")],
)
def test_scores_equal_a_dense_reference(pair, prompts, tools, temperature, draft_sampling, monkeypatch):
    monkeypatch.setattr(response_scoring, "MAX_LOGITS", 261 * 7)  # several uneven chunks
    draft, target = pair
    rows = tools.write_texts(target, prompts, 10, temperature, eos_token_id=None)
    rows[2]["completion_ids"] = rows[2]["completion_ids"][:3]
    scores = score_responses(draft, target, rows, temperature=temperature, draft_sampling=draft_sampling, batch_size=5)
    assert scores.lengths.tolist() == [len(row["completion_ids"]) for row in rows]
    expected = compute_reference(draft, target, rows, temperature, draft_sampling)
    for i, (a, alpha_sum) in enumerate(expected):
        torch.testing.assert_close(scores.acceptance[i, : len(a)], a, atol=1e-5, rtol=0)
        assert (scores.acceptance[i, len(a) :] == 0).all()
        assert scores.alpha_sum[i].item() == pytest.approx(alpha_sum.item(), abs=1e-4)


def test_one_pass_serves_every_number_of_drafted_tokens(pair, prompts, tools):
    draft, target = pair
    rows = Dataset.from_list(tools.write_texts(target, prompts, 12))
    scores = score_responses(draft, target, rows, temperature=0.0)
    for gamma in (1, 3, 7):
        once = scores.replay(gamma, max_new_tokens=12)
        again = replay(draft, None, rows, num_assistant_tokens=gamma, max_new_tokens=12, temperature=0.0)
        assert once.to_metrics() == again.to_metrics()
        assert len(once.acceptance_rate_per_position) == gamma
    assert 1 < once.block_efficiency.value < 8


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_equal_to_its_target_has_everything_accepted(target, prompts, tools, temperature):
    greedy = tools.write_texts(target, prompts, 12, temperature)
    rows = tools.write_texts(target, prompts, 12, temperature, eos_token_id=greedy[0]["completion_ids"][3])
    assert len(rows[0]["completion_ids"]) <= 4  # ends with an EOS
    figures = replay(
        copy.deepcopy(target), target, rows, temperature=temperature, num_assistant_tokens=3, max_new_tokens=12
    )
    assert figures.alpha.value == pytest.approx(1, abs=1e-5)
    assert figures.acceptance_rate.value == pytest.approx(1, abs=1e-5)
    assert figures.accepted == pytest.approx(figures.drafted, abs=1e-4)


@pytest.mark.parametrize(("draft_rows", "target_rows"), [(261, 280), (280, 261), (272, 280)])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_padded_rows_do_not_count(pair, prompts, tools, draft_rows, target_rows, temperature):
    draft, target = pair
    rows = tools.write_texts(target, prompts, 8, temperature)
    options = {"temperature": temperature, "num_assistant_tokens": 3, "max_new_tokens": 8}
    expected = replay(draft, target, rows, **options).to_metrics()
    draft, target = tools.with_padding_rows(draft, draft_rows), tools.with_padding_rows(target, target_rows)
    assert replay(draft, target, rows, vocab_size=261, **options).to_metrics() == pytest.approx(expected, abs=1e-5)
    if min(draft_rows, target_rows) == 261:  # the default: rows that both have
        assert replay(draft, target, rows, **options).to_metrics() == pytest.approx(expected, abs=1e-5)
    else:
        assert replay(draft, target, rows, **options).to_metrics() != pytest.approx(expected, abs=1e-3)


def test_peft_draft_counts_its_adapter(pair, prompts, tools):
    draft, target = pair
    rows = tools.write_texts(target, prompts, 8)
    before = replay(draft, target, rows, max_new_tokens=8, temperature=0.0).alpha.value
    draft = get_peft_model(draft, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    with_adapter = replay(draft, target, rows, max_new_tokens=8, temperature=0.0).alpha.value
    assert with_adapter != before
    assert replay(draft.merge_and_unload(), target, rows, max_new_tokens=8, temperature=0.0).alpha.value == with_adapter


def test_modes_are_restored_also_after_an_error(pair, prompts, tools, monkeypatch):
    draft, target = pair
    rows = tools.write_texts(target, prompts[:3], 4, 1.0)
    draft.train()
    draft.model.layers[0].eval()
    before = tools.snapshot(draft, target)
    replay(draft, target, rows, temperature=1.0, max_new_tokens=4)
    assert tools.snapshot(draft, target) == before

    def fail(*_):
        assert not draft.training and not torch.is_grad_enabled()
        raise RuntimeError("inside")

    monkeypatch.setattr(response_scoring, "score_from_target", fail)
    with pytest.raises(RuntimeError, match="inside"):
        replay(draft, target, rows, temperature=1.0, max_new_tokens=4)
    assert tools.snapshot(draft, target) == before and torch.is_grad_enabled()


def test_dropout_of_a_model_in_training_does_not_count(pair, prompts, tools):
    draft, target = pair
    rows = tools.write_texts(target, prompts, 8)
    expected = replay(draft, target, rows, max_new_tokens=8, temperature=0.0).to_metrics()
    for layer in draft.model.layers:
        layer.self_attn.attention_dropout = 0.9
    draft.train()
    assert replay(draft, target, rows, max_new_tokens=8, temperature=0.0).to_metrics() == expected


def test_the_temperature_of_the_responses_must_be_said(pair):
    with pytest.raises(TypeError, match="`temperature` is missing: Temperature that the responses were sampled at"):
        replay(*pair, [ROW], max_new_tokens=4)


ROW = {"prompt_ids": [5], "completion_ids": [6, 7]}


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "no responses to replay"),
        ([ROW, {"prompt_ids": [5], "completion_ids": []}], {}, "completion of row 1 has no tokens"),
        ([{"prompt_ids": [], "completion_ids": [5]}], {}, "prompt of row 0 has no tokens"),
        ([{"prompt_ids": [5]}], {}, "no completion_ids"),
        ([ROW], {"max_new_tokens": 1}, "2 tokens, more than `max_new_tokens=1`"),
        ([ROW, {"prompt_ids": [5], "completion_ids": [261]}], {}, "Row 1 contains id 261"),
        ([ROW], {"num_assistant_tokens": 0}, "`num_assistant_tokens`"),
        ([ROW], {"temperature": -1.0}, "`temperature` is -1.0"),
        ([ROW], {"draft_sampling": "best"}, "`draft_sampling` is 'best'"),
        ([ROW], {"batch_size": 0}, "`batch_size` is 0"),
        ([ROW], {"vocab_size": 300}, "261 rows"),
    ],
)
def test_bad_input_is_refused_before_any_model_runs(pair, rows, options, message, monkeypatch):
    draft, target = pair
    monkeypatch.setattr(ResponseScorer, "_score_batch", lambda *_: pytest.fail("a model ran"))
    with pytest.raises(ValueError, match=message):
        replay(draft, target, rows, **{"temperature": 0.0, "max_new_tokens": 4, **options})


def test_sampled_text_needs_the_target_and_a_prompt_adapter_is_refused(pair):
    draft, target = pair
    with pytest.raises(ValueError, match="needs the target's probabilities"):
        replay(draft, None, [ROW], temperature=1.0, max_new_tokens=4)
    draft = get_peft_model(draft, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="prompt-learning"):
        replay(draft, target, [ROW], max_new_tokens=4, temperature=0.0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("draft_sampling", ["stochastic", "greedy"])
@pytest.mark.parametrize("role", ["draft", "target"])
def test_a_model_of_nan_is_named_and_not_evaluated(pair, role, temperature, draft_sampling):
    """Its most likely id would be the first that is NaN, and be accepted or not."""
    broken = copy.deepcopy(dict(zip(("draft", "target"), pair, strict=True)))
    with torch.no_grad():
        broken[role].get_input_embeddings().weight[ROW["prompt_ids"][0]] = float("nan")
    with pytest.raises(NonFiniteError, match=f"The {role}'s weight"):
        score_responses(
            broken["draft"], broken["target"], [ROW], temperature=temperature, draft_sampling=draft_sampling,
            measure_entropy=True,
        )  # fmt: skip
