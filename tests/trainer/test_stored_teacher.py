"""Training and evaluation from the target's stored signal, without the target."""

import copy

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import build_llama, build_tokenizer

from spec_kd import (
    BlackBoxSFTConfig,
    BlackBoxSFTTrainer,
    SpeculativeEvalCallback,
    WhiteBoxDistillConfig,
    WhiteBoxDistillTrainer,
    generate_responses,
)
from spec_kd.data.responses import score_completions
from spec_kd.data.token_columns import SPARSE_TENSORS, TokenColumnCollator
from spec_kd.data.training_rows import cut_and_pack, to_training_rows
from spec_kd.evaluation import replay
from spec_kd.vocabulary import VocabularyMismatchError

TEXTS = [f"{word} {i}" for i in range(4) for word in ("a", "hello there", "the quick brown fox", "1 + 1 =")]


@pytest.fixture(scope="module")
def target():
    return build_llama(seed=1, hidden_size=48)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def distilled(target, tokenizer):
    """Responses by method, of one and the same text."""
    requests = {
        "token_only": {},
        "sampled_counts": {"num_draws": 64},
        "sampled_logprobs": {"num_draws": 64},
        "top_k_tail": {"signal_top_k": 261},
    }
    return {
        name: generate_responses(
            target, TEXTS, processing_class=tokenizer, max_new_tokens=16, temperature=1.0, teacher_signal=name,
            show_progress=False, **numbers,
        )
        for name, numbers in requests.items()
    }  # fmt: skip


def make_trainer(tokenizer, dataset, options, draft=None, **overrides):
    named = {k: overrides.pop(k) for k in list(overrides) if k in ("teacher_model", "callbacks", "eval_dataset")}
    return WhiteBoxDistillTrainer(
        model=draft or build_llama(seed=0), processing_class=tokenizer, train_dataset=dataset,
        args=WhiteBoxDistillConfig(**{**options, **overrides}), **named,
    )  # fmt: skip


def compute_first_loss(trainer):
    batch = next(iter(trainer.get_train_dataloader()))
    return trainer.compute_loss(trainer.model.train(), trainer._prepare_inputs(batch))


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "tvd", "lk_hybrid"])
@pytest.mark.parametrize("layout", [{}, {"packing": True, "max_length": 64}, {"max_length": 20}])
def test_a_signal_of_all_ids_is_the_live_teacher(target, tokenizer, distilled, options, divergence, layout):
    """Top-k with k the whole vocabulary: equal loss and gradient, packed, truncated and plain."""
    results = []
    for teacher in (None, copy.deepcopy(target)):
        draft = build_llama(seed=0)
        trainer = make_trainer(
            tokenizer, distilled["top_k_tail"], options, draft, divergence=divergence, teacher_model=teacher,
            shuffle_dataset=False, **layout,
        )  # fmt: skip
        loss = compute_first_loss(trainer)
        loss.backward()
        results.append((loss.item(), draft.model.embed_tokens.weight.grad))
    assert results[0][0] == pytest.approx(results[1][0], rel=2e-3)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=2e-2, atol=2e-4)


def test_the_written_token_alone_is_what_black_box_learns(tokenizer, distilled, options):
    """Equal gradient, and a loss that is less by the mean log p: an estimate of KL instead of the cross-entropy."""
    results = []
    for trainer_class, config_class in (
        (WhiteBoxDistillTrainer, WhiteBoxDistillConfig), (BlackBoxSFTTrainer, BlackBoxSFTConfig)
    ):  # fmt: skip
        draft = build_llama(seed=0)
        trainer = trainer_class(
            model=draft, args=config_class(**options, shuffle_dataset=False), processing_class=tokenizer,
            train_dataset=distilled["token_only"],
        )  # fmt: skip
        loss = compute_first_loss(trainer)
        loss.backward()
        results.append((loss.item(), draft.model.embed_tokens.weight.grad, next(iter(trainer.get_train_dataloader()))))
    logprobs = results[0][2]["teacher_token_logprobs"]
    assert results[0][0] == pytest.approx(results[1][0] + logprobs.nanmean().item(), rel=1e-4)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["token_only", "sampled_counts", "sampled_logprobs", "top_k_tail"])
def test_training_from_any_signal_raises_acceptance(target, tokenizer, distilled, options, method):
    draft, responses = build_llama(seed=0), distilled["token_only"]
    before = replay(draft, target, responses, temperature=1.0, max_new_tokens=16).alpha.value
    trainer = make_trainer(tokenizer, distilled[method], options, draft, max_steps=40, learning_rate=3e-3)
    assert trainer.teacher_model is None
    trainer.train()
    after = replay(draft, target, responses, temperature=1.0, max_new_tokens=16).alpha.value
    if method != "token_only":  # one draw a token of a nearly flat target teaches too little in so few rows
        assert after > before + 0.01
    log = trainer.state.log_history[0]
    assert ("alpha_on_data" in log) == (method in ("token_only", "sampled_logprobs"))
    assert ("alpha_upper_bound_on_data" in log) == ("teacher_tail_mass" in log) == (method == "top_k_tail")


