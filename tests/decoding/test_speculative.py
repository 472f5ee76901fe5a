"""Greedy: against plain `generate` and against transformers' assisted generation, prompt by prompt."""

import copy

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import GenerationConfig

from spec_kd.decoding import Round, SpeculativeCompletion, generate_speculatively, speculative
from spec_kd.decoding.ragged_model import find_layout
from spec_kd.evaluation import generate_assisted
from spec_kd.vocabulary import VocabularyMismatchError


def list_rounds(all_rounds):
    return [[tuple(record) for record in rounds] for rounds in all_rounds]


def rate_acceptance(text):
    rounds = [record for rounds in text.rounds for record in rounds]
    return sum(r.accepted for r in rounds) / sum(r.drafted for r in rounds)


def record_inputs(model):
    """Shape of the ids and width of the mask at every call, until `.remove()` of the hook that comes with them."""
    calls = []
    find_layout(model)  # not to be found out while calls are counted

    def record(_module, _args, kwargs):
        calls.append((*kwargs["input_ids"].shape, kwargs["attention_mask"].shape[1]))

    return calls, model.register_forward_pre_hook(record, with_kwargs=True)


def test_greedy_text_is_the_targets_own(tools, architecture, prompts):
    target = tools.build_model(architecture)
    draft = tools.add_noise(target, 0.03)
    text = generate_speculatively(target, draft, prompts, num_assistant_tokens=4, max_new_tokens=24)
    assert isinstance(text, SpeculativeCompletion) and text.seconds > 0
    assert text.completion_ids == tools.write_plainly(target, prompts, 24)
    assert 0.05 < rate_acceptance(text) < 0.95
    assert len({len(rounds) for rounds in text.rounds}) > 3  # the rows really go at different speeds


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize(("num_assistant_tokens", "max_new_tokens"), [(1, 1), (3, 2), (1, 7), (5, 6), (4, 19)])
def test_greedy_rounds_are_those_of_assisted_generation(
    pair, prompts, tools, batch_size, num_assistant_tokens, max_new_tokens
):
    options = {"num_assistant_tokens": num_assistant_tokens, "max_new_tokens": max_new_tokens}
    expected = generate_assisted(*pair, prompts, **options)
    text = generate_speculatively(*pair, prompts, batch_size=batch_size, **options)
    assert text.completion_ids == expected.completion_ids == tools.write_plainly(pair[0], prompts, max_new_tokens)
    assert list_rounds(text.rounds) == list_rounds(expected.rounds)


def test_texts_that_end_inside_a_block(pair, prompts, tools):
    target, draft = pair
    long = tools.write_plainly(target, prompts, 20)
    for position in (0, 2, 5, 11):
        eos = [999, long[0][position], long[5][position]]
        options = {"num_assistant_tokens": 4, "max_new_tokens": 20, "eos_token_id": eos}
        text = generate_speculatively(target, draft, prompts, **options)
        assert text.completion_ids == tools.write_plainly(target, prompts, 20, eos)
        assert len(set(map(len, text.completion_ids))) > 1
        assert list_rounds(text.rounds) == list_rounds(generate_assisted(target, draft, prompts, **options).rounds)


def test_an_accepted_eos_counts_and_ends_without_a_bonus(target, prompts, tools):
    prompt, ids, end = next(
        (prompt, ids, end)
        for prompt, ids in zip(prompts, tools.write_plainly(target, prompts, 12), strict=True)
        for end in range(1, 5)
        if ids[end] not in ids[:end]
    )
    text = generate_speculatively(
        target, copy.deepcopy(target), [prompt], num_assistant_tokens=5, max_new_tokens=12, eos_token_id=ids[end]
    )
    assert text.completion_ids == [ids[: end + 1]]
    assert text.rounds == [[Round(drafted=end + 1, accepted=end + 1, emitted=end + 1)]]
    assert text.rejected_positions == [[]]


