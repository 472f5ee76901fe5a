"""Embeddings and heads that are no plain matrices: trained by an adapter, or quantized inside a plain `nn.Linear`."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny import build_llama, build_tokenizer

from spec_kd import (
    WhiteBoxDistillConfig,
    WhiteBoxDistillTrainer,
    evaluate_draft,
    generate_responses,
    score_completions,
)
from spec_kd.data import add_reference_scores
from spec_kd.heads import check_logits_are_known, count_rows
from spec_kd.loading import load_model
from spec_kd.vocabulary import check_head_covers

ROWS = {"prompt_ids": [[5, 6, 7], [8, 9]] * 2, "completion_ids": [[10, 11, 1], [12, 13, 14, 1]] * 2}
ADAPTERS = {
    "LoRA on the embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "whole embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "whole tied embedding": {
        "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True,
    },
    "whole head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "single tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6]},
}  # fmt: skip


def make_trainer(draft, teacher, tmp_path, **options):
    config = WhiteBoxDistillConfig(
        output_dir=str(tmp_path), max_steps=2, learning_rate=1e-2, per_device_train_batch_size=4, logging_steps=1,
        report_to="none", use_cpu=True, bf16=False, save_strategy="no", **options,
    )  # fmt: skip
    return WhiteBoxDistillTrainer(
        draft, config, teacher_model=teacher, train_dataset=Dataset.from_dict(ROWS), processing_class=build_tokenizer()
    )


def compute_logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([[5, 6, 7, 8]])).logits


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapted_embeddings_and_heads(kind, tmp_path):
    build_llama(seed=1).save_pretrained(tmp_path / "base")
    model = get_peft_model(load_model(tmp_path / "base"), LoraConfig(task_type="CAUSAL_LM", r=2, **ADAPTERS[kind]))
    check_head_covers(model, 261, "target")
    assert count_rows(model.get_input_embeddings()) == count_rows(model.get_output_embeddings()) == 261
    check_logits_are_known(model, "teacher")
    texts = generate_responses(
        model, ["hello"], processing_class=build_tokenizer(), teacher_signal="token_only", max_new_tokens=4,
        show_progress=False,
    )  # fmt: skip
    assert len(texts["completion_ids"][0]) >= 1
    teacher = build_llama(seed=0, vocab_size=300)
    trainer = make_trainer(model, teacher, tmp_path / "out", merge_adapter=True, align_vocabulary=True)
    trainer.train()
    assert trainer.state.log_history[1]["loss"] < trainer.state.log_history[0]["loss"]
    trainer.save_model()
    saved = load_model(tmp_path / "out")
    assert saved.config.vocab_size == 300
    torch.testing.assert_close(compute_logits(saved)[..., :261], compute_logits(trainer.model), rtol=1e-4, atol=1e-5)


def quantize(with_head):
    torchao = pytest.importorskip("torchao.quantization")
    model = build_llama(seed=1, tie=False)

    def is_chosen(module, name):
        return isinstance(module, torch.nn.Linear) and (with_head or name != "lm_head")

    torchao.quantize_(model, torchao.Int8WeightOnlyConfig(), filter_fn=is_chosen)
    return model


@pytest.mark.parametrize("with_head", [False, True])
def test_a_target_of_quantized_weights(with_head, tmp_path):
    target, tokenizer = quantize(with_head), build_tokenizer()
    options = {"processing_class": tokenizer, "max_new_tokens": 5, "show_progress": False}
    plain = generate_responses(target, ["hello", "you"], **options)
    texts = generate_responses(
        target, ["hello", "you"], teacher_signal="token_only", output_dir=str(tmp_path / "texts"), **options
    )
    assert texts["completion_ids"] == plain["completion_ids"]
    scored = score_completions(target, Dataset.from_dict(ROWS), processing_class=tokenizer, show_progress=False)
    for row in scored:
        ids = row["prompt_ids"] + row["completion_ids"]
        with torch.no_grad():
            log_p = target(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        start = len(row["prompt_ids"])
        expected = [log_p[i - 1, ids[i]].item() for i in range(start, len(ids))]
        assert row["teacher_token_logprobs"] == pytest.approx(expected, abs=1e-5)
    report = evaluate_draft(build_llama(seed=0), target, ["hello"], temperatures=(0.0,), costs=None, **options)
    assert report.draft.settings[0].tokens > 0
    trainer = make_trainer(build_llama(seed=0), target, tmp_path / "out")
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 0


def test_a_quantized_head_is_refused_where_the_loss_needs_the_matrix(tmp_path):
    with pytest.raises(ValueError, match=r"The draft's head \(Linear\) has quantized weights \(Int8Tensor\)"):
        make_trainer(quantize(with_head=True), build_llama(seed=0), tmp_path)
    with pytest.raises(ValueError, match="The reference's head"):
        add_reference_scores(
            Dataset.from_dict(ROWS), quantize(with_head=True), build_llama(seed=0), vocab_size=261, show_progress=False
        )
