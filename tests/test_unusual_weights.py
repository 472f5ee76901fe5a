"""Embeddings and heads that are no plain matrices: trained by an adapter, or quantized inside a plain `nn.Linear`."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny import build_llama, build_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from spec_kd import (
    WhiteBoxDistillConfig,
    WhiteBoxDistillTrainer,
    evaluate_draft,
    generate_responses,
    score_completions,
)
from spec_kd.data.reference_scores import add_reference_scores
from spec_kd.heads import count_rows
from spec_kd.loading import load_model
from spec_kd.probes import check_logits_are_known
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


def make_trainer(draft, teacher, tmp_path, bf16=False, **options):
    config = WhiteBoxDistillConfig(
        output_dir=str(tmp_path), max_steps=2, learning_rate=1e-2, per_device_train_batch_size=4, logging_steps=1,
        report_to="none", use_cpu=True, bf16=bf16, save_strategy="no", **options,
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
        temperature=0.0, show_progress=False,
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


class Int8Weight(torch.Tensor):
    """A weight as torchao makes them: a tensor subclass of floating-point dtype that only `linear` can read."""

    @staticmethod
    def __new__(cls, numbers, scale):
        return torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=scale.dtype, device=numbers.device)

    def __init__(self, numbers, scale):
        self.numbers, self.scale = numbers, scale

    def __tensor_flatten__(self):
        return ["numbers", "scale"], None

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.linear:
            hidden, weight, *bias = args
            return function(hidden, weight.numbers.to(hidden.dtype) * weight.scale, *bias, **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].numbers, args[0].scale)
        raise NotImplementedError(f"Int8Weight does not implement {function}")


def quantize(with_head):
    model = build_llama(seed=1, tie=False)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and (with_head or name != "lm_head"):
            scale = module.weight.detach().abs().amax(dim=1, keepdim=True) / 127
            numbers = (module.weight.detach() / scale).round().to(torch.int8)
            module.weight = torch.nn.Parameter(Int8Weight(numbers, scale), requires_grad=False)
    return model


@pytest.mark.parametrize("with_head", [False, True])
def test_a_target_of_quantized_weights(with_head, tmp_path):
    target, tokenizer = quantize(with_head), build_tokenizer()
    options = {"processing_class": tokenizer, "max_new_tokens": 5, "show_progress": False}
    plain = generate_responses(target, ["hello", "you"], temperature=0.0, **options)
    texts = generate_responses(
        target,
        ["hello", "you"],
        temperature=0.0,
        teacher_signal="token_only",
        output_dir=str(tmp_path / "texts"),
        **options,
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
    with pytest.raises(ValueError, match=r"The draft's head \(Linear\) has quantized weights \(Int8Weight\)"):
        make_trainer(quantize(with_head=True), build_llama(seed=0), tmp_path)
    with pytest.raises(ValueError, match="The reference's head"):
        add_reference_scores(
            Dataset.from_dict(ROWS), quantize(with_head=True), build_llama(seed=0), vocab_size=261, show_progress=False
        )


def test_a_float16_teacher_under_bfloat16_autocast(tmp_path):
    """Its norms refuse a mixture of the two on a CPU, so it runs in its own dtype."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 261, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
    teacher = GPT2LMHeadModel(GPT2Config(**sizes, pad_token_id=0, bos_token_id=None, eos_token_id=1))
    exact = make_trainer(build_llama(seed=0), copy.deepcopy(teacher), tmp_path)
    exact.train()
    half = make_trainer(build_llama(seed=0), teacher.half(), tmp_path, bf16=True)
    half.train()
    losses = [trainer.state.log_history[0]["loss"] for trainer in (exact, half)]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


def test_rows_that_cannot_be_aligned_are_refused_before_training(tmp_path):
    draft = build_llama(seed=0, tie=False)
    draft.model.embed_tokens = torch.nn.Embedding(269, 32)
    with pytest.raises(ValueError, match="269 rows in its embedding and 261 in its head"):
        make_trainer(draft, build_llama(seed=1), tmp_path, align_vocabulary=True)
