import copy
import json

import pytest
from datasets import Dataset
from peft import LoraConfig
from transformers import EarlyStoppingCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from spec_kd.data.responses import generate_responses
from spec_kd.evaluation import callback as callback_module
from spec_kd.evaluation.callback import SpeculativeEvalCallback
from spec_kd.evaluation.response_replay import replay
from spec_kd.trainer import WhiteBoxDistillConfig, WhiteBoxDistillTrainer

PROMPTS = ["hello there", "two words", "x"]


@pytest.fixture
def options(tmp_path):
    return {
        "output_dir": str(tmp_path / "run"),
        "max_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "no",
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 1,
    }


@pytest.fixture
def dataset():
    return Dataset.from_list([{"prompt": prompt, "completion": "some answer"} for prompt in PROMPTS * 2])


@pytest.fixture
def build(pair, tokenizer, dataset, options):
    """A plain TRL trainer of the draft with the callback bound to it."""

    def build(callback, callbacks=(), model=None, peft_config=None, **overrides):
        trainer = SFTTrainer(
            model=model or pair[0],
            args=SFTConfig(**{**options, **overrides}),
            train_dataset=dataset,
            eval_dataset=dataset,
            processing_class=tokenizer,
            peft_config=peft_config,
            callbacks=[*callbacks, callback],
        )
        callback.bind(trainer)
        return trainer

    return build


def find_logs(trainer, name="eval_block_efficiency"):
    return [log for log in trainer.state.log_history if name in log]


def test_figures_before_during_and_after(build, pair, tokenizer):
    draft, target = pair
    callback = SpeculativeEvalCallback(PROMPTS, target, num_assistant_tokens=2, max_new_tokens=8)
    before = copy.deepcopy(draft)
    trainer = build(callback)
    trainer.train()
    logs = find_logs(trainer)
    assert [log["step"] for log in logs] == [step for step, _ in callback.history] == [0, 1, 2]
    assert {name for name in logs[0] if name.startswith("eval_")} == {
        "eval_alpha_greedy",
        "eval_alpha_t1",
        "eval_acceptance_rate",
        "eval_block_efficiency",
        "eval_acceptance_rate_pos_1",
        "eval_acceptance_rate_pos_2",
        "eval_acceptance_rate_t1",
        "eval_block_efficiency_t1",
        "eval_acceptance_rate_pos_1_t1",
        "eval_acceptance_rate_pos_2_t1",
        "eval_share_looping",
        "eval_share_looping_t1",
        "eval_share_untemplated",
        "eval_share_untemplated_t1",
    }
    for temperature, name, suffix in ((0.0, "greedy", ""), (1.0, "t1", "_t1")):
        texts = generate_responses(
            target,
            PROMPTS,
            processing_class=tokenizer,
            max_new_tokens=8,
            temperature=temperature,
            show_progress=False,
        )
        expected = replay(
            before, target, texts, temperature=temperature, num_assistant_tokens=2, max_new_tokens=8, vocab_size=261
        )
        assert logs[0][f"eval_alpha_{name}"] == pytest.approx(expected.alpha.value, abs=1e-6)
        assert logs[0][f"eval_block_efficiency{suffix}"] == pytest.approx(expected.block_efficiency.value, abs=1e-5)
        assert callback.history[0][1][temperature].tokens.tolist() == expected.tokens.tolist()
    assert logs[0]["eval_alpha_t1"] != logs[2]["eval_alpha_t1"]  # the draft that trains is the draft that is measured
    assert not trainer.args.eval_on_start  # as the user left it
    json.dumps(trainer.state.log_history)


def test_the_target_writes_once(build, pair, monkeypatch):
    calls = []

    def generate(*args, **kwargs):
        calls.append(kwargs["temperature"])
        return generate_responses(*args, **kwargs)

    monkeypatch.setattr(callback_module, "generate_responses", generate)
    callback = SpeculativeEvalCallback(PROMPTS, pair[1], max_new_tokens=4, temperatures=(0.7, 0.0))
    trainer = build(callback)
    trainer.train()
    assert calls == [0.7, 0.0]
    assert "eval_alpha_t0.7" in find_logs(trainer)[0] and "eval_block_efficiency_greedy" in find_logs(trainer)[0]


def test_best_model_and_early_stopping(build, pair):
    class LearnNothing(TrainerCallback):
        """A falling alpha: noise that grows at every step."""

        def on_step_end(self, args, state, control, model=None, **_):
            for weight in model.parameters():
                weight.data += 0.1 * state.global_step * weight.data.roll(1, 0)

    callback = SpeculativeEvalCallback(PROMPTS, pair[1], max_new_tokens=8, temperatures=(1.0,))
    trainer = build(
        callback,
        # before ours in the list: it must find the metric all the same
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2), LearnNothing()],
        max_steps=10,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="alpha_t1",
        greater_is_better=True,
    )
    trainer.train()
    alphas = [log["eval_alpha_t1"] for log in find_logs(trainer)]
    assert trainer.state.best_metric == max(alphas[1:]) and trainer.state.best_global_step == 1
    assert trainer.state.global_step == 3  # patience of two
    assert trainer.evaluate()["eval_alpha_t1"] == pytest.approx(alphas[1], abs=1e-6)  # the best one is loaded