@pytest.mark.parametrize("sizes", [("qwen2", "llama"), ("llama", "gemma2"), ("gemma2", "qwen2")])
def test_draft_of_another_architecture(prompts, tools, sizes):
    target, draft = (tools.build_model(name, seed) for seed, name in enumerate(sizes))
    options = {"num_assistant_tokens": 3, "max_new_tokens": 10}
    text = generate_speculatively(target, draft, prompts, **options)
    assert text.completion_ids == tools.write_plainly(target, prompts, 10)
    assert list_rounds(text.rounds) == list_rounds(generate_assisted(target, draft, prompts, **options).rounds)


@pytest.mark.parametrize(("target_rows", "draft_rows"), [(97, 104), (112, 97), (112, 104)])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_differently_padded_heads(pair, prompts, tools, target_rows, draft_rows, temperature):
    options = {"temperature": temperature, "num_assistant_tokens": 3, "max_new_tokens": 12}
    expected = generate_speculatively(*pair, prompts, **options)
    padded = [tools.with_padding_rows(model, rows) for model, rows in zip(pair, (target_rows, draft_rows), strict=True)]
    assert generate_speculatively(*padded, prompts, vocab_size=97, **options).completion_ids == expected.completion_ids
    default = generate_speculatively(*padded, prompts, **options)  # the rows that both have
    if min(target_rows, draft_rows) == 97:
        assert default.rounds == expected.rounds
    else:
        assert max(map(max, default.completion_ids)) >= 97


def simulate_greedily(tools, target_text, prompt, draft, gamma, max_new_tokens):
    """Rounds and rejected positions from the draft's teacher-forced choices, token by token."""
    logits = tools.compute_logits(draft, prompt + target_text)
    choice = logits[len(prompt) - 1 : -1].argmax(-1).tolist()
    rounds, rejected, start = [], [], 0
    while start < len(target_text):
        limit = min(gamma, max_new_tokens - start - 1)
        accepted = 0
        while accepted < limit and start + accepted < len(target_text):
            if choice[start + accepted] != target_text[start + accepted]:
                rejected.append(start + accepted)
                break
            accepted += 1
        emitted = min(accepted + 1, len(target_text) - start)
        rounds.append((accepted, emitted))
        start += emitted
    return rounds, rejected


@pytest.mark.parametrize("eos_token_id", [1, None])
def test_rejected_positions(pair, prompts, tools, eos_token_id):
    target, draft = pair
    gamma, limit = 3, 17
    if eos_token_id is None:
        eos_token_id = tools.write_plainly(target, prompts[1:2], 9)[0][-1]
    text = generate_speculatively(
        target, draft, prompts, num_assistant_tokens=gamma, max_new_tokens=limit, eos_token_id=eos_token_id
    )
    for i, prompt in enumerate(prompts):
        rounds, rejected = simulate_greedily(tools, text.completion_ids[i], prompt, draft, gamma, limit)
        assert [(record.accepted, record.emitted) for record in text.rounds[i]] == rounds
        assert text.rejected_positions[i] == rejected
    assert sum(map(len, text.rejected_positions)) > 20


def test_each_round_is_one_target_call_and_complete_rows_cost_nothing(pair, prompts):
    target, draft = pair
    gamma, limit = 4, 20
    (target_calls, target_hook), (draft_calls, draft_hook) = record_inputs(target), record_inputs(draft)
    text = generate_speculatively(target, draft, prompts, num_assistant_tokens=gamma, max_new_tokens=limit)
    target_hook.remove(), draft_hook.remove()
    # the prompts, up to the tokens that the first round reads
    longest = max(map(len, prompts))
    assert target_calls.pop(0) == (12, longest - 1, longest - 1)
    assert draft_calls.pop(0) == (12, longest - 2, longest - 2)
    rows_alive = [sum(len(rounds) > call for rounds in text.rounds) for call in range(max(map(len, text.rounds)))]
    assert [rows for rows, _, _ in target_calls] == rows_alive and rows_alive[-1] < rows_alive[0]
    # the last token with a block; a block of n takes n draft calls: two tokens, then one at a time
    drafted = [new - 1 for _, new, _ in target_calls]
    assert max(drafted) == drafted[0] == gamma
    assert [new for _, new, _ in draft_calls] == [new for count in drafted for new in [2, *[1] * (count - 1)][:count]]
    # rejected tokens take up no room
    assert max(width for _, _, width in target_calls) <= longest + limit + gamma


