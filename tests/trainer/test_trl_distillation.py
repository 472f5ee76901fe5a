"""Scripts of TRL's `GKDTrainer` and `DistillationTrainer` with the class swapped."""

import pytest
import torch
from datasets import Dataset
from tiny import build_llama
from trl import DistillationConfig
from trl.experimental.gkd import GKDConfig

from spec_kd import OnlineGKDConfig, OnlineGKDTrainer
from spec_kd.trainer.arguments import as_config

PROMPTS = [{"prompt": [{"role": "user", "content": f"{i} plus {i}?"}]} for i in range(4)]


def make_trainer(args, tokenizer, draft=None, eval_dataset=None):
    return OnlineGKDTrainer(
        model=draft or build_llama(seed=0), teacher_model=build_llama(seed=1), args=args,
        train_dataset=Dataset.from_list(PROMPTS), eval_dataset=eval_dataset, processing_class=tokenizer,
    )  # fmt: skip


def test_configurations_of_trl_are_taken_over_with_their_values(tmp_path):
    common = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False}
    gkd = as_config(GKDConfig(**common, max_new_tokens=7), OnlineGKDConfig, None)
    assert (gkd.divergence, gkd.beta, gkd.temperature, gkd.generation_temperature) == ("jsd", 0.5, 0.9, 0.9)
    assert (gkd.lmbda, gkd.max_new_tokens, gkd.disable_dropout) == (0.5, 7, True)
    args = DistillationConfig(**common, max_completion_length=9, temperature=0.7, teacher_model_revision="v2")
    distillation = as_config(args, OnlineGKDConfig, None)
    assert (distillation.divergence, distillation.lmbda, distillation.learning_rate) == ("reverse_kl", 1.0, 1e-6)
    assert (distillation.max_new_tokens, distillation.generation_temperature) == (9, 0.7)
    assert distillation.teacher_model_init_kwargs == {"revision": "v2"} and args.teacher_model_init_kwargs is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_p": 0.1}, "`min_p=0.1` of DistillationConfig .*top_p"),
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2"),
        ({"generation_kwargs": {"num_beams": 2}}, "generation_kwargs"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "column"),
        ({"max_tool_calling_iterations": 2}, "max_tool_calling_iterations=2"),
    ],
)
def test_options_without_a_meaning_here_are_refused_by_name(tmp_path, options, message):
    args = DistillationConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **options)
    with pytest.raises(ValueError, match=message):
        as_config(args, OnlineGKDConfig, None)


def test_names_of_trl_in_our_configuration(options):
    assert OnlineGKDConfig(**options, max_completion_length=9).max_new_tokens == 9
    with pytest.raises(ValueError, match="same option"):
        OnlineGKDConfig(**options, max_completion_length=9, max_new_tokens=10)
    with pytest.raises(ValueError, match=r"sample_from='target'` with `lmbda=1\.0"):
        OnlineGKDConfig(**options, seq_kd=True)
    with pytest.raises(ValueError, match="'v1' in `teacher_model_init_kwargs` differ"):
        OnlineGKDConfig(**options, teacher_model_revision="v2", teacher_model_init_kwargs={"revision": "v1"})


def test_dropout_is_disabled_and_the_defaults_are_said(options, tokenizer, caplog):
    args = OnlineGKDConfig(**options, lmbda=1.0, max_completion_length=3, disable_dropout=True)
    draft = build_llama(seed=0)
    draft.model.layers[0].mlp.dropout = torch.nn.Dropout(0.5)
    with caplog.at_level("WARNING"):
        make_trainer(args, tokenizer, draft=draft)
    assert draft.model.layers[0].mlp.dropout.p == 0
    assert "Divergence forward_kl at temperature 1.0, learning rate 0.01" in caplog.text
    assert "`GKDConfig` has beta=0.5 and temperature=0.9" in caplog.text


def test_defaults_that_are_said_are_those_of_trl():
    assert (GKDConfig.beta, GKDConfig.temperature) == (0.5, 0.9)
    assert (DistillationConfig.beta, DistillationConfig.learning_rate) == (1.0, 1e-6)


def test_evaluation_on_prompts_alone_is_on_what_the_draft_writes(options, tokenizer):
    args = OnlineGKDConfig(**options, lmbda=1.0, max_new_tokens=4, per_device_eval_batch_size=2)
    prompts = Dataset.from_list(PROMPTS)
    trainer = make_trainer(args, tokenizer, eval_dataset=prompts)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] > 0 and trainer.evaluate()["eval_loss"] == metrics["eval_loss"]
    both = trainer.evaluate({"one": prompts, "other": prompts.select([0, 1])})
    assert both["eval_one_loss"] == pytest.approx(metrics["eval_loss"]) and both["eval_other_loss"] > 0
    with_completions = Dataset.from_list([{"prompt": "a", "completion": "b"}])
    assert trainer.evaluate(with_completions)["eval_loss"] > 0
    with pytest.raises(ValueError, match=r"sets \['one'\] have prompts only"):
        trainer.evaluate({"one": prompts, "other": with_completions})
    off_policy = OnlineGKDConfig(**options, lmbda=0.0)
    rows = Dataset.from_list([{"prompt": "a", "completion": "b"}])
    with pytest.raises(ValueError, match="nothing writes their completions"):
        OnlineGKDTrainer(build_llama(seed=0), off_policy, train_dataset=rows, eval_dataset=prompts,
                         processing_class=tokenizer, teacher_model=build_llama(seed=1))  # fmt: skip
