"""Training on text that the target did not write, against a dense float64 reference."""

import copy

import pytest
import torch
from datasets import Dataset, IterableDataset
from tiny import build_llama

from spec_kd import (
    BlackBoxSFTConfig,
    BlackBoxSFTTrainer,
    WhiteBoxDistillConfig,
    WhiteBoxDistillTrainer,
    score_completions,
    tokenize_corpus,
)

TEXTS = [f"{word} {i} of the tree" for i in range(3) for word in ("The leaf", "A", "What lives under the bark")]
TURNS = [
    {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "How?"}, {"role": "assistant", "content": "So"},
]  # fmt: skip


@pytest.fixture
def make_trainer(tokenizer, options):
    def make(rows, draft=None, teacher_model=None, **overrides):
        args = {**options, "completion_only_loss": False, "per_device_train_batch_size": 64, **overrides}
        return WhiteBoxDistillTrainer(
            model=draft or build_llama(seed=0), args=WhiteBoxDistillConfig(**args), teacher_model=teacher_model,
            train_dataset=rows if isinstance(rows, IterableDataset) else Dataset.from_dict(rows),
            processing_class=tokenizer,
        )  # fmt: skip

    return make


def compute_first_loss(trainer):
    batch = next(iter(trainer.get_train_dataloader()))
    return trainer.compute_loss(trainer.model.train(), trainer._prepare_inputs(batch))


LAYOUTS = {
    "padded": {"max_length": None},
    "packed": {"packing": True, "max_length": 64},
    "split": {"packing": True, "packing_strategy": "bfd_split", "max_length": 10},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_token_counts_and_no_document_sees_another(layout, target, tokenizer, make_trainer, reference_loss):
    draft = build_llama(seed=0)
    reference = copy.deepcopy(draft).double()
    trainer = make_trainer({"text": TEXTS}, draft, target, **LAYOUTS[layout])
    assert (len(trainer.train_dataset) < len(TEXTS)) == (layout == "packed")
    limit = 10 if layout == "split" else None
    rows = tokenize_corpus(Dataset.from_dict({"text": TEXTS}), tokenizer, max_length=limit)
    loss = compute_first_loss(trainer)
    expected = reference_loss(reference, copy.deepcopy(target).double(), rows.to_list())
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    loss.backward()
    expected.backward()
    for (name, parameter), other in zip(draft.named_parameters(), reference.parameters(), strict=True):
        assert (parameter.grad.double() - other.grad).norm() < 1e-4 * other.grad.norm(), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_stored_signal_of_all_ids_is_the_live_teacher(layout, target, tokenizer, make_trainer):
    limit = 10 if layout == "split" else None
    corpus = tokenize_corpus(Dataset.from_dict({"text": TEXTS}), tokenizer, max_length=limit)
    scored = score_completions(
        target, corpus, processing_class=tokenizer, teacher_signal="top_k_tail", signal_top_k=261
    )
    losses, gradients = [], []
    for rows, teacher in ((scored.to_dict(), None), ({"text": TEXTS}, target)):
        draft = build_llama(seed=0)
        only = {"completion_only_loss": None} if teacher is None else {}
        trainer = make_trainer(rows, draft, teacher, shuffle_dataset=False, **LAYOUTS[layout], **only)
        loss = compute_first_loss(trainer)
        loss.backward()
        losses.append(loss.item())
        gradients.append(draft.model.embed_tokens.weight.grad)
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    assert (gradients[0] - gradients[1]).norm() < 5e-3 * gradients[1].norm()


@pytest.mark.parametrize(
    "rows",
    [
        {"messages": [TURNS]},
        {"prompt": [TURNS[:3]], "completion": [TURNS[3:]]},
        {"prompt": ["One and "], "completion": ["two"]},
        {"input_ids": [[5, 6, 7, 1]]},
        {"prompt_ids": [[5, 6]], "completion_ids": [[7, 1]]},
        {"text": ["One and two"]},
    ],
    ids=lambda rows: " ".join(rows),
)
def test_prompts_and_the_turns_of_users_are_trained_on(rows, target, make_trainer, caplog):
    with caplog.at_level("WARNING"):
        trained = make_trainer(rows, teacher_model=target).train_dataset
    assert all(row["labels"] == row["input_ids"] for row in trained) and len(trained) == 1
    assert "written by the target" not in caplog.text


def test_a_stream_of_text_is_packed(target, make_trainer):
    stream = IterableDataset.from_generator(lambda: iter({"text": text} for text in TEXTS))
    trainer = make_trainer(stream, teacher_model=target, **LAYOUTS["split"], per_device_train_batch_size=2)
    trainer.train()
    assert trainer.state.global_step == 2


def test_only_the_target_s_distribution_makes_any_text_of_use(tokenizer, options, target, make_trainer):
    rows = Dataset.from_dict({"text": TEXTS})
    with pytest.raises(ValueError, match="use WhiteBoxDistillTrainer with `completion_only_loss=False`"):
        BlackBoxSFTTrainer(
            model=build_llama(), args=BlackBoxSFTConfig(**options, completion_only_loss=False), train_dataset=rows,
            processing_class=tokenizer,
        )  # fmt: skip
    with pytest.raises(ValueError, match="`completion_only_loss=False`"):
        make_trainer({"text": TEXTS}, teacher_model=target, completion_only_loss=None)
