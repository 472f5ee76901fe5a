"""Where a difference comes from, and the files that tell."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from example_report import build_report
from tiny import build_llama

from spec_kd import ServingCosts, compare_observed, describe_observation, replay, save_observed, save_report
from spec_kd.data.prompt_rendering import render_prompt_ids
from spec_kd.evaluation import Observation, ObservedRequest, load_observed, load_report
from spec_kd.evaluation.metrics import Interval
from spec_kd.evaluation.recommendations import list_thresholds
from spec_kd.evaluation.report import render_html, render_markdown
from spec_kd.evaluation.report.observed import tabulate_speed
from spec_kd.evaluation.response_replay import score_responses
from spec_kd.serving import find_serving_engine
from spec_kd.serving.observer import DraftCounts

PROMPTS = [[7, 8, 9], [10, 11], [12, 13, 14, 15]]


@pytest.fixture(scope="module")
def pair():
    draft, target = build_llama(4), build_llama(4)
    with torch.no_grad():
        draft.lm_head.weight.add_(0.02 * torch.randn(draft.lm_head.weight.shape))
    return draft, target


def write(model, prompt, length):
    ids = list(prompt)
    for _ in range(length):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1, :261].argmax()))
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def observation(pair):
    """What a server of other precision could have counted: one more accepted token on the second prompt."""
    draft, target = pair
    texts = [write(target, prompt, 10) for prompt in PROMPTS]
    rows = [{"prompt_ids": p, "completion_ids": t} for p, t in zip(PROMPTS, texts, strict=True)]
    metrics = replay(
        draft, None, rows, temperature=0.0, max_new_tokens=10, num_assistant_tokens=2, serving_engine="llama.cpp"
    )
    requests = [
        ObservedRequest(
            row=i,
            completion_ids=text,
            finish_reason="length",
            request_seconds=2.0,
            decoding_seconds=1.0,
            counts=DraftCounts(int(metrics.drafted[i]), int(metrics.accepted[i]) + (i == 1)),
        )
        for i, text in enumerate(texts)
    ]
    plain = [dataclasses.replace(one, decoding_seconds=1.0 + one.row, counts=None) for one in requests]
    return Observation(
        serving_engine="llama.cpp", model="target|<b>.gguf", temperature=0.0, max_new_tokens=10, concurrency=1,
        num_assistant_tokens=2, prompt_ids=PROMPTS, requests=requests, plain_requests=plain,
    )  # fmt: skip


def test_a_difference_on_the_same_tokens(observation, pair):
    report = compare_observed(observation, pair[0], None, show_progress=False)
    assert [one.is_equal for one in report.prompts] == [True, False, True] and report.num_equal == 2
    rate = report.metrics[0]
    drafted = observation.drafted.sum()
    assert rate.same_tokens.value == pytest.approx(1 / drafted) and rate.same_tokens.low == 0
    assert rate.predicted.value == pytest.approx(rate.observed.value - 1 / drafted)
    assert rate.earlier is rate.other_tokens is None


def test_own_responses_split_the_difference(observation, pair):
    own = [
        {"prompt_ids": p, "completion_ids": write(pair[1], p, length)}
        for p, length in zip(PROMPTS, (10, 4, 4), strict=True)
    ]
    own[2]["prompt_ids"] = [5, *own[2]["prompt_ids"]]
    report = compare_observed(observation, pair[0], pair[1], responses=own, show_progress=False)
    predicted = replay(
        pair[0], None, own, temperature=0.0, max_new_tokens=10, num_assistant_tokens=2, serving_engine="llama.cpp",
        show_progress=False,
    )  # fmt: skip
    rate = report.metrics[0]
    assert rate.earlier == predicted.acceptance_rate
    whole = rate.observed.value - rate.earlier.value
    assert rate.same_tokens.value + rate.other_tokens.value == pytest.approx(whole)
    assert rate.other_tokens.low <= rate.other_tokens.value <= rate.other_tokens.high
    assert "1 of 3 own responses are the server's to the token" in report.notes[-2]
    assert "they have 6.0 tokens and the server's 10.0" in report.notes[-2]
    assert report.notes[-1].startswith("1 prompts have other ids")
    with pytest.raises(ValueError, match="There are 2 `responses` and 3 prompts"):
        compare_observed(observation, *pair, responses=own[:2])


@pytest.fixture
def evaluation():
    report = build_report()
    setting = next(one for one in report.draft.settings if one.temperature == 0)
    draft = dataclasses.replace(report.draft, settings=[setting])
    return dataclasses.replace(report, drafts=[draft], comparisons=[], serving_engine="llama.cpp")


def test_an_earlier_report_splits_it_too_and_shows_it(observation, pair, evaluation, tmp_path):
    observed = compare_observed(observation, pair[0], None, report=evaluation, show_progress=False)
    rate, earlier = observed.metrics[0], evaluation.draft.settings[0].at_gamma(2).acceptance_rate
    assert rate.earlier == earlier
    assert rate.other_tokens.value == pytest.approx(rate.predicted.value - earlier.value)
    assert observed.metrics[1].earlier is None  # the report has no mean acceptance length
    report = evaluation.with_observed(observed)
    save_report(report, tmp_path)
    assert load_report(tmp_path).observed[0].prompts == observed.prompts
    page, text = render_html(report), render_markdown(report)
    titles = ["<h2>Costs</h2>", "<h2>Predicted and observed</h2>", "<h2>Where the draft fails</h2>"]
    assert sorted(titles, key=page.index) == titles
    for words in ("llama.cpp, temperature 0, 2 drafted tokens, 3 prompts", "acceptance rate (draft acceptance)"):
        assert words in page and words in text
    assert "Predicted and observed" not in render_html(evaluation)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"serving_engine": "vllm"}, "counts otherwise"), ({"drafts": None}, "has no metrics at the setting 'greedy'")],
)
def test_a_report_that_does_not_fit(observation, pair, evaluation, change, message):
    if change.get("drafts", 0) is None:
        change = {"drafts": [dataclasses.replace(evaluation.draft, settings=build_report().draft.settings[:1])]}
    with pytest.raises(ValueError, match=message):
        compare_observed(observation, *pair, report=dataclasses.replace(evaluation, **change))


def test_files(observation, pair, tmp_path):
    report = compare_observed(observation, pair[0], None, show_progress=False)
    paths = save_observed(report, tmp_path)
    loaded = load_observed(tmp_path)
    assert loaded.prompts == report.prompts and loaded.speedup == report.speedup and loaded.notes == report.notes
    page, text = paths["html"].read_text(), paths["md"].read_text()
    assert "target|&lt;b&gt;.gguf in llama.cpp" in page and "<b>.gguf" not in text
    assert "speed-up 2.00" in page  # the median of 1, 2 and 3
    assert text.index("| 1 | 10 |") < text.index("| 0 | 10 |")  # what differs comes first
    values = json.loads(paths["json"].read_text())
    paths["json"].write_text(json.dumps({**values, "format": 9}))
    with pytest.raises(ValueError, match="has format 9, but this version reads 1"):
        load_observed(paths["json"])
    paths["json"].write_text("[]")
    with pytest.raises(ValueError, match="is no observation"):
        load_observed(tmp_path)


def test_without_a_draft_nothing_is_predicted(observation):
    report = describe_observation(dataclasses.replace(observation, plain_requests=[]))
    assert report.num_compared == 0 and report.metrics[0].predicted is None
    assert "predicts" not in report.headline and "speed-up" not in report.headline
    assert report.metrics[1].observed.value != report.metrics[1].observed.value  # llama.cpp tells no rounds
    assert isinstance(report.metrics[0].observed, Interval)


def test_loops_and_untemplated_prompts_are_told_apart(tokenizer):
    """The plain completions are judged, and metrics without them are those of the other requests."""
    prompts = [
        next(render_prompt_ids([{"prompt": [{"role": "user", "content": "Hi"}]}], tokenizer)) if i else [90, 91]
        for i in range(4)
    ]
    requests = [
        ObservedRequest(
            row=i, completion_ids=list(range(9, 39)), finish_reason="length", request_seconds=1.0, decoding_seconds=1.0,
            counts=DraftCounts(20, 10 + i, 10),
        )
        for i in range(4)
    ]  # fmt: skip
    plain = [dataclasses.replace(one, decoding_seconds=1.0 + one.row, counts=None) for one in requests]
    plain[3] = dataclasses.replace(plain[3], completion_ids=[9, 8] * 15)
    observation = Observation(
        serving_engine="llama.cpp", model="target.gguf", temperature=0.0, max_new_tokens=30, concurrency=1,
        num_assistant_tokens=2, prompt_ids=prompts, requests=requests, plain_requests=plain,
        counters=DraftCounts(80, 46, 40), counted_requests=4,
    )  # fmt: skip
    report = describe_observation(observation, tokenizer)
    by_kind = {one.kind: one for one in report.left_out}
    assert {kind: one.responses for kind, one in by_kind.items()} == {
        "looping": 1, "untemplated": 1, "looping_or_untemplated": 2,
    }  # fmt: skip
    rate, length, speedup = by_kind["looping_or_untemplated"].metrics
    assert (rate.of_all.value, rate.without.value) == (46 / 80, 23 / 40)
    assert (length.of_all.value, length.without.value) == (1 + 46 / 40, 1 + 23 / 20)
    assert (speedup.of_all.value, speedup.without.value) == (2.5, 2.5)
    assert by_kind["looping"].metrics[2].without.value == 2.0
    assert by_kind["looping"].metrics[0].without.value == 33 / 60
    assert [one.kind for one in describe_observation(observation).left_out] == ["looping"]
    of_draft = describe_observation(dataclasses.replace(observation, plain_requests=[]), tokenizer).left_out[0]
    assert of_draft.responses == 0 and [one.name for one in of_draft.metrics] == [
        "acceptance_rate",
        "mean_acceptance_length",
    ]


def test_without_counts_of_each_request_only_the_speed_is_known(observation):
    """Counters of all requests say nothing of some of them."""
    requests = [dataclasses.replace(one, counts=None) for one in observation.requests]
    text = [5] * 30
    requests[0] = dataclasses.replace(requests[0], completion_ids=text)
    plain = [dataclasses.replace(observation.plain_requests[0], completion_ids=text), *observation.plain_requests[1:]]
    counted = dataclasses.replace(
        observation, requests=requests, plain_requests=plain, counters=DraftCounts(20, 10, 10), counted_requests=3
    )
    rate, _, speedup = describe_observation(counted).left_out[0].metrics
    assert rate.of_all.value == 0.5 and rate.without.value != rate.without.value
    assert speedup.without.value == speedup.without.value


def test_observed_texts_that_loop_are_in_the_files(observation, tmp_path):
    report = describe_observation(observation)
    save_observed(report, tmp_path)
    assert repr(load_observed(tmp_path).left_out) == repr(report.left_out)  # NaN equals NaN in text
    assert "looping completions" in (tmp_path / "observed.md").read_text()


def test_the_speedup_is_predicted_by_costs(observation, pair):
    """Of each prompt by its own rounds, the shorter last ones included."""
    costs = [ServingCosts(round_cost={1: 5.0}, batch_size=8), ServingCosts(round_cost={2: 1.5})]
    report = compare_observed(observation, pair[0], None, costs=costs, show_progress=False)
    metrics = replay(
        pair[0], None, observation.list_responses(), temperature=0.0, max_new_tokens=10, num_assistant_tokens=2,
        serving_engine="llama.cpp", show_progress=False,
    )  # fmt: skip
    expected = [
        tokens / (calls + 0.5 * drafted / 2)
        for tokens, calls, drafted in zip(metrics.tokens, metrics.target_calls, metrics.drafted, strict=True)
    ]
    assert metrics.drafted.sum() < 2 * metrics.target_calls.sum()  # a limit of 10 tokens cuts rounds short
    assert report.predicted_speedup.value == pytest.approx(sorted(expected)[1])
    assert f"predicted speed-up {sorted(expected)[1]:.2f}" in report.headline
    cells = dict(zip(tabulate_speed(report).header, tabulate_speed(report).rows[0], strict=True))
    assert cells["the same, predicted"].startswith(f"{sorted(expected)[1]:.2f} [")
    with pytest.raises(ValueError, match="8 at a time up to 1 drafted tokens, but the server had 1"):
        compare_observed(observation, pair[0], None, costs=costs[:1])
    assert compare_observed(observation, pair[0], None, show_progress=False).predicted_speedup is None


def test_drafts_that_end_early(observation, pair):
    """Passes are those of the threshold; the price lies between the shortest and the longest open drafts."""
    costs = [ServingCosts(round_cost={1: 1.3, 2: 1.5, 3: 1.8}, cost_ratio=0.1)]
    draft = copy.deepcopy(pair[0])
    with torch.no_grad():  # refused more often than the other one
        draft.lm_head.weight.add_(
            0.1 * torch.randn(draft.lm_head.weight.shape, generator=torch.Generator().manual_seed(0))
        )
    options = {"temperature": 0.0, "max_new_tokens": 10, "serving_engine": "llama.cpp"}
    scores = score_responses(draft, None, observation.list_responses(), **options)
    threshold = float(scores.values["confidence"].median())
    ended = dataclasses.replace(observation, num_assistant_tokens=3, assistant_confidence_threshold=threshold)
    report = compare_observed(ended, draft, None, costs=costs, show_progress=False)
    (way,) = list_thresholds(scores, 3, find_serving_engine("llama.cpp").early_end, 10, [threshold])
    least, most = way.price(costs[0])
    assert (least <= most).all() and (least < most).any()  # a refused token leaves a draft open
    tokens = scores.replay(3, 10).tokens
    assert report.predicted_speedup.value == pytest.approx(np.median(tokens / ((least + most) / 2)))
    whole = compare_observed(
        dataclasses.replace(observation, num_assistant_tokens=3), draft, None, costs=costs, show_progress=False
    )
    assert whole.predicted_speedup.value != pytest.approx(report.predicted_speedup.value)
    rate, length = report.metrics[:2]
    assert rate.predicted is None and length.predicted is not None and whole.metrics[0].predicted is not None
    assert all(one.predicted_drafted is None and one.is_equal is None for one in report.prompts)
    assert any("where drafts end early" in note for note in report.notes)
