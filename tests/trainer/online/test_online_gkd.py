"""Online distillation against offline distillation on the same text, and against itself."""

import copy
import json
from itertools import chain

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from tiny import build_llama

from spec_kd import OnlineGKDConfig, OnlineGKDTrainer, WhiteBoxDistillConfig, WhiteBoxDistillTrainer, replay

GREEDY = {"lmbda": 1.0, "generation_temperature": 0.0, "max_new_tokens": 8}


class Recorder(OnlineGKDTrainer):
    """Keeps what each forward pass was given."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        if self.model.training:
            self.seen = [*getattr(self, "seen", []), {name: inputs[name].clone() for name in ("input_ids", "labels")}]
        return super().compute_loss(model, inputs, *args, **kwargs)

    @property
    def responses(self):
        """(prompt, completion) of all rows, pass by pass."""
        return [
            [
                (tuple(ids[: labels.ne(-100).nonzero()[0]].tolist()), tuple(labels[labels != -100].tolist()))
                for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)
            ]
            for batch in self.seen
        ]


def make_trainer(draft, target, tokenizer, dataset, options, kind=Recorder, **overrides):
    named = {k: overrides.pop(k) for k in list(overrides) if k in ("peft_config", "eval_dataset", "ref_model")}
    config = OnlineGKDConfig if issubclass(kind, OnlineGKDTrainer) else WhiteBoxDistillConfig
    return kind(
        model=draft, teacher_model=target, args=config(**{**options, **overrides}), processing_class=tokenizer,
        train_dataset=dataset, **named,
    )  # fmt: skip


def losses(trainer):
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_equal_weights(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def write_alone(model, rows, max_new_tokens=8):
    """Rows with the greedy completions of `model`, one text at a time without cache."""
    written = []
    for row in rows:
        ids = list(row["prompt_ids"])
        while len(ids) < len(row["prompt_ids"]) + max_new_tokens:
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == 1:
                break
        start = len(row["prompt_ids"])
        written.append({"prompt_ids": ids[:start], "completion_ids": ids[start:]})
    return written


def as_responses(rows):
    return {(tuple(row["prompt_ids"]), tuple(row["completion_ids"])) for row in rows}


def test_without_generation_it_is_offline_distillation_to_the_bit(target, tokenizer, dataset, options):
    runs = []
    for kind, overrides in ((WhiteBoxDistillTrainer, {}), (OnlineGKDTrainer, {"lmbda": 0.0})):
        draft = build_llama(seed=0, attention_dropout=0.1)
        trainer = make_trainer(
            draft, target, tokenizer, dataset, options, kind, gradient_accumulation_steps=2, max_steps=3, **overrides
        )
        trainer.train()
        runs.append((losses(trainer), weights(draft)))
    assert runs[0][0] == runs[1][0]
    assert_equal_weights(runs[0][1], runs[1][1])


@pytest.mark.parametrize("writer", ["draft", "target"])
def test_a_step_equals_an_offline_step_on_the_same_text(target, tokenizer, rows, options, writer):
    """Dropout included: generation draws nothing from the random state of the training."""
    draft = build_llama(seed=0, attention_dropout=0.1)
    written = Dataset.from_list(write_alone({"draft": draft, "target": target}[writer], rows))
    options = {**options, "max_steps": 1, "gradient_accumulation_steps": 2}
    offline = copy.deepcopy(draft)
    expected = make_trainer(offline, target, tokenizer, written, options, WhiteBoxDistillTrainer)
    expected.train()
    trainer = make_trainer(draft, target, tokenizer, Dataset.from_list(rows), options, sample_from=writer, **GREEDY)
    trainer.train()
    assert set(chain(*trainer.responses)) <= as_responses(written)
    assert losses(trainer) == losses(expected)
    assert_equal_weights(weights(draft), weights(offline))


def test_the_text_is_that_of_the_draft_as_it_is_now(target, tokenizer, rows, options):
    draft, states = build_llama(seed=0), []

    class Keeper(Recorder):
        def get_batch_samples(self, *args):
            states.append(copy.deepcopy(weights(self.model)))
            return super().get_batch_samples(*args)

    trainer = make_trainer(draft, target, tokenizer, Dataset.from_list(rows[:4]), options, Keeper, **GREEDY)
    trainer.train()
    for state, responses in zip(states, trainer.responses, strict=True):
        writer = build_llama(seed=0)
        writer.load_state_dict(state)
        assert set(responses) == as_responses(write_alone(writer, rows[:4]))
    assert set(trainer.responses[0]) != set(trainer.responses[1])


def test_accumulation_1x4_equals_4x1(target, tokenizer, dataset, options):
    runs = []
    for batch_size, accumulation in ((4, 1), (1, 4)):
        draft = build_llama(seed=0)
        trainer = make_trainer(
            draft, target, tokenizer, dataset, options, per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation, **GREEDY,
        )  # fmt: skip
        trainer.train()
        runs.append((losses(trainer), weights(draft)))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-5)
    for name in runs[0][1]:
        torch.testing.assert_close(runs[0][1][name], runs[1][1][name], rtol=1e-4, atol=1e-4)


def test_the_same_seed_gives_the_same_run(target, tokenizer, dataset, options):
    runs = []
    for seed in (0, 0, 1):
        draft = build_llama(seed=0)
        trainer = make_trainer(
            draft, target, tokenizer, dataset, {**options, "seed": seed}, lmbda=0.5, max_new_tokens=8,
            train_sampling_strategy="sequential", sample_from="mixed", top_p=0.9,
        )  # fmt: skip
        trainer.train()
        runs.append((trainer.responses, weights(draft)))
    assert runs[0][0] == runs[1][0] != runs[2][0]
    assert_equal_weights(runs[0][1], runs[1][1])


@pytest.mark.parametrize("num_iterations", [1, 2])
@pytest.mark.parametrize("step", [3, 10])
def test_resuming_gives_the_same_weights(target, tokenizer, dataset, options, num_iterations, step):
    """Step 3 lies within a window that is used twice, step 10 in the second epoch or third."""
    options = {**options, "max_steps": 12, "save_strategy": "steps", "save_steps": step, "lmbda": 0.7}
    options |= {"max_new_tokens": 6, "num_iterations": num_iterations}
    whole = build_llama(seed=0, attention_dropout=0.1)
    first = make_trainer(whole, target, tokenizer, dataset, options)
    first.train()
    resumed = build_llama(seed=5, attention_dropout=0.1)  # must come from the checkpoint
    trainer = make_trainer(resumed, target, tokenizer, dataset, options)
    trainer.train(resume_from_checkpoint=f"{options['output_dir']}/checkpoint-{step}")
    assert trainer.responses == first.responses[step:]
    assert_equal_weights(weights(whole), weights(resumed))


def test_generated_text_is_used_for_several_steps(target, tokenizer, rows, options):
    dataset = Dataset.from_list(rows[:14])  # three steps of four, and two rows left
    trainer = make_trainer(
        build_llama(seed=0), target, tokenizer, dataset, {**options, "max_steps": -1, "num_train_epochs": 2},
        num_iterations=2, per_device_train_batch_size=2, gradient_accumulation_steps=2, lmbda=1.0, max_new_tokens=6,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 14
    passes = trainer.responses
    epochs = passes[:13], passes[13:]
    for epoch in epochs:
        for window in range(3):
            first, second = epoch[4 * window : 4 * window + 2], epoch[4 * window + 2 : 4 * window + 4]
            assert first == second
        assert {prompt for responses in epoch for prompt, _ in responses} == {tuple(r["prompt_ids"]) for r in rows[:14]}
    generated = chain(*(passes[4 * window + i] for window in range(3) for i in range(2)))
    assert len(set(generated)) == 12
    shares = [log["time/generation_share"] for log in trainer.state.log_history if "loss" in log]
    assert all(share > 0 for share in shares[:6:2]) and shares[1:6:2] == [0.0] * 3


def test_gradient_checkpointing_changes_nothing(target, tokenizer, dataset, options):
    runs = []
    for is_on in (False, True):
        draft = build_llama(seed=0)
        trainer = make_trainer(draft, target, tokenizer, dataset, options, gradient_checkpointing=is_on, **GREEDY)
        trainer.train()
        assert draft.is_gradient_checkpointing == is_on
        runs.append((trainer.responses, weights(draft)))
    assert runs[0][0] == runs[1][0]
    for name in runs[0][1]:
        torch.testing.assert_close(runs[0][1][name], runs[1][1][name], rtol=1e-5, atol=1e-5)


def test_training_raises_acceptance(target, tokenizer, options):
    """On text that the target samples to prompts held out, which the draft has never seen."""
    generator = torch.Generator().manual_seed(0)
    draft = copy.deepcopy(target)
    with torch.no_grad():
        for weight in draft.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=generator)
    prompts = torch.randint(5, 261, (96, 5), generator=generator).tolist()
    held_out = []
    for prompt in prompts[:32]:
        ids = list(prompt)
        while len(ids) < 21 and ids[-1] != 1:
            with torch.no_grad():
                p = target(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1)
            ids.append(int(torch.multinomial(p, 1, generator=generator)))
        held_out.append({"prompt_ids": prompt, "completion_ids": ids[5:]})
    trained = Dataset.from_dict({"prompt_ids": prompts[32:]})

    def measure():
        metrics = replay(draft, target, held_out, temperature=1.0, num_assistant_tokens=4, max_new_tokens=16)
        return metrics.to_metrics("eval")

    before = measure()
    make_trainer(
        draft, target, tokenizer, trained, options, OnlineGKDTrainer, max_steps=60, learning_rate=3e-3, lmbda=1.0,
        max_new_tokens=16, per_device_train_batch_size=8, logging_steps=60,
    ).train()  # fmt: skip
    after = measure()
    gains = {name: after[name] - before[name] for name in ("eval_alpha_t1", "eval_block_efficiency")}
    assert gains["eval_alpha_t1"] > 0.08 and gains["eval_block_efficiency"] > 0.25, (before, after)


def test_bf16_autocast_trains_on_mixed_text(target, tokenizer, dataset, options):
    trainer = make_trainer(
        build_llama(seed=0), target, tokenizer, dataset, options, bf16=True, sample_from="mixed", lmbda=1.0,
        max_new_tokens=6,
    )  # fmt: skip
    trainer.train()
    assert all(loss > 0 for loss in losses(trainer)) and all(len(responses) == 4 for responses in trainer.responses)


def test_part_of_the_examples_keeps_its_completion(target, tokenizer, rows, options):
    trainer = make_trainer(
        build_llama(seed=0), target, tokenizer, Dataset.from_list(rows), options, lmbda=0.5, max_new_tokens=20,
        max_steps=4, logging_steps=4,
    )  # fmt: skip
    trainer.train()
    responses = list(chain(*trainer.responses))
    kept = [response for response in responses if response in as_responses(rows)]
    assert {prompt for prompt, _ in responses} == {tuple(row["prompt_ids"]) for row in rows}
    assert 3 <= len(kept) <= 13
    log = next(log for log in trainer.state.log_history if "loss" in log)
    assert log["on_policy_share"] == pytest.approx(1 - len(kept) / 16)


def test_metrics_and_written_completions(target, tokenizer, rows, options):
    trainer = make_trainer(
        build_llama(seed=0), target, tokenizer, Dataset.from_list(rows), options, log_completions=True, **GREEDY
    )
    trainer.train()
    for step, log in enumerate((log for log in trainer.state.log_history if "loss" in log), 1):
        completions = [completion for _, completion in trainer.responses[step - 1]]
        assert log["on_policy_share"] == 1.0
        assert log["completions/mean_length"] == pytest.approx(sum(map(len, completions)) / 4)
        assert log["completions/clipped_ratio"] == sum(1 not in completion for completion in completions) / 4
        assert log["generated_tokens_per_second"] > 0 and 0 < log["time/generation_share"] < 1
        assert 0 < log["alpha_on_data"] < 1
        with open(f"{options['output_dir']}/completions/step-{step}.jsonl", encoding="utf-8") as file:
            written = [json.loads(line)["completion"] for line in file]
        assert written == [tokenizer.decode(completion) for completion in completions]


def test_evaluation_is_on_the_dataset(target, tokenizer, rows, options):
    evaluations = []
    for kind, overrides in ((WhiteBoxDistillTrainer, {}), (OnlineGKDTrainer, GREEDY)):
        trainer = make_trainer(
            build_llama(seed=0), target, tokenizer, Dataset.from_list(rows), options, kind,
            eval_dataset=Dataset.from_list(rows[:8]), **overrides,
        )  # fmt: skip
        evaluations.append(trainer.evaluate()["eval_loss"])
    assert evaluations[0] == evaluations[1]


@pytest.mark.parametrize("kind", ["ids", "texts", "stream"])
def test_prompts_are_enough_when_all_is_generated(target, tokenizer, rows, options, kind):
    prompts = [{"prompt_ids": row["prompt_ids"]} for row in rows[:8]]
    if kind == "texts":
        dataset = Dataset.from_list([{"prompt": f"{i} is"} for i in range(8)])
        prompts = [{"prompt_ids": tokenizer(f"{i} is")["input_ids"]} for i in range(8)]
    elif kind == "stream":
        dataset = IterableDataset.from_generator(lambda: iter(prompts))
    else:
        dataset = Dataset.from_list(prompts)
    draft = build_llama(seed=0)
    expected = as_responses(write_alone(draft, prompts))
    trainer = make_trainer(draft, target, tokenizer, dataset, {**options, "max_steps": 1}, **GREEDY)
    trainer.train()
    assert len(trainer.responses[0]) == 4 and set(trainer.responses[0]) <= expected
    with pytest.raises(ValueError, match=r"prompts only, but `lmbda=0.9`"):
        make_trainer(draft, target, tokenizer, dataset, options, lmbda=0.9)


def test_a_lora_draft_writes_with_its_adapters(target, tokenizer, rows, options):
    base = build_llama(seed=0)
    before = weights(base)
    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj"], init_lora_weights=False)
    trainer = make_trainer(
        base, target, tokenizer, Dataset.from_list(rows[:4]), options, peft_config=config,
        gradient_checkpointing=True, **GREEDY,
    )  # fmt: skip
    merged = copy.deepcopy(trainer.model).merge_and_unload()
    plain = build_llama(seed=0)
    plain.load_state_dict({name: value for name, value in merged.state_dict().items() if name in before})
    trainer.train()
    assert set(trainer.responses[0]) == as_responses(write_alone(plain, rows[:4]))
    assert set(trainer.responses[0]) != as_responses(write_alone(build_llama(seed=0), rows[:4]))
    after = trainer.model.get_base_model().state_dict()
    for name, value in before.items():
        key = name if name in after else name.replace(".weight", ".base_layer.weight")
        assert torch.equal(after[key], value), name
    assert losses(trainer)[1] != losses(trainer)[0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"mode": "offline"}, "on_policy, streaming"),
        ({"lmbda": 1.5}, "`lmbda` is 1.5"),
        ({"mix": -0.1}, "`mix` is -0.1"),
        ({"sample_from": "teacher"}, "draft, target, mixed"),
        ({"generation_temperature": -1.0}, "`generation_temperature` is -1.0, but must be at least 0"),
        ({"top_k": -1}, "`top_k` is -1"),
        ({"top_p": 0.0}, "`top_p` is 0.0"),
        ({"max_new_tokens": 0}, "`max_new_tokens` is 0"),
        ({"num_iterations": 0}, "`num_iterations` is 0"),
        ({"generation_batch_size": 0}, "`generation_batch_size` is 0"),
        ({"lmbda": 0.0, "num_iterations": 2}, "`lmbda=0` generates none"),
        ({"packing": True}, "`packing=True`"),
        ({"padding_free": True}, "`padding_free=True`"),
        ({"assistant_only_loss": True}, "`assistant_only_loss=True`"),
        ({"completion_only_loss": False}, "`completion_only_loss=False`"),
        ({"temperature": 0.0}, "must be above 0"),
    ],
)
def test_bad_configuration_is_refused(options, overrides, message):
    with pytest.raises(ValueError, match=message):
        OnlineGKDConfig(**{**options, **overrides})


def test_packing_is_fine_without_generation(options):
    assert OnlineGKDConfig(**options, packing=True, lmbda=0.0).packing


def test_bad_input_is_refused_before_work(draft, target, tokenizer, rows, dataset, options):
    with pytest.raises(ValueError, match="live `teacher_model`"):
        make_trainer(draft, None, tokenizer, dataset, options)
    scored = Dataset.from_list([{**row, "reference_forward_kl": [0.1] * len(row["completion_ids"])} for row in rows])
    with pytest.raises(ValueError, match="live `ref_model`"):
        make_trainer(draft, target, tokenizer, scored, options, token_selection="adaspec")
    make_trainer(draft, target, tokenizer, scored, options, token_selection="adaspec", lmbda=0.0)
    with pytest.raises(ValueError, match=r"`max_new_tokens=511` in the draft's 512"):
        make_trainer(build_llama(), target, tokenizer, dataset, options, max_new_tokens=511)
    stream = IterableDataset.from_generator(lambda: iter(rows))
    with pytest.raises(ValueError, match="needs a `Dataset` with a length"):
        make_trainer(build_llama(), target, tokenizer, stream, options, num_iterations=2)
    turns = {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, -100, 8]}
    with pytest.raises(ValueError, match="Row 0 of the training dataset has tokens without a label"):
        make_trainer(build_llama(), target, tokenizer, Dataset.from_list([turns] * 4), options)


def test_a_live_reference_scores_what_is_generated(target, tokenizer, dataset, options):
    trainer = make_trainer(
        build_llama(seed=0), target, tokenizer, dataset, options, token_selection="adaspec",
        ref_model=build_llama(seed=4), **GREEDY,
    )  # fmt: skip
    trainer.train()
    log = next(log for log in trainer.state.log_history if "loss" in log)
    assert 0 < log["token_share_kept"] < 1
