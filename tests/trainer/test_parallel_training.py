"""Training of parallel drafts against plain loops that run each block alone."""

import copy
import logging

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny import build_llama, build_tokenizer
from transformers import AutoModelForCausalLM

from spec_kd import (
    BlackBoxSFTConfig,
    BlackBoxSFTTrainer,
    OnlineGKDConfig,
    WhiteBoxDistillConfig,
    WhiteBoxDistillTrainer,
    generate_responses,
)
from spec_kd.losses import dense_divergence
from spec_kd.parallel import ParallelDrafting, read_parallel_drafting

MASK = 261
FULL = {"num_parallel_tokens": 3, "parallel_retention": 1.0}


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|mask|>"]})
    return tokenizer


@pytest.fixture
def draft():
    return build_llama(seed=0, vocab_size=262)


@pytest.fixture
def target():
    return build_llama(seed=1, vocab_size=262, hidden_size=48, layers=3)


def make_trainer(draft, tokenizer, dataset, options, teacher_model=None, **overrides):
    named = {k: overrides.pop(k) for k in list(overrides) if k in ("peft_config", "eval_dataset")}
    return WhiteBoxDistillTrainer(
        model=draft, args=WhiteBoxDistillConfig(**{**options, **FULL, **overrides}), processing_class=tokenizer,
        train_dataset=dataset, teacher_model=teacher_model, **named,
    )  # fmt: skip


def make_black_box(draft, tokenizer, dataset, options, **overrides):
    return BlackBoxSFTTrainer(
        model=draft, args=BlackBoxSFTConfig(**{**options, **FULL, **overrides}), processing_class=tokenizer,
        train_dataset=dataset,
    )  # fmt: skip


def compute_first_loss(trainer):
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    return trainer.compute_loss(trainer.model.train(), batch)


def run_blocks_alone(draft, rows, num_tokens=3):
    """For each row and start: where the completion's token begins, and the draft's logits `(k, V)`, run alone."""
    for row in rows:
        ids, first = row["prompt_ids"] + row["completion_ids"], len(row["prompt_ids"])
        for token in range(first, len(ids)):
            count = min(num_tokens, len(ids) - token)
            text = torch.tensor([ids[:token] + [MASK] * (num_tokens - 1)])
            yield ids, token, draft(input_ids=text).logits[0, token - 1 :][:count].double()


def compute_expected(draft, target, rows, weighting="position", divergence="forward_kl", weights=(1, 1, 1)):
    """The loss, and the mean over blocks of the expected accepted length, from full logits in float64."""
    blocks, sums = list(run_blocks_alone(draft, rows)), torch.zeros(2, dtype=torch.float64)
    available = torch.tensor([sum(len(logits) > k for _, _, logits in blocks) for k in range(3)])
    assert (available > 0).all()
    for ids, token, z in blocks:
        with torch.no_grad():
            t = target(input_ids=torch.tensor([ids])).logits[0, token - 1 :][: len(z)].double()
        p, q = t.softmax(-1), z.softmax(-1)
        alpha = torch.minimum(p, q).sum(-1)
        value = dense_divergence(z, t, divergence)
        reach = alpha.cumprod(-1)
        if weighting == "expected_length":
            loss = (1 - reach).sum()
        elif weighting == "d_pace":
            smooth = (0.5 + 0.5 * alpha.detach()).cumprod(-1)
            loss = (smooth.flip(-1).cumsum(-1).flip(-1) * value).sum()
        elif weighting == "target_confidence":
            written = p.gather(-1, torch.tensor(ids[token : token + len(z)])[:, None])[:, 0]
            loss = (torch.cat([torch.ones(1).double(), written[:-1]]).cumprod(-1) * value).sum()
        else:
            loss = (torch.tensor(weights, dtype=torch.float64)[: len(z)] * value).sum() / sum(weights)
        sums = sums + torch.stack([loss, reach.sum().detach()])
    return sums / len(blocks)


