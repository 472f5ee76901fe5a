"""Replay is the judge: exact, and free of `generate`. A copy of the target as draft must have everything accepted."""

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from spec_kd.evaluation.assisted import Round, _build_round, generate_assisted
from spec_kd.evaluation.response_replay import replay

EXACT = ("tokens", "target_calls", "accepted", "drafted", "drafting_rounds", "accepted_by_position")


def as_rows(prompts, figures):
    return [{"prompt_ids": p, "completion_ids": c} for p, c in zip(prompts, figures.completion_ids, strict=True)]


def assert_all_accepted(figures):
    assert (figures.accepted == figures.drafted).all() and figures.drafted.sum() > 0


@pytest.mark.parametrize("num_assistant_tokens", [1, 4])
def test_greedy_replay_equals_assisted_prompt_by_prompt(pair, prompts, tools, num_assistant_tokens):
    draft, target = pair
    options = {"temperature": 0.0, "num_assistant_tokens": num_assistant_tokens, "max_new_tokens": 20}
    figures = generate_assisted(target, draft, prompts, **options)
    rows = tools.write_texts(target, prompts, 20)
    assert as_rows(prompts, figures) == rows  # lossless
    replayed = replay(draft, target, rows, **options)
    for name in EXACT:
        np.testing.assert_array_equal(getattr(figures, name), getattr(replayed, name), err_msg=name)
    assert 0.1 < figures.acceptance_rate.value < 0.9


@pytest.mark.parametrize(("temperature", "wrong_temperature"), [(0.7, 0.49), (1.0, 0.7)])
def test_sampled_replay_agrees_within_its_interval(target, tools, temperature, wrong_temperature):
    draft = tools.add_noise(target, scale=0.03)
    generator = torch.Generator().manual_seed(5)
    prompts = torch.randint(5, 261, (60, 4), generator=generator).tolist()
    options = {"temperature": temperature, "num_assistant_tokens": 4, "max_new_tokens": 16}
    figures = generate_assisted(target, draft, prompts, seed=3, **options)
    rows = as_rows(prompts, figures)

    def compare(replayed):
        """z of the paired difference in target calls; the text is the same, only the draft's luck differs."""
        difference = figures.target_calls - replayed.target_calls
        return difference.mean() / (difference.std(ddof=1) / np.sqrt(len(difference)))

    replayed = replay(draft, target, rows, **options)
    assert abs(compare(replayed)) < 2.5
    for real, expected in (
        (figures.block_efficiency, replayed.block_efficiency),
        (figures.acceptance_rate, replayed.acceptance_rate),
    ):
        assert expected.low <= real.value <= expected.high
    # the comparison can tell: what a temperature applied twice (or not at all) would give is far away
    assert abs(compare(replay(draft, target, rows, **{**options, "temperature": wrong_temperature}))) > 3.5


def test_truncated_sampling_agrees_with_its_replay(target, tools):
    """top-k and top-p of the deployment, on both sides; without them replay would be far off."""
    draft = tools.add_noise(target, scale=0.03)
    prompts = torch.randint(5, 261, (60, 4), generator=torch.Generator().manual_seed(5)).tolist()
    options = {"temperature": 1.0, "top_k": 12, "top_p": 0.8, "num_assistant_tokens": 4, "max_new_tokens": 16}
    figures = generate_assisted(target, draft, prompts, seed=3, **options)
    rows = as_rows(prompts, figures)

    def compare(replayed):
        difference = figures.target_calls - replayed.target_calls
        return difference.mean() / (difference.std(ddof=1) / np.sqrt(len(difference)))

    replayed = replay(draft, target, rows, **options)
    assert abs(compare(replayed)) < 2.5
    assert figures.block_efficiency.low <= replayed.block_efficiency.value <= figures.block_efficiency.high
    assert abs(compare(replay(draft, target, rows, **{**options, "top_k": 0, "top_p": 1.0}))) > 3.5


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_a_draft_equal_to_its_target_has_everything_accepted_eos_included(target, prompts, tools, temperature):
    # The draft's warpers applied twice, dropout, a masked pad id or a leaked penalty would each break this.
    options = {"temperature": temperature, "num_assistant_tokens": 3, "max_new_tokens": 12}
    text = generate_assisted(target, copy.deepcopy(target), prompts[:4], **options)
    ids = text.completion_ids[0]
    eos = ids[6]
    figures = generate_assisted(target, copy.deepcopy(target), prompts[:4], eos_token_id=eos, **options)
    assert figures.completion_ids[0] == ids[: ids.index(eos) + 1]
    assert_all_accepted(figures)


def test_an_accepted_eos_counts_and_ends_without_a_bonus(target, prompts):
    first = generate_assisted(target, copy.deepcopy(target), prompts, max_new_tokens=12, temperature=0.0)
    prompt, ids, end = next(
        (prompt, ids, end)
        for prompt, ids in zip(prompts, first.completion_ids, strict=True)
        for end in range(1, 5)
        if ids[end] not in ids[:end]
    )
    options = {"num_assistant_tokens": 5, "max_new_tokens": 12, "eos_token_id": [999, ids[end]]}
    figures = generate_assisted(target, copy.deepcopy(target), [prompt], **options)
    assert figures.completion_ids == [ids[: end + 1]]
    assert figures.rounds == [[Round(drafted=end + 1, accepted=end + 1, emitted=end + 1)]]
    replayed = replay(
        target, None, as_rows([prompt], figures), num_assistant_tokens=5, max_new_tokens=12, temperature=0.0
    )
    for name in EXACT:
        np.testing.assert_array_equal(getattr(figures, name), getattr(replayed, name), err_msg=name)


