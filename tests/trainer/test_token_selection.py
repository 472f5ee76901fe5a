"""Token selection, reference drafts and the further options of the loss, through the trainer."""

import copy

import pytest
import torch
from datasets import Dataset
from tiny import build_llama

from spec_kd import WhiteBoxDistillConfig, WhiteBoxDistillTrainer
from spec_kd.data.reference_scores import add_reference_scores
from spec_kd.losses import DIVERGENCES, Divergence, dense_divergence, register_divergence
from spec_kd.losses.selection import select_top_fraction


@pytest.fixture
def target():
    return build_llama(seed=1, hidden_size=48)


def make_trainer(target, tokenizer, dataset, options, draft=None, **overrides):
    named = {k: overrides.pop(k) for k in list(overrides) if k in ("ref_model", "eval_dataset")}
    return WhiteBoxDistillTrainer(
        model=draft or build_llama(seed=0), teacher_model=target, processing_class=tokenizer, train_dataset=dataset,
        args=WhiteBoxDistillConfig(**{**options, **overrides}), **named,
    )  # fmt: skip


def compute_first_loss(trainer):
    return trainer.compute_loss(
        trainer.model.train(), trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    )


def dense_tokens(model, row):
    """Logits that predict the completion, `(n, V)`, in float64."""
    ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
    start = len(row["prompt_ids"]) - 1
    return model(input_ids=ids).logits[0, start:-1].double()


def expected_loss(rows, draft, target, reference=None, fraction=0.4, divergence="tvd"):
    """Mean over all tokens, those not selected counting as zero; from full logits."""
    total, count, kept = 0.0, 0, 0
    for row in rows:
        z, t = dense_tokens(draft, row), dense_tokens(target, row)
        if reference is None:
            score = torch.distributions.Categorical(logits=t).entropy()
        else:
            score = dense_divergence(z, t, "forward_kl") - dense_divergence(
                dense_tokens(reference, row), t, "forward_kl"
            )
        mask = select_top_fraction(score, torch.zeros(len(score), dtype=torch.long), fraction)
        total = total + dense_divergence(z, t, divergence)[mask].sum().item()
        count, kept = count + len(score), kept + int(mask.sum())
    return total / count, kept / count


@pytest.mark.parametrize("kind", ["live", "column", "packed", "entropy"])
def test_selected_loss_equals_the_dense_one(target, tokenizer, rows, options, kind):
    reference = build_llama(seed=7)
    rows, dataset = rows[:4], Dataset.from_list(rows[:4])
    overrides = {"divergence": "tvd", "token_selection": "adaspec", "ref_model": reference}
    if kind in ("column", "packed"):
        del overrides["ref_model"]
        dataset = add_reference_scores(dataset, reference, target, vocab_size=261, batch_size=3, show_progress=False)
        overrides |= {"packing": True, "max_length": 128} if kind == "packed" else {}
    if kind == "entropy":
        overrides = {"divergence": "tvd", "token_selection": "target_entropy"}
    draft = build_llama(seed=0)
    expected, share = expected_loss(
        rows, copy.deepcopy(draft), copy.deepcopy(target), None if kind == "entropy" else copy.deepcopy(reference)
    )
    trainer = make_trainer(target, tokenizer, dataset, options, draft, **overrides)
    loss = compute_first_loss(trainer)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert trainer._metrics["train"]["token_share_kept"] == [pytest.approx(share)]
    loss.backward()
    assert draft.model.embed_tokens.weight.grad.abs().sum() > 0


def test_reference_scores_are_the_dense_ones(target, rows):
    reference = build_llama(seed=7)
    scored = add_reference_scores(
        Dataset.from_list(rows), reference, target, vocab_size=261, temperature=2.0, batch_size=5, show_progress=False
    )
    for row, scores in zip(rows, scored["reference_forward_kl"], strict=True):
        expected = dense_divergence(
            dense_tokens(reference, row), dense_tokens(target, row), "forward_kl", temperature=2.0
        )
        torch.testing.assert_close(torch.tensor(scores).double(), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="already"):
        add_reference_scores(scored, reference, target, vocab_size=261)
    with pytest.raises(ValueError, match="generate_responses"):
        add_reference_scores(Dataset.from_dict({"text": ["a"]}), reference, target, vocab_size=261)


