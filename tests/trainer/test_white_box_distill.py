"""The trainer's loss, gradients and weights against plain loops over dense float64 references."""

import copy

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny import build_llama
from transformers import Gemma2Config, Gemma2ForCausalLM, MixtralConfig, MixtralForCausalLM
from trl import SFTConfig

from spec_kd import WhiteBoxDistillConfig, WhiteBoxDistillTrainer
from spec_kd.vocabulary import VocabularyMismatchError


def make_trainer(draft, target, tokenizer, dataset, options, **overrides):
    arguments = {"processing_class": tokenizer, "train_dataset": dataset, "teacher_model": target}
    named = {k: overrides.pop(k) for k in list(overrides) if k in ("peft_config", "callbacks", "eval_dataset")}
    return WhiteBoxDistillTrainer(
        model=draft, args=WhiteBoxDistillConfig(**{**options, **overrides}), **arguments, **named
    )


def first_batch(trainer):
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def losses(trainer):
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same_weights(a, b, tolerance=2e-5):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("divergence", "temperature"), [("forward_kl", 1.0), ("reverse_kl", 2.0), ("jsd", 0.7)])
@pytest.mark.parametrize("tie", [True, False])
def test_loss_and_gradients_equal_dense_float64_reference(
    target, tokenizer, rows, options, reference_loss, divergence, temperature, tie
):
    draft = build_llama(seed=0, tie=tie)
    reference = copy.deepcopy(draft).double()
    trainer = make_trainer(
        draft, target, tokenizer, Dataset.from_list(rows[:4]), options, divergence=divergence, temperature=temperature
    )
    loss = trainer.compute_loss(trainer.model, first_batch(trainer))
    loss.backward()
    expected = reference_loss(reference, copy.deepcopy(target).double(), rows[:4], 261, divergence, temperature)
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    for (name, parameter), (_, other) in zip(draft.named_parameters(), reference.named_parameters(), strict=True):
        error = (parameter.grad.double() - other.grad).norm() / other.grad.norm()
        assert error < 1e-4, (name, error)


def test_soft_capped_teacher_and_draft_equal_dense_reference(tokenizer, rows, options, reference_loss):
    """Gemma 2 caps its logits: a head called as a bare matrix product would train on another distribution."""

    def build(seed, hidden_size):
        torch.manual_seed(seed)
        config = Gemma2Config(
            vocab_size=261, hidden_size=hidden_size, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, final_logit_softcapping=2.0, initializer_range=0.3, pad_token_id=0,
            eos_token_id=1, bos_token_id=None,
        )  # fmt: skip
        return Gemma2ForCausalLM(config).eval()

    draft, target = build(0, 32), build(1, 48)
    reference = copy.deepcopy(draft).double()
    trainer = make_trainer(draft, target, tokenizer, Dataset.from_list(rows[:4]), options)
    loss = trainer.compute_loss(trainer.model, first_batch(trainer))
    loss.backward()
    expected = reference_loss(reference, copy.deepcopy(target).double(), rows[:4])
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-5)
    gradient, other = draft.model.embed_tokens.weight.grad, reference.model.embed_tokens.weight.grad
    assert (gradient.double() - other).norm() / other.norm() < 1e-3