def assert_equal_gradients(draft, reference, tolerance=2e-4):
    for (name, ours), theirs in zip(draft.named_parameters(), reference.parameters(), strict=True):
        assert (ours.grad.double() - theirs.grad).norm() <= tolerance * theirs.grad.norm(), name


@pytest.mark.parametrize(
    "choice",
    [
        {},
        {"parallel_position_weights": [2.0, 1.0, 0.5], "divergence": "jsd"},
        {"parallel_weighting": "expected_length"},
        {"parallel_weighting": "d_pace"},
        {"parallel_weighting": "target_confidence"},
    ],
    ids=lambda choice: choice.get("parallel_weighting", "position"),
)
def test_loss_and_gradients_equal_blocks_that_run_alone(draft, target, tokenizer, rows, options, choice):
    reference, live = copy.deepcopy(draft).double(), copy.deepcopy(target).double()
    trainer = make_trainer(draft, tokenizer, Dataset.from_list(rows[:4]), options, target, **choice)
    loss = compute_first_loss(trainer)
    loss.backward()
    expected, accepted = compute_expected(
        reference, live, rows[:4], trainer.args.parallel_weighting, trainer.args.divergence,
        choice.get("parallel_position_weights", (1, 1, 1)),
    )  # fmt: skip
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-6)
    assert_equal_gradients(draft, reference)
    metrics = trainer._metrics["train"]
    assert metrics["accepted_tokens_on_data"] == [pytest.approx(accepted.item(), rel=1e-4)]
    assert {f"alpha_on_data{end}" for end in ("", "_2", "_3")} <= metrics.keys()
    tokens = sum(len(row["prompt_ids"] + row["completion_ids"]) for row in rows[:4])
    assert metrics["num_tokens"] == [tokens]  # the masks do not count


def test_packed_equals_unpacked_and_accumulated(draft, target, tokenizer, rows, options):
    """All rows in one step, so that nothing but the layout of the batch differs."""
    ways = (
        {"per_device_train_batch_size": 16},
        {"per_device_train_batch_size": 16, "packing": True, "max_length": 64},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8},
    )
    trained = []
    for way in ways:
        model = copy.deepcopy(draft)
        trainer = make_trainer(
            model, tokenizer, Dataset.from_list(rows), {**options, "max_steps": 1, "optim": "sgd"}, target, **way
        )
        trainer.train()
        trained.append((trainer.state.log_history[0]["loss"], model))
    for loss, model in trained[1:]:
        assert loss == pytest.approx(trained[0][0], rel=1e-4)
        for name, weight in model.state_dict().items():
            torch.testing.assert_close(weight, trained[0][1].state_dict()[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("weighting", ["position", "expected_length", "target_confidence"])
def test_a_stored_signal_of_all_ids_is_the_live_teacher(target, tokenizer, options, weighting):
    responses = generate_responses(
        target, ["a", "hello there", "1 + 1 ="], processing_class=tokenizer, max_new_tokens=12, temperature=1.0,
        teacher_signal="top_k_tail", signal_top_k=262, show_progress=False, seed=3,
    )  # fmt: skip
    assert not any(MASK in ids for ids in responses["completion_ids"])
    results = []
    for teacher in (None, target):
        draft = build_llama(seed=0, vocab_size=262)
        trainer = make_trainer(draft, tokenizer, responses, options, teacher, parallel_weighting=weighting)
        loss = compute_first_loss(trainer)
        loss.backward()
        results.append((loss, draft))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-5)
    # a signal has log p in steps of 0.001, and the gradient of the TVD jumps where p = q
    assert_equal_gradients(results[0][1], results[1][1], tolerance=0.05)


def test_evaluations_and_other_runs_choose_the_same_places(draft, target, tokenizer, dataset, options):
    trainer = make_trainer(
        draft, tokenizer, dataset, options, target, parallel_retention=0.5, eval_dataset=dataset, max_steps=3
    )
    first, second = (trainer.evaluate()["eval_loss"] for _ in range(2))
    assert first == second
    batch = next(iter(trainer.get_train_dataloader()))
    counts = [torch.bincount(trainer._build_layout(batch).blocks.position).tolist() for _ in range(2)]
    assert counts[0] == counts[1] == [counts[0][0], round(counts[0][0] / 2), round(counts[0][0] / 4)]
    draft.train()
    slots = [trainer._build_layout(batch).slots for _ in range(2)]
    assert not torch.equal(*slots)
    losses = []
    for _ in range(2):
        fresh = build_llama(seed=0, vocab_size=262)
        trainer = make_trainer(fresh, tokenizer, dataset, options, target, parallel_retention=0.5, max_steps=3)
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("weighting", ["position", "d_pace"])
def test_black_box_loss_and_gradients_equal_blocks_that_run_alone(draft, tokenizer, rows, options, weighting):
    reference = copy.deepcopy(draft).double()
    trainer = make_black_box(draft, tokenizer, Dataset.from_list(rows[:4]), options, parallel_weighting=weighting)
    loss = compute_first_loss(trainer)
    loss.backward()
    blocks, expected, hits = list(run_blocks_alone(reference, rows[:4])), 0.0, []
    for ids, token, logits in blocks:
        written = torch.tensor(ids[token : token + len(logits)])
        value = torch.nn.functional.cross_entropy(logits, written, reduction="none")
        weights = torch.full_like(value, 1 / 3)
        if weighting == "d_pace":
            weights = (0.5 + 0.5 * (-value.detach()).exp()).cumprod(-1).flip(-1).cumsum(-1).flip(-1)
        expected = expected + (weights * value).sum() / len(blocks)
        hits += [(logits.argmax(-1) == written)[1:2]]
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-6)
    assert_equal_gradients(draft, reference)
    metrics = trainer._metrics["train"]
    assert metrics["mean_token_accuracy_2"] == [pytest.approx(torch.cat(hits).double().mean().item())]
    assert len(metrics["mean_token_accuracy"]) == 1