def test_a_resumed_run_does_not_repeat_the_evaluation_of_its_checkpoint(build, pair):
    def run(**resume):
        callback = SpeculativeEvalCallback(PROMPTS, pair[1], max_new_tokens=4, temperatures=(0.0,))
        trainer = build(callback, model=copy.deepcopy(pair[0]), save_strategy="steps", save_steps=1)
        trainer.train(**resume)
        return trainer, [step for step, _ in callback.history]

    trainer, steps = run()
    assert steps == [0, 1, 2]
    resumed, steps = run(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-1")
    assert steps == [2]
    last, again = (find_logs(t)[-1] for t in (trainer, resumed))
    assert {k: v for k, v in last.items() if "alpha" in k} == {k: v for k, v in again.items() if "alpha" in k}


def test_assisted(build, pair):
    draft, target = pair
    target.train()
    shipped = target.generation_config
    callback = SpeculativeEvalCallback(
        PROMPTS, target, method="assisted", num_assistant_tokens=2, max_new_tokens=6, temperatures=(0.0, 0.7)
    )
    trainer = build(callback, max_steps=1)
    trainer.train()
    log = find_logs(trainer)[0]
    for suffix in ("", "_t0.7"):
        for name in ("tokens_per_second_assisted", "tokens_per_second_plain", "speedup", "acceptance_rate"):
            assert f"eval_{name}{suffix}" in log
    figures = callback.history[0][1][0.0]
    texts = callback._responses[0.0]
    assert figures.completion_ids == texts["completion_ids"]  # lossless, and the same EOS
    replayed = replay(draft, target, texts, num_assistant_tokens=2, max_new_tokens=6, temperature=0.0)
    assert figures.method == "assisted" and replayed.method == "replay"
    assert log["eval_alpha_greedy"] == callback.history[0][1][0.0].alpha.value
    assert log["eval_alpha_t0.7"] < 1
    assert target.generation_config is shipped and target.training


def test_peft_draft(build, pair):
    callback = SpeculativeEvalCallback(PROMPTS, pair[1], max_new_tokens=4, temperatures=(1.0,))
    trainer = build(callback, peft_config=LoraConfig(r=4, target_modules=["q_proj"]), learning_rate=0.1)
    trainer.train()
    alphas = [log["eval_alpha_t1"] for log in find_logs(trainer)]
    assert len(set(alphas)) == 3


def test_our_trainers_bind_it_and_give_their_teacher(pair, tokenizer, options):
    draft, target = pair
    rows = Dataset.from_list([{"prompt_ids": [5, 6, 7], "completion_ids": [8, 9, 1]}] * 4)
    callback = SpeculativeEvalCallback(PROMPTS, max_new_tokens=4)
    trainer = WhiteBoxDistillTrainer(
        draft,
        WhiteBoxDistillConfig(**options),
        teacher_model=target,
        train_dataset=rows,
        eval_dataset={"one": rows, "two": rows},
        processing_class=tokenizer,
        callbacks=[callback],
    )
    trainer.train()
    assert [step for step, _ in callback.history] == [0, 1, 2]  # once, not once for each dataset
    assert [log["step"] for log in find_logs(trainer)] == [0, 1, 2]
    metrics = trainer.evaluate()
    assert metrics["eval_alpha_greedy"] == callback.history[-1][1][0.0].alpha.value and len(callback.history) == 4


def test_trackers_get_every_figure(build, pair, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    callback = SpeculativeEvalCallback(PROMPTS, pair[1], max_new_tokens=4, num_assistant_tokens=1)
    trainer = build(callback, report_to=["tensorboard"], max_steps=1)
    trainer.train()
    folder = next(p.parent for p in tmp_path.rglob("events.out.tfevents*"))
    events = EventAccumulator(str(folder)).Reload()
    for name, value in ((n, v) for n, v in find_logs(trainer)[0].items() if n.startswith("eval_")):
        first = events.Scalars(f"eval/{name.removeprefix('eval_')}")[0]
        assert (first.step, first.value) == (0, pytest.approx(value))
    assert [picture.step for picture in events.Images("eval/acceptance")] == [0, 1]


def test_unbound_it_still_fills_the_metrics(pair, tokenizer, dataset, options):
    callback = SpeculativeEvalCallback(PROMPTS, pair[1], processing_class=tokenizer, max_new_tokens=4)
    trainer = SFTTrainer(
        model=pair[0],
        args=SFTConfig(**options),
        train_dataset=dataset,
        eval_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[callback],
    )
    assert "eval_alpha_greedy" in trainer.evaluate() and not find_logs(trainer)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "`prompts` is empty"),
        ({"prompts": Dataset.from_dict({"text": ["a"]})}, "neither `prompt`"),
        ({"num_assistant_tokens": 0}, "`num_assistant_tokens`"),
        ({"max_new_tokens": 1}, "`max_new_tokens` is 1"),
        ({"temperatures": (0.0, -1.0)}, "`temperatures` is -1.0"),
        ({"temperatures": ()}, "`temperatures` is"),
        ({"temperatures": (1.0, 1.0)}, "`temperatures` is"),
        ({"method": "guess"}, "'guess', but must be one of replay, assisted"),
        ({"draft_sampling": "guess"}, "`draft_sampling` is 'guess'"),
        ({"method": "assisted", "draft_sampling": "greedy"}, "does not exist in transformers"),
        ({"batch_size": 0}, "`batch_size` is 0"),
    ],
)
def test_bad_arguments_are_refused_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        SpeculativeEvalCallback(**{"prompts": PROMPTS, **arguments})


def test_a_run_without_evaluations_or_target_is_refused_when_it_begins(build, pair):
    with pytest.raises(ValueError, match="Set `eval_strategy='steps'`"):
        build(SpeculativeEvalCallback(PROMPTS, pair[1]), eval_strategy="no").train()
    with pytest.raises(ValueError, match="has no target"):
        build(SpeculativeEvalCallback(PROMPTS)).train()