def test_biased_head_and_mixture_of_experts_keep_their_terms(target, tokenizer, rows, options, reference_loss):
    """A head with a bias, and a router whose auxiliary loss TRL adds with its own weight."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=261, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, router_aux_loss_coef=0.5, output_router_logits=True,
        initializer_range=0.2, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    draft = MixtralForCausalLM(config).eval()
    draft.lm_head = torch.nn.Linear(32, 261, bias=True)
    torch.nn.init.normal_(draft.lm_head.bias)
    reference = copy.deepcopy(draft)  # the experts' kernel has no float64
    trainer = make_trainer(draft, target, tokenizer, Dataset.from_list(rows[:4]), options)
    inputs = first_batch(trainer)
    loss = trainer.compute_loss(trainer.model, dict(inputs))
    loss.backward()
    ids = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    aux_loss = reference(**ids, output_router_logits=True).aux_loss
    expected = reference_loss(reference, copy.deepcopy(target).double(), rows[:4]) + 0.5 * aux_loss
    expected.backward()
    torch.testing.assert_close(loss.double(), expected.double(), rtol=1e-4, atol=1e-5)
    for name in ("lm_head.weight", "lm_head.bias", "model.embed_tokens.weight"):
        gradient, other = draft.get_parameter(name).grad.double(), reference.get_parameter(name).grad
        assert (gradient - other).norm() / other.norm() < 1e-3, name


def test_quantised_head_is_refused_before_the_teacher_is_loaded(tokenizer, dataset, options):
    draft = build_llama(seed=0, tie=False)
    draft.lm_head.weight = torch.nn.Parameter(torch.zeros(261, 32, dtype=torch.int8), requires_grad=False)
    teacher = build_llama(seed=1)
    with pytest.raises(ValueError, match=r"head \(Linear\) has weights of dtype torch.int8"):
        make_trainer(draft, teacher, tokenizer, dataset, options)
    assert any(p.requires_grad for p in teacher.parameters())  # not touched yet


def test_accumulation_1x8_equals_8x1(target, tokenizer, dataset, options):
    runs = []
    for batch_size, accumulation in ((8, 1), (1, 8)):
        draft = build_llama(seed=0)
        trainer = make_trainer(
            draft, target, tokenizer, dataset, options,
            per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        trainer.train()
        runs.append((losses(trainer), weights(draft)))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-5)
    assert_same_weights(runs[0][1], runs[1][1], 1e-4)


def test_packed_equals_unpacked(target, tokenizer, rows, options):
    """All rows in one step, so that packing changes nothing but the layout."""
    runs = []
    for packing in (False, True):
        draft = build_llama(seed=0)
        trainer = make_trainer(
            draft, target, tokenizer, Dataset.from_list(rows), options,
            packing=packing, max_length=64, max_steps=1, per_device_train_batch_size=16,
        )  # fmt: skip
        if packing:
            assert len(trainer.train_dataset) < len(rows)
        trainer.train()
        runs.append((losses(trainer), weights(draft)))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-5)
    assert_same_weights(runs[0][1], runs[1][1], 1e-4)


@pytest.mark.parametrize("overrides", [{"gradient_checkpointing": True}, {"per_device_train_batch_size": 2}])
def test_gradient_checkpointing_and_resume_end_with_the_same_weights(target, tokenizer, dataset, options, overrides):
    options = {**options, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "linear"}
    whole = build_llama(seed=0)
    trainer = make_trainer(whole, target, tokenizer, dataset, options, **overrides)
    trainer.train()
    resumed = build_llama(seed=5)  # must come from the checkpoint
    trainer = make_trainer(resumed, target, tokenizer, dataset, options, **overrides)
    trainer.train(resume_from_checkpoint=f"{options['output_dir']}/checkpoint-2")
    assert_same_weights(weights(whole), weights(resumed), 1e-6)
    if overrides.get("gradient_checkpointing"):
        plain = build_llama(seed=0)
        make_trainer(plain, target, tokenizer, dataset, options).train()
        assert_same_weights(weights(whole), weights(plain), 1e-5)


def test_teacher_is_frozen_and_padded_heads_train_on_real_ids_only(tokenizer, rows, options, reference_loss):
    for draft_rows, teacher_rows in ((261, 288), (288, 261)):
        draft = build_llama(seed=0, vocab_size=draft_rows, tie=False)
        target = build_llama(seed=1, vocab_size=teacher_rows, hidden_size=48)
        for model in (draft, target):
            with torch.no_grad():
                model.lm_head.weight[261:] = 5.0  # padding that would dominate the softmax
        reference, before = copy.deepcopy(draft).double(), weights(target)
        trainer = make_trainer(draft, target, tokenizer, Dataset.from_list(rows[:4]), options)
        loss = trainer.compute_loss(trainer.model, first_batch(trainer))
        expected = reference_loss(reference, copy.deepcopy(target).double(), rows[:4], vocab_size=261)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
        trainer.train()
        assert not target.training and not any(p.requires_grad for p in target.parameters())
        assert_same_weights(before, weights(target), 0.0)
        assert trainer._get_target_vocab_size() == teacher_rows


def test_lora_trains_adapters_only_and_matches_full_reference(target, tokenizer, rows, options, reference_loss):
    draft = build_llama(seed=0)
    before = weights(draft)
    trainer = make_trainer(
        draft, target, tokenizer, Dataset.from_list(rows[:4]), options,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    )  # fmt: skip
    expected = reference_loss(build_llama(seed=0).double(), copy.deepcopy(target).double(), rows[:4])
    loss = trainer.compute_loss(trainer.model, first_batch(trainer))  # LoRA starts as the identity
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    trainer.train()
    assert losses(trainer)[1] < losses(trainer)[0]
    after = trainer.model.get_base_model().state_dict()
    for name, value in before.items():
        key = name if name in after else name.replace(".weight", ".base_layer.weight")
        assert torch.equal(after[key], value), name


def test_head_in_modules_to_save_is_trained(target, tokenizer, dataset, options):
    draft = build_llama(seed=0, tie=False)
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    trainer = make_trainer(draft, target, tokenizer, dataset, options, peft_config=config)
    head = trainer.model.get_base_model().lm_head
    copy_before = head.modules_to_save["default"].weight.detach().clone()
    original_before = head.original_module.weight.detach().clone()
    trainer.train()
    assert not torch.equal(head.modules_to_save["default"].weight, copy_before)
    assert torch.equal(head.original_module.weight, original_before)


def test_lora_on_the_head_and_prompt_learning_are_refused_by_name(target, tokenizer, dataset, options):
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match="lm_head"):
        make_trainer(build_llama(tie=False), target, tokenizer, dataset, options, peft_config=config)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="Prompt-learning"):
        make_trainer(build_llama(), target, tokenizer, dataset, options, peft_config=config)
    with pytest.raises(ValueError, match="Prompt-learning"):
        make_trainer(get_peft_model(build_llama(), config), target, tokenizer, dataset, options)


def test_all_masked_batch_gives_a_finite_zero_loss(draft, target, tokenizer, rows, options):
    trainer = make_trainer(draft, target, tokenizer, Dataset.from_list(rows), options)
    inputs = first_batch(trainer)
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is None or not p.grad.any() for p in draft.parameters())


def test_bf16_autocast_trains(draft, target, tokenizer, rows, options, reference_loss):
    expected = reference_loss(draft, target, rows[:4]).item()
    trainer = make_trainer(draft, target, tokenizer, Dataset.from_list(rows[:4]), options, bf16=True)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(expected, rel=0.03)
    assert losses(trainer)[1] < losses(trainer)[0]
    assert all(p.dtype == torch.float32 for p in draft.parameters())


def test_metrics_evaluation_and_streaming_data(draft, target, tokenizer, rows, options, reference_loss):
    stream = IterableDataset.from_generator(lambda: iter(rows))
    trainer = make_trainer(draft, target, tokenizer, stream, options, eval_dataset=Dataset.from_list(rows[:4]))
    expected = reference_loss(draft, target, rows[:4]).item()
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-4)
    assert 0.0 < metrics.get("eval_alpha_on_data", trainer.state.log_history[-1]["eval_alpha_on_data"]) < 1.0
    trainer.train()
    log = trainer.state.log_history[-2]
    assert {"loss", "entropy", "mean_token_accuracy", "alpha_on_data", "num_tokens"} <= log.keys()


def test_a_draft_equal_to_its_teacher_has_no_loss(tokenizer, dataset, options):
    trainer = make_trainer(build_llama(seed=3), build_llama(seed=3), tokenizer, dataset, options, max_steps=1)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(0.0, abs=1e-6)
    assert trainer.state.log_history[0]["alpha_on_data"] == pytest.approx(1.0, abs=1e-5)


def test_sft_script_runs_with_the_class_changed(draft, target, tokenizer, options):
    """An `SFTConfig`, conversational rows with tools, callbacks: nothing but the class and the teacher is new."""
    row = {
        "prompt": [{"role": "user", "content": "Weather?"}],
        "completion": [{"role": "assistant", "content": "Sun."}],
        "tools": '[{"name": "get_weather"}]',
    }
    options = {**options, "bf16": False}
    trainer = WhiteBoxDistillTrainer(
        model=draft, teacher_model=target, args=SFTConfig(**options), processing_class=tokenizer,
        train_dataset=Dataset.from_list([row] * 4),
    )  # fmt: skip
    ids = trainer.train_dataset[0]["input_ids"]
    assert "get_weather" in tokenizer.decode(ids)
    completion = [i for i in trainer.train_dataset[0]["labels"] if i != -100]
    assert tokenizer.decode(completion) == "Sun.<|end|>"
    assert isinstance(trainer.args, WhiteBoxDistillConfig) and trainer.args.learning_rate == 1e-2
    trainer.train()


def test_models_and_tokenizers_by_path(tmp_path, draft, target, tokenizer, dataset, options):
    for name, model in (("draft", draft), ("target", target)):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    trainer = WhiteBoxDistillTrainer(
        model=str(tmp_path / "draft"), train_dataset=dataset,
        args=WhiteBoxDistillConfig(
            **options,
            teacher_model_name_or_path=str(tmp_path / "target"),
            teacher_model_init_kwargs={"dtype": "float32"},
        ),
    )  # fmt: skip
    assert trainer.processing_class.get_vocab() == tokenizer.get_vocab()
    trainer.train()
    assert losses(trainer)[1] < losses(trainer)[0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"divergence": "kl"}, "forward_kl, jsd, lk_hybrid"),
        ({"temperature": 0.0}, "must be above 0"),
        ({"divergence": "jsd", "beta": 1.0}, "disagree"),
        ({"loss_type": "dft"}, "belongs to SFT"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
    ],
)
def test_bad_configuration_is_refused(options, overrides, message):
    with pytest.raises(ValueError, match=message):
        WhiteBoxDistillConfig(**{**options, **overrides})


def test_bad_input_is_refused_before_work(tmp_path, draft, target, tokenizer, dataset, options):
    def build(**changes):
        arguments = {"model": draft, "teacher_model": target, "processing_class": tokenizer, "train_dataset": dataset}
        overrides = changes.pop("options", {})
        return WhiteBoxDistillTrainer(
            **{**arguments, **changes}, args=WhiteBoxDistillConfig(**{**options, **overrides})
        )

    with pytest.raises(ValueError, match=r"teacher_model. is required"):
        build(teacher_model=None)
    with pytest.raises(ValueError, match="same object"):
        build(teacher_model=draft)
    with pytest.raises(ValueError, match="is empty"):
        build(train_dataset=dataset.select([]))
    with pytest.raises(ValueError, match=r"columns \['text'\]"):
        build(train_dataset=Dataset.from_dict({"text": ["a"]}))
    with pytest.raises(ValueError, match=r"All 16 completions .* `max_length=2`"):
        build(options={"max_length": 2})
    with pytest.raises(VocabularyMismatchError, match="teacher's head has 200 rows but the tokenizer has 261"):
        build(teacher_model=build_llama(vocab_size=200))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        build(options={"output_dir": str(tmp_path / "file" / "run")})
    bare = copy.deepcopy(tokenizer)
    bare.eos_token = None
    bare.pad_token = None
    with pytest.raises(ValueError, match="eos_token"):
        build(processing_class=bare)


def test_another_tokenizer_is_refused_with_the_difference(draft, target, tokenizer, dataset, options):
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["<|extra|>"])
    with pytest.raises(VocabularyMismatchError, match="BlackBoxSFTTrainer"):
        WhiteBoxDistillTrainer(
            model=draft, teacher_model=target, processing_class=tokenizer, teacher_processing_class=other,
            train_dataset=dataset, args=WhiteBoxDistillConfig(**options),
        )  # fmt: skip


def test_cut_rows_are_counted(caplog, draft, target, tokenizer, rows, options):
    cut = sum(len(r["prompt_ids"]) + len(r["completion_ids"]) > 8 for r in rows)
    lost = sum(len(r["prompt_ids"]) >= 8 for r in rows)
    assert 0 < lost < cut < 16
    with caplog.at_level("WARNING"):
        trainer = make_trainer(draft, target, tokenizer, Dataset.from_list(rows), options, max_length=8)
    assert f"cuts {cut} of 16 rows; {lost} rows" in caplog.text
    assert len(trainer.train_dataset) == 16 - lost