def test_what_the_signal_cannot_serve_is_refused_before_training(tokenizer, distilled, options):
    with pytest.raises(ValueError, match=r"'sampled_counts' cannot serve .*'tvd'.*'sampled_logprobs' \(unbiased\)"):
        make_trainer(tokenizer, distilled["sampled_counts"], options, divergence="tvd")
    with pytest.raises(ValueError, match="'sampled_logprobs' cannot serve the divergence 'jsd'"):
        make_trainer(tokenizer, distilled["sampled_logprobs"], options, divergence="jsd")
    with pytest.raises(ValueError, match=r"at temperature 1.0.*Set `temperature=1.0`"):
        make_trainer(tokenizer, distilled["sampled_logprobs"], options, temperature=2.0)
    with pytest.raises(ValueError, match="'sampled_counts' cannot serve the divergence 'target_entropy'"):
        make_trainer(tokenizer, distilled["sampled_counts"], options, token_selection="target_entropy")
    make_trainer(tokenizer, distilled["sampled_logprobs"], options, token_selection="target_entropy")


def test_text_that_is_no_draw_from_the_stored_distribution_is_refused(target, tokenizer, distilled, options):
    greedy = generate_responses(
        target,
        TEXTS[:4],
        processing_class=tokenizer,
        max_new_tokens=8,
        temperature=0.0,
        teacher_signal="token_only",
        show_progress=False,
    )
    with pytest.raises(
        ValueError, match=r"raw, at temperature 1.0\), but the completions are sampled at temperature 0.0"
    ):
        make_trainer(tokenizer, greedy, options)
    scored = score_completions(
        target, distilled["token_only"], processing_class=tokenizer, teacher_signal="token_only", show_progress=False
    )
    with pytest.raises(ValueError, match="of unknown sampling"):
        make_trainer(tokenizer, scored, options)
    with pytest.raises(ValueError, match="exact replay"):
        replay(build_llama(seed=0), None, scored, temperature=1.0, max_new_tokens=16)
    known = score_completions(
        target, distilled["token_only"], processing_class=tokenizer, teacher_signal="token_only",
        sampling_temperature=1.0, max_new_tokens=16, show_progress=False,
    )  # fmt: skip
    make_trainer(tokenizer, known, options)
    for mine, theirs in zip(known, distilled["token_only"], strict=True):
        assert mine["teacher_token_logprobs"] == pytest.approx(theirs["teacher_token_logprobs"], abs=1e-4)


def test_another_tokenizer_a_mixture_and_missing_signals_are_refused(tokenizer, distilled, options):
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["<|more|>"])
    with pytest.raises(VocabularyMismatchError, match="made with another tokenizer"):
        make_trainer(other, distilled["token_only"], options, build_llama(seed=0, vocab_size=300))
    parts = [distilled[name].remove_columns(["teacher_signal"]) for name in ("sampled_counts", "top_k_tail")]
    with pytest.raises(ValueError, match=r"mixes teacher signals of two kinds .*method: sampled_counts and top_k_tail"):
        make_trainer(tokenizer, concatenate_datasets(parts), options)
    plain = distilled["token_only"].remove_columns(["teacher_info", "teacher_token_logprobs"])
    with pytest.raises(ValueError, match="or a dataset with its signal"):
        make_trainer(tokenizer, plain, options)
    with pytest.raises(
        ValueError, match="evaluation dataset has no teacher signal, the training set one of 'token_only'"
    ):
        make_trainer(tokenizer, distilled["token_only"], options, eval_dataset=plain)
    row = dict(distilled["sampled_counts"][0])
    row["completion_ids"] = row["completion_ids"][:-1]
    with pytest.raises(ValueError, match=r"Row 0: A teacher signal of .* does not belong to"):
        make_trainer(tokenizer, Dataset.from_list([row]), options)