@pytest.mark.parametrize("make", [make_trainer, make_black_box])
def test_a_draft_learns_its_later_positions_and_is_saved_as_a_parallel_one(target, tokenizer, tmp_path, options, make):
    """A text that repeats: what comes three tokens later is certain, and an untrained mask does not know it."""
    row = {"prompt_ids": [10, 11, 12, 13], "completion_ids": [10, 11, 12, 13] * 5 + [1]}
    teacher = {"teacher_model": target} if make is make_trainer else {}
    trainer = make(
        build_llama(seed=0, vocab_size=262), tokenizer, Dataset.from_list([row] * 4), {**options, "max_steps": 60},
        **teacher, parallel_retention=0.7,
    )  # fmt: skip
    trainer.train()
    name = "alpha_on_data" if teacher else "mean_token_accuracy"
    first, last = trainer.state.log_history[0], trainer.state.log_history[59]
    assert last["loss"] < first["loss"]
    for key in (name, f"{name}_2", f"{name}_3"):
        assert last[key] > first[key] + 0.2, key
    trainer.save_model(str(tmp_path / "saved"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert read_parallel_drafting(saved.config) == ParallelDrafting(MASK, 3)
    again = make(saved, tokenizer, Dataset.from_list([row] * 4), {**options, "num_parallel_tokens": 2}, **teacher)
    assert again.parallel.mask_token_id == MASK


def test_lora_trains_the_mask_token_and_is_saved_merged(caplog, target, tokenizer, dataset, options, tmp_path):
    caplog.set_level(logging.WARNING)
    with_row = LoraConfig(r=2, trainable_token_indices={"embed_tokens": [MASK]})
    for tie, adapter, is_frozen in ((True, LoraConfig(r=2), True), (False, with_row, False)):
        caplog.clear()
        draft = build_llama(seed=0, vocab_size=262, tie=tie)
        before = draft.get_input_embeddings().weight.detach().clone()
        folder = str(tmp_path / str(is_frozen))
        trainer = make_trainer(draft, tokenizer, dataset, options, target, peft_config=adapter, merge_adapter=True)
        assert ("The embedding of the mask token (261) is frozen" in caplog.text) == is_frozen
        trainer.train()
        trainer.save_model(folder)
        saved = AutoModelForCausalLM.from_pretrained(folder)
        assert read_parallel_drafting(saved.config) == ParallelDrafting(MASK, 3)
        after = saved.get_input_embeddings().weight
        assert torch.equal(after[MASK], before[MASK]) == is_frozen
        torch.testing.assert_close(after[:MASK], before[:MASK])
    with pytest.raises(ValueError, match="merge_adapter=True"):
        make_trainer(build_llama(vocab_size=262), tokenizer, dataset, options, target, peft_config=LoraConfig(r=2))
    with pytest.raises(ValueError, match="The loss reads the frozen head"):
        make_trainer(
            build_llama(vocab_size=262), tokenizer, dataset, options, target, peft_config=with_row, merge_adapter=True
        )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_parallel_tokens": 1}, "at least 2"),
        ({"num_parallel_tokens": None}, "`parallel_retention` belongs to parallel drafts"),
        ({"parallel_retention": 0.0}, "above 0"),
        ({"parallel_weighting": "best"}, "expected_length"),
        ({"parallel_position_weights": [1.0, 2.0]}, "one for each of the 3 positions"),
        ({"parallel_position_weights": [0.0, 0.0, 0.0]}, "not only zeros"),
        ({"parallel_position_weights": [1.0, 1.0, 1.0], "parallel_weighting": "d_pace"}, "decides the weights"),
        ({"d_pace_smoothing": 0.3}, "`d_pace_smoothing` has no use"),
        ({"parallel_weighting": "expected_length", "divergence": "forward_kl"}, "with `divergence='tvd'` alone"),
        ({"parallel_weighting": "expected_length", "ce_weight": 0.1}, "with `divergence='tvd'` alone"),
        ({"token_selection": "rejected"}, "Leave one of them out"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, overrides, message):
    with pytest.raises(ValueError, match=message):
        WhiteBoxDistillConfig(**{**options, **FULL, **overrides})


def test_losses_and_trainers_that_cannot_have_masks_are_refused(options, draft, tokenizer, dataset):
    with pytest.raises(ValueError, match="which black-box training does not have"):
        BlackBoxSFTConfig(**options, **FULL, parallel_weighting="target_confidence")
    with pytest.raises(ValueError, match="is for drafts that learn from completions that exist"):
        OnlineGKDConfig(**options, **FULL)
    with pytest.raises(ValueError, match="a loss of its own for each position"):
        make_black_box(draft, tokenizer, dataset, options, loss_type="dft")


def test_texts_and_tokenizers_without_a_free_mask_token_are_refused(draft, target, tokenizer, rows, options):
    dataset = Dataset.from_list([*rows, {"prompt_ids": [7, MASK], "completion_ids": [8, 1]}])
    with pytest.raises(ValueError, match=r"Row 16 of the training dataset has the mask token '<\|mask\|>' \(261\)"):
        make_trainer(draft, tokenizer, dataset, options, target, shuffle_dataset=False)
    stream = make_trainer(draft, tokenizer, dataset.to_iterable_dataset(), {**options, "max_steps": 9}, target)
    with pytest.raises(ValueError, match="A batch has the mask token"):
        stream.train()
    with pytest.raises(ValueError, match="can stand in a text, so none can be the mask token"):
        fresh = build_llama(seed=0, vocab_size=262)
        make_trainer(fresh, build_tokenizer(), Dataset.from_list(rows), options, target)
    with pytest.raises(ValueError, match="stands in texts"):
        make_trainer(draft, tokenizer, Dataset.from_list(rows), options, target, parallel_mask_token="<|end|>")


def test_a_parallel_draft_is_not_trained_without_its_masks(draft, target, tokenizer, dataset, options):
    make_trainer(draft, tokenizer, dataset, options, target)
    with pytest.raises(ValueError, match="Set `num_parallel_tokens=3`"):
        WhiteBoxDistillTrainer(
            model=draft, args=WhiteBoxDistillConfig(**options), processing_class=tokenizer, train_dataset=dataset,
            teacher_model=target,
        )  # fmt: skip