@pytest.mark.parametrize(
    ("candidates", "emitted", "expected"),
    [
        ([4, 5, 6], [4, 5, 6, 7], Round(3, 3, 4)),  # all accepted and a bonus
        ([4, 5, 6], [4, 9], Round(3, 1, 2)),  # a correction
        ([4, 1], [4, 1], Round(2, 2, 2)),  # an accepted EOS
        ([4, 5, 6], [4, 1], Round(3, 1, 2)),  # EOS as correction
        ([], [4], Round(0, 0, 1)),  # nothing drafted
    ],
)
def test_rounds(candidates, emitted, expected):
    assert _build_round(candidates, emitted) == expected


def test_tokens_drafted_behind_the_end_do_not_count(pair, prompts):
    draft, target = pair
    greedy = generate_assisted(target, draft, prompts, num_assistant_tokens=4, max_new_tokens=16, temperature=0.0)
    for prompt, ids in zip(prompts, greedy.completion_ids, strict=True):
        options = {"temperature": 0.0, "num_assistant_tokens": 4, "max_new_tokens": 16}
        figures = generate_assisted(target, draft, [prompt], eos_token_id=ids[-1], **options)
        replayed = replay(draft, target, as_rows([prompt], figures), **options)
        assert figures.target_calls == replayed.target_calls and figures.accepted == replayed.accepted
        assert figures.drafted <= replayed.drafted  # the draft may stop at an EOS of its own


def test_the_confidence_threshold_and_the_schedule_do_not_count(pair, prompts):
    draft, target = pair
    draft.generation_config.num_assistant_tokens = 20
    draft.generation_config.num_assistant_tokens_schedule = "heuristic"
    draft.generation_config.assistant_confidence_threshold = 0.99  # never that sure: one token a round
    figures = generate_assisted(target, draft, prompts[:4], num_assistant_tokens=3, max_new_tokens=16, temperature=0.0)
    replayed = replay(
        draft, target, as_rows(prompts[:4], figures), num_assistant_tokens=3, max_new_tokens=16, temperature=0.0
    )
    np.testing.assert_array_equal(figures.drafted, replayed.drafted)
    np.testing.assert_array_equal(figures.target_calls, replayed.target_calls)
    assert draft.generation_config.num_assistant_tokens == 20


def test_the_default_top_k_does_not_count(target, prompts):
    figures = generate_assisted(target, copy.deepcopy(target), prompts[:3], temperature=1.0, max_new_tokens=24)
    assert_all_accepted(figures)
    ranks = []
    for row in as_rows(prompts[:3], figures):
        ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
        start = len(row["prompt_ids"]) - 1
        with torch.no_grad():
            logits = target(input_ids=ids).logits[0, start:-1]
        chosen = logits.gather(-1, ids[0, start + 1 :, None])
        ranks += (logits > chosen).sum(-1).tolist()
    assert max(ranks) >= 50


@pytest.mark.parametrize("where", ["prompt", "completion"])
def test_a_pad_id_within_the_text_is_not_masked(target, prompts, tools, where):
    rows = tools.write_texts(target, prompts[:4], 12)
    pad = rows[0]["prompt_ids"][0] if where == "prompt" else rows[0]["completion_ids"][2]
    target.generation_config.pad_token_id = pad
    draft = copy.deepcopy(target)
    figures = generate_assisted(target, draft, prompts[:4], max_new_tokens=12, temperature=0.0)
    assert as_rows(prompts[:4], figures) == rows
    assert_all_accepted(figures)


def test_a_shipped_generation_config_does_not_leak(pair, prompts):
    draft, target = pair
    expected = generate_assisted(target, draft, prompts[:4], temperature=0.7, max_new_tokens=12)
    for model in pair:
        model.generation_config = GenerationConfig(
            do_sample=True,
            temperature=0.3,
            top_p=0.5,
            top_k=2,
            min_p=0.3,
            repetition_penalty=1.5,
            no_repeat_ngram_size=2,
            min_new_tokens=10,
            suppress_tokens=[7],
            eos_token_id=1,
            pad_token_id=0,
        )
    figures = generate_assisted(target, draft, prompts[:4], temperature=0.7, max_new_tokens=12)
    assert figures.completion_ids == expected.completion_ids and figures.rounds == expected.rounds


def test_a_draft_in_training_with_gradient_checkpointing(target, prompts, tools):
    draft = copy.deepcopy(target)
    draft.gradient_checkpointing_enable()
    draft.config.use_cache = False
    for layer in draft.model.layers:
        layer.self_attn.attention_dropout = 0.5
    draft.train()
    before = tools.snapshot(draft, target)
    assert_all_accepted(generate_assisted(target, draft, prompts[:4], max_new_tokens=12, temperature=0.0))
    assert tools.snapshot(draft, target) == before and draft.is_gradient_checkpointing