def test_streaming_workers_and_shuffling_keep_the_signal_with_its_tokens(tokenizer, distilled, options):
    stream = distilled["sampled_logprobs"].to_iterable_dataset(num_shards=2)
    trainer = make_trainer(tokenizer, stream, options, dataloader_num_workers=2, max_length=24)
    truth = {}
    for row in distilled["token_only"]:
        ids = tuple(row["prompt_ids"] + row["completion_ids"])
        truth[ids[:24]] = row
    seen = 0
    for batch in trainer.get_train_dataloader():
        for i, ids in enumerate(batch["input_ids"]):
            length = int(batch["attention_mask"][i].sum())
            row = truth[tuple(ids[:length].tolist())]
            start = len(row["prompt_ids"])
            weights = batch[SPARSE_TENSORS["weight"]][i]
            assert not weights[:start].any() and not weights[length:].any()
            torch.testing.assert_close(weights[start:length].sum(-1), torch.ones(length - start))
            seen += 1
    assert seen == len(TEXTS)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 12)), min_size=1, max_size=12),
    max_length=st.integers(4, 30),
    packing=st.sampled_from([None, "bfd", "bfd_split", "wrapped"]),
    seed=st.sampled_from([None, 3]),
    batch_size=st.integers(1, 4),
)
def test_every_entry_stays_with_its_token(lengths, max_length, packing, seed, batch_size):
    """Entries that name their token, through joining, truncation, packing, shuffling and batching."""
    token = iter(range(10, 10_000))
    rows = []
    for prompt, completion in lengths:
        ids = [next(token) for _ in range(completion)]
        rows.append({
            "prompt_ids": [next(token) for _ in range(prompt)], "completion_ids": ids,
            "teacher_token_logprobs": [-float(i) for i in ids], "reference_forward_kl": [float(i) for i in ids],
        })  # fmt: skip
    columns = ["teacher_token_logprobs", "reference_forward_kl"]
    dataset = cut_and_pack(
        to_training_rows(Dataset.from_list(rows), token_columns=columns), columns, max_length=max_length,
        truncation_mode="keep_start", packing_strategy=packing, shuffle_seed=seed, name="test",
    )  # fmt: skip

    def pad(examples):
        width = max(len(row["input_ids"]) for row in examples)
        return {
            name: torch.tensor([row[name] + [fill] * (width - len(row[name])) for row in examples])
            for name, fill in (("input_ids", 0), ("labels", -100))
        }

    collate, kept = TokenColumnCollator(pad), 0
    for start in range(0, len(dataset), batch_size):
        batch = collate([dataset[i] for i in range(start, min(start + batch_size, len(dataset)))])
        is_written = batch["labels"] != -100
        kept += int(is_written.sum())
        for name, sign in zip(columns, (-1, 1), strict=True):
            assert torch.equal(batch[name][is_written], sign * batch["labels"][is_written].float())
            assert batch[name][~is_written].isnan().all()
    if packing in ("bfd_split", "wrapped"):
        assert kept == sum(completion for _, completion in lengths)


def test_a_draft_is_evaluated_from_the_set_alone(target, tokenizer, distilled):
    draft = build_llama(seed=0)
    for sampling in ("stochastic", "greedy"):
        common = {"temperature": 1.0, "max_new_tokens": 16, "num_assistant_tokens": 3, "draft_sampling": sampling}
        live = replay(draft, target, distilled["token_only"], **common)
        stored = replay(draft, None, distilled["token_only"], **common)
        assert stored.block_efficiency == pytest.approx(live.block_efficiency, rel=1e-4)
        assert stored.acceptance_rate == pytest.approx(live.acceptance_rate, rel=1e-3, abs=1e-5)
    with pytest.raises(ValueError, match=r"row 0 has none\. Pass `target`"):
        replay(
            draft, None, distilled["token_only"].remove_columns(["teacher_info"]), temperature=1.0, max_new_tokens=16
        )


def test_the_callback_takes_a_distilled_set_in_place_of_a_target(target, tokenizer, distilled, options):
    greedy = generate_responses(
        target, TEXTS[:6], processing_class=tokenizer, max_new_tokens=16, temperature=0.0, teacher_signal="token_only",
        show_progress=False,
    )  # fmt: skip
    held_out = concatenate_datasets([greedy, distilled["token_only"].select(range(6))])
    callback = SpeculativeEvalCallback(held_out, num_assistant_tokens=3)
    assert callback.temperatures == (0.0, 1.0) and callback.max_new_tokens == 16
    trainer = make_trainer(
        tokenizer, distilled["sampled_logprobs"], options, callbacks=[callback], eval_strategy="steps", eval_steps=2,
        eval_dataset=distilled["sampled_logprobs"],
    )  # fmt: skip
    draft = copy.deepcopy(trainer.model)
    trainer.train()
    first = callback.history[0][1]
    for temperature, responses in ((0.0, greedy), (1.0, distilled["token_only"].select(range(6)))):
        live = replay(
            build_llama(seed=0), target, responses, temperature=temperature, num_assistant_tokens=3, max_new_tokens=16
        )
        assert first[temperature].block_efficiency == pytest.approx(live.block_efficiency, rel=1e-4)
    assert "eval_loss" in {key for log in trainer.state.log_history for key in log}
    del draft
    with pytest.raises(ValueError, match="responses with a `teacher_signal` at each of the `temperatures`"):
        SpeculativeEvalCallback(held_out, temperatures=(0.5,), trainer=trainer).on_train_begin(
            trainer.args, trainer.state, trainer.control
        )


def test_the_card_says_how_the_teacher_was_kept(tokenizer, distilled, options, tmp_path):
    trainer = make_trainer(tokenizer, distilled["top_k_tail"], options)
    trainer.create_model_card()
    assert "coarsened from top_k_tail" in (tmp_path / "run" / "README.md").read_text()


def test_a_compiled_draft_learns_the_same(tokenizer, distilled, options):
    """Dynamo cannot trace what a stored signal is read into: the loss stays outside of what it compiles."""
    results = []
    for compiled in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        trainer = make_trainer(tokenizer, distilled["sampled_logprobs"], options, max_steps=1, **compiled)
        trainer.train()
        results.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert results[1] == pytest.approx(results[0], rel=1e-5) and len(results[0]) == 1