@pytest.mark.parametrize("selection", ["adaspec", "rejected", "target_entropy"])
def test_accumulation_1x8_equals_8x1(target, tokenizer, dataset, options, selection):
    ends = []
    for batch_size, accumulation in ((8, 1), (1, 8)):
        draft = build_llama(seed=0)
        trainer = make_trainer(
            target, tokenizer, dataset, options, draft, token_selection=selection, lr_scheduler_type="constant",
            ref_model=build_llama(seed=7) if selection == "adaspec" else None, optim="sgd",
            per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        trainer.train()
        assert 0 < trainer.state.log_history[0]["token_share_kept"] <= 1
        ends.append(draft.state_dict())
    for name in ends[0]:
        torch.testing.assert_close(ends[0][name], ends[1][name], rtol=1e-4, atol=1e-5)


def test_evaluation_is_over_all_tokens(target, tokenizer, rows, options, reference_loss):
    dataset = Dataset.from_list(rows[:4])
    expected = reference_loss(build_llama(seed=0), target, rows[:4]).item()
    trainer = make_trainer(target, tokenizer, dataset, options, token_selection="rejected", eval_dataset=dataset)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)
    assert "token_share_kept" not in trainer._metrics["eval"]


def test_truncation_cuts_the_column_with_its_tokens(target, tokenizer, rows, options):
    column = [[float(i) for i in row["completion_ids"]] for row in rows]  # an entry that names its token
    dataset = Dataset.from_list(rows).add_column("reference_forward_kl", column)
    for overrides in ({"max_length": 9}, {"max_length": 30, "packing": True}):
        trainer = make_trainer(target, tokenizer, dataset, options, token_selection="adaspec", **overrides)
        for batch in trainer.get_train_dataloader():
            is_token = batch["labels"] != -100
            values = batch["reference_forward_kl"]
            assert torch.equal(values[is_token], batch["labels"][is_token].float())
            assert batch["input_ids"].shape == values.shape


@pytest.mark.parametrize("divergence", sorted(DIVERGENCES))
def test_every_divergence_trains_and_is_on_the_card(target, tokenizer, dataset, options, tmp_path, divergence):
    trainer = make_trainer(
        target, tokenizer, dataset, options, divergence=divergence, ce_weight=0.1, max_steps=20, learning_rate=3e-3
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "alpha_on_data" in log]
    assert logs[-1]["alpha_on_data"] > logs[0]["alpha_on_data"]
    trainer.create_model_card()
    card = (tmp_path / "run" / "README.md").read_text()
    assert divergence in card and "cross-entropy weight 0.1" in card


def test_an_outside_divergence_is_trained_by_name(target, tokenizer, dataset, options, monkeypatch):
    monkeypatch.setattr("spec_kd.losses.registry.DIVERGENCES", dict(DIVERGENCES))

    @register_divergence
    class ScaledForwardKL(Divergence):
        name = "scaled_forward_kl"

        def __init__(self, scale: float = 1.0):
            self.scale = scale

        def compute_value(self, d):
            return self.scale * (d.p * (d.log_p - d.log_q)).sum(-1)

        def compute_gradient(self, d, value):
            return self.scale * (d.q - d.p)

    own = make_trainer(
        target, tokenizer, dataset, options, divergence="scaled_forward_kl", divergence_kwargs={"scale": 3.0}
    )
    plain = make_trainer(target, tokenizer, dataset, options)
    assert compute_first_loss(own).item() == pytest.approx(3 * compute_first_loss(plain).item(), rel=1e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"token_selection": "best"}, "adaspec, rejected, target_entropy"),
        ({"token_selection": "rejected", "token_selection_fraction": 0.5}, "has no meaning"),
        ({"ce_weight": 1.0}, "BlackBoxSFTTrainer"),
        ({"divergence": "lk_hybrid", "divergence_kwargs": {"beta": 1}}, "Set `beta`"),
        ({"divergence": "tvd", "divergence_kwargs": '{"eta": 2}'}, "no option 'eta'"),
        ({"divergence": "lk_hybrid", "divergence_kwargs": {"eta": -1}}, "positive"),
    ],
)
def test_bad_options_are_refused_by_the_config(options, overrides, message):
    with pytest.raises(ValueError, match=message):
        WhiteBoxDistillConfig(**options, **overrides)


def test_a_reference_that_is_missing_useless_or_unfit_is_refused(target, tokenizer, dataset, options):
    with pytest.raises(ValueError, match="Pass `ref_model`, or a dataset with a `reference_forward_kl` column"):
        make_trainer(target, tokenizer, dataset, options, token_selection="adaspec")
    with pytest.raises(ValueError, match="only read by"):
        make_trainer(target, tokenizer, dataset, options, ref_model=build_llama(seed=7))
    with pytest.raises(ValueError, match="reference draft's head has 200 rows"):
        small = build_llama(seed=7, vocab_size=200)
        make_trainer(target, tokenizer, dataset, options, token_selection="adaspec", ref_model=small)
    short = dataset.add_column("reference_forward_kl", [[0.0]] * len(dataset))
    with pytest.raises(ValueError, match="one per token"):
        make_trainer(target, tokenizer, short, options, token_selection="adaspec")
    text = Dataset.from_dict({"prompt": ["a"], "completion": ["b"], "reference_forward_kl": [[0.0]]})
    with pytest.raises(ValueError, match="text instead of ids"):
        make_trainer(target, tokenizer, text, options, token_selection="adaspec")