@pytest.mark.parametrize(("draft_rows", "target_rows"), [(261, 280), (280, 261), (272, 280)])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_differently_padded_heads(pair, prompts, tools, draft_rows, target_rows, temperature):
    draft, target = pair
    options = {"temperature": temperature, "num_assistant_tokens": 3, "max_new_tokens": 12}
    expected = generate_assisted(target, draft, prompts[:5], **options)
    copied = tools.with_padding_rows(target, draft_rows)
    draft, target = tools.with_padding_rows(draft, draft_rows), tools.with_padding_rows(target, target_rows)
    before = tools.snapshot(draft, target)
    figures = generate_assisted(target, draft, prompts[:5], vocab_size=261, **options)
    assert tools.snapshot(draft, target) == before
    assert max(map(max, figures.completion_ids)) < 261
    if temperature == 0:
        assert figures.rounds == expected.rounds and figures.completion_ids == expected.completion_ids
    else:
        assert_all_accepted(generate_assisted(target, copied, prompts[:5], vocab_size=261, **options))


def test_peft_draft_counts_its_adapter(pair, prompts):
    draft, target = pair
    plain = generate_assisted(target, draft, prompts[:4], max_new_tokens=12, temperature=0.0)
    draft = get_peft_model(draft, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    adapted = generate_assisted(target, draft, prompts[:4], max_new_tokens=12, temperature=0.0)
    merged = generate_assisted(target, draft.merge_and_unload(), prompts[:4], max_new_tokens=12, temperature=0.0)
    assert adapted.completion_ids == plain.completion_ids
    assert adapted.rounds == merged.rounds != plain.rounds


def test_everything_is_restored_whatever_happens(pair, prompts, tools):
    draft, target = pair
    draft.train()
    target.train()
    draft.model.layers[0].eval()
    draft.generation_config.num_assistant_tokens = 11
    draft = tools.with_padding_rows(draft, 280)
    before, random_state = tools.snapshot(draft, target), torch.get_rng_state()
    generate_assisted(target, draft, prompts[:2], temperature=0.7, vocab_size=261, max_new_tokens=6)
    assert tools.snapshot(draft, target) == before

    calls = []

    def fail(module, *_):
        calls.append(module.training)
        if len(calls) > 2:
            raise RuntimeError("inside")

    hook = draft.model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="inside"):
        generate_assisted(target, draft, prompts[:2], temperature=0.7, vocab_size=261, max_new_tokens=6)
    hook.remove()
    assert calls == [False] * 3
    assert tools.snapshot(draft, target) == before
    assert torch.equal(torch.get_rng_state(), random_state) and torch.is_grad_enabled()


def test_sampling_is_seeded(pair, prompts):
    draft, target = pair
    options = {"temperature": 1.0, "max_new_tokens": 8}
    first = generate_assisted(target, draft, prompts[:3], seed=1, **options)
    torch.rand(5)
    assert generate_assisted(target, draft, prompts[:3], seed=1, **options).rounds == first.rounds
    assert generate_assisted(target, draft, prompts[:3], seed=2, **options).completion_ids != first.completion_ids


def test_speed(pair, prompts):
    draft, target = pair
    figures = generate_assisted(target, draft, prompts[:3], max_new_tokens=12, measure_speed=True, temperature=0.0)
    metrics = figures.to_metrics("eval", "_x")
    assert (figures.timing.plain_tokens == figures.tokens).all() and (figures.timing.assisted_seconds > 0).all()
    rate = metrics["eval_tokens_per_second_assisted_x"] / metrics["eval_tokens_per_second_plain_x"]
    assert metrics["eval_speedup_x"] == pytest.approx(rate) == pytest.approx(figures.speedup.value)
    assert figures.speedup.low <= figures.speedup.value <= figures.speedup.high
    without = generate_assisted(target, draft, prompts[:1], max_new_tokens=4, temperature=0.0)
    assert without.speedup is None and not any("per_second" in name for name in without.to_metrics())


@pytest.mark.parametrize(
    ("prompt_ids", "options", "message"),
    [
        ([], {}, "no prompts"),
        ([[5], []], {}, "Prompt 1 has no tokens"),
        ([[5, 261]], {}, "Prompt 0 contains id 261"),
        ([[5]], {"num_assistant_tokens": 0}, "`num_assistant_tokens`"),
        ([[5]], {"temperature": -0.5}, "`temperature` is -0.5"),
        ([[5]], {"max_new_tokens": 0}, "`max_new_tokens` is 0"),
        ([[5]], {"vocab_size": 300}, "261 rows"),
    ],
)
def test_bad_input(pair, prompt_ids, options, message):
    draft, target = pair
    with pytest.raises(ValueError, match=message):
        generate_assisted(target, draft, prompt_ids, **{"max_new_tokens": 4, **options})
    with pytest.raises(ValueError, match="same model object"):
        generate_assisted(target, target, [[5]], max_new_tokens=4, temperature=0.0)