@pytest.mark.parametrize("batch_size", [1, 3, 5])
def test_a_complete_text_makes_room_for_the_next(pair, prompts, batch_size, tools):
    target, draft = pair
    rounds = []
    text = generate_speculatively(
        target, draft, prompts, num_assistant_tokens=2, max_new_tokens=15, batch_size=batch_size,
        observe=lambda texts, logits: rounds.append(len(texts)),
    )  # fmt: skip
    assert text.completion_ids == tools.write_plainly(target, prompts, 15)
    assert sum(rounds) == sum(map(len, text.rounds))
    # full until the last texts are on their way, which takes no more rounds than tokens
    is_full = [count == batch_size for count in rounds]
    assert all(is_full[: is_full.index(False)] if False in is_full else is_full)
    assert len(rounds) - sum(is_full) < 15 and max(rounds) == batch_size


@pytest.mark.parametrize("tokens_per_pass", [1, 20])
def test_prompts_are_read_in_passes_of_a_limited_size(pair, prompts, tokens_per_pass, monkeypatch, tools):
    monkeypatch.setattr(speculative, "PROMPT_TOKENS_PER_PASS", tokens_per_pass)
    calls, hook = record_inputs(pair[0])
    text = generate_speculatively(*pair, prompts, num_assistant_tokens=3, max_new_tokens=8)
    hook.remove()
    assert text.completion_ids == tools.write_plainly(pair[0], prompts, 8)
    passes = [(rows, new) for rows, new, width in calls if width == new]
    assert sum(rows for rows, _ in passes) == len(prompts)
    assert all(rows == 1 or rows * (new + 1) <= tokens_per_pass for rows, new in passes)
    assert len(passes) == 12 if tokens_per_pass == 1 else 2 < len(passes) < 12


def test_one_new_token_needs_no_draft(pair, prompts):
    calls, hook = record_inputs(pair[1])
    text = generate_speculatively(*pair, prompts, max_new_tokens=1)
    hook.remove()
    assert len(calls) == 1  # the prompts
    assert text.rounds == [[Round(0, 0, 1)]] * len(prompts)


def test_the_target_may_be_its_own_draft(target, prompts):
    for temperature, draft_sampling in ((0.0, "stochastic"), (0.8, "stochastic"), (0.0, "greedy")):
        text = generate_speculatively(
            target, target, prompts, temperature=temperature, draft_sampling=draft_sampling, max_new_tokens=13
        )
        assert rate_acceptance(text) == 1 and not any(text.rejected_positions)
        assert all(
            len(rounds) == 3 for ids, rounds in zip(text.completion_ids, text.rounds, strict=True) if 1 not in ids
        )


def test_peft_draft_counts_its_adapter(pair, prompts):
    target, draft = pair
    plain = generate_speculatively(target, draft, prompts, max_new_tokens=12)
    draft = get_peft_model(draft, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    adapted = generate_speculatively(target, draft, prompts, max_new_tokens=12)
    assert adapted.completion_ids == plain.completion_ids and adapted.rounds != plain.rounds
    merged = generate_speculatively(target, draft.merge_and_unload(), prompts, max_new_tokens=12)
    assert adapted.rounds == merged.rounds


def snapshot(*models):
    return [
        (
            [module.training for module in model.modules()],
            GenerationConfig.to_dict(model.generation_config),
            model.config.to_dict(),
            [weight.detach().sum().item() for weight in model.parameters()],
        )
        for model in models
    ]


def test_everything_is_restored_whatever_happens(pair, prompts):
    target, draft = pair
    target.train()
    draft.train()
    draft.model.layers[0].eval()
    draft.config.use_cache = False
    for layer in draft.model.layers:
        layer.self_attn.attention_dropout = 0.5
    before, random_state = snapshot(*pair), torch.get_rng_state()
    options = {"temperature": 0.7, "max_new_tokens": 8}
    text = generate_speculatively(*pair, prompts, **options)
    assert snapshot(*pair) == before and torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), random_state)
    assert text.completion_ids == generate_speculatively(*pair, prompts, **options).completion_ids  # no dropout

    def fail(module, *_):
        assert not module.training and not torch.is_grad_enabled()
        raise RuntimeError("inside")

    hook = draft.model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="inside"):
        generate_speculatively(*pair, prompts, **options)
    hook.remove()
    assert snapshot(*pair) == before and torch.is_grad_enabled()


@pytest.mark.parametrize("draft_sampling", ["stochastic", "greedy"])
def test_sampling_is_seeded(pair, prompts, draft_sampling):
    options = {"temperature": 1.0, "max_new_tokens": 8, "draft_sampling": draft_sampling}
    first = generate_speculatively(*pair, prompts, seed=1, **options)
    torch.rand(5)
    again = generate_speculatively(*pair, prompts, seed=1, **options)
    assert (again.completion_ids, again.rounds) == (first.completion_ids, first.rounds)
    assert generate_speculatively(*pair, prompts, seed=2, **options).completion_ids != first.completion_ids


def test_a_shipped_generation_config_does_not_leak(pair, prompts):
    expected = generate_speculatively(*pair, prompts, temperature=0.7, max_new_tokens=12)
    for model in pair:
        model.generation_config = GenerationConfig(
            do_sample=True, temperature=0.3, top_k=2, repetition_penalty=1.5, suppress_tokens=[7], eos_token_id=1
        )
    text = generate_speculatively(*pair, prompts, temperature=0.7, max_new_tokens=12)
    assert text.completion_ids == expected.completion_ids
    # but the target's EOS does
    eos = [ids[3] for ids in expected.completion_ids if len(ids) > 3]
    pair[0].generation_config.eos_token_id = eos
    text = generate_speculatively(*pair, prompts, temperature=0.7, max_new_tokens=12)
    assert all(len(ids) == 12 or ids[-1] in eos for ids in text.completion_ids)
    assert not any(token in eos for ids in text.completion_ids for token in ids[:-1])


def test_progress_is_shown_if_wanted(pair, prompts, capsys):
    generate_speculatively(*pair, prompts, max_new_tokens=2)
    assert capsys.readouterr().err == ""
    generate_speculatively(*pair, prompts, max_new_tokens=2, show_progress=True)
    assert "12/12" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prompt_ids", "options", "message"),
    [
        ([], {}, "no prompts"),
        ([[5], []], {}, "Prompt 1 has no tokens"),
        ([[5, 97]], {}, "Prompt 0 contains id 97"),
        ([[5]], {"num_assistant_tokens": 0}, "`num_assistant_tokens`"),
        ([[5]], {"temperature": -0.5}, "`temperature` is -0.5"),
        ([[5]], {"draft_sampling": "best"}, "`draft_sampling` is 'best'"),
        ([[5]], {"max_new_tokens": 0}, "`max_new_tokens` is 0"),
        ([[5]], {"batch_size": 0}, "`batch_size` is 0"),
        ([[5], [5] * 127], {}, "Prompt 1 has 127 tokens.*the target's 128 positions"),
    ],
)
def test_bad_input(pair, prompt_ids, options, message):
    (calls, hook), _ = record_inputs(pair[0]), record_inputs(pair[1])
    with pytest.raises(ValueError, match=message):
        generate_speculatively(*pair, prompt_ids, **{"max_new_tokens": 4, **options})
    hook.remove()
    assert not calls


def test_bad_models(pair):
    target, draft = pair
    with pytest.raises(VocabularyMismatchError, match="97 rows"):
        generate_speculatively(target, draft, [[5]], max_new_tokens=4, vocab_size=98)
    prompt_learning = get_peft_model(draft, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="draft has a prompt-learning adapter"):
        generate_speculatively(target, prompt_learning, [[5]], max_new_tokens=4)
