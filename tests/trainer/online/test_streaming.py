"""Learning from served requests: what is learnt is what serving showed, in the order of the stream."""

import copy
import itertools

import pytest
import torch
from accelerate.utils import is_compiled_module
from datasets import Dataset, IterableDataset
from test_online_gkd import Recorder, assert_equal_weights, losses, make_trainer, weights
from tiny import build_llama

from spec_kd import OnlineGKDConfig, OnlineGKDTrainer, WhiteBoxDistillTrainer, generate_speculatively
from spec_kd.trainer.online.request_server import RequestServer

STREAM = {"mode": "streaming", "generation_temperature": 0.0, "max_new_tokens": 8, "num_assistant_tokens": 3}
WHOLE = {"served_signal": "top_k_tail", "served_signal_size": 261}  # every id of the tiny vocabulary


class Keeper(OnlineGKDTrainer):
    """Keeps what was served, window by window, and the draft that served it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.served = []

    def _generate_window(self, batches, device):
        state = copy.deepcopy(weights(self.model))
        write, kept = RequestServer.write, []

        def keep(source, models, prompts, seed, numbers):
            kept.append((prompts, write(source, models, prompts, seed, numbers)))
            return kept[0][1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RequestServer, "write", keep)
            window = super()._generate_window(batches, device)
        self.served.append((state, window, *kept[0]))
        return window

    @property
    def prompts(self):
        return [prompt for _, _, prompts, _ in self.served for prompt in prompts]

    @property
    def completions(self):
        return [completion.ids for *_, completions in self.served for completion in completions]


def make_near_draft(target, noise=0.05, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draft = copy.deepcopy(target).requires_grad_(True)  # a teacher of a run before is frozen
    with torch.no_grad():
        for weight in draft.parameters():
            weight += noise * torch.randn(weight.shape, generator=generator)
    return draft


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_what_is_kept_is_what_the_target_thinks(target, tokenizer, rows, options, temperature):
    """Log-probabilities of every id at every token against a pass over the whole text, at the loss temperature."""
    trainer = make_trainer(
        make_near_draft(target, 0.02), target, tokenizer, Dataset.from_list(rows), options, Keeper,
        **{**STREAM, **WHOLE, "generation_temperature": temperature, "temperature": 1.5, "trained_positions": "all"},
    )  # fmt: skip
    trainer.train()
    _, _, prompts, completions = trainer.served[0]
    assert len({len(completion.rounds) for completion in completions}) > 1  # ragged
    for prompt, completion in zip(prompts, completions, strict=True):
        with torch.no_grad():
            logits = target(input_ids=torch.tensor([prompt + completion.ids])).logits[0, len(prompt) - 1 : -1, :261]
        expected = (logits / 1.5).log_softmax(-1)
        kept = torch.full_like(expected, torch.nan)
        for i, (ids, log_p) in enumerate(zip(completion.sparse.ids, completion.sparse.log_p, strict=True)):
            kept[i, torch.from_numpy(ids).long()] = torch.from_numpy(log_p)
        torch.testing.assert_close(kept, expected, rtol=1e-4, atol=1e-4)
        token_logprobs = expected.gather(1, torch.tensor(completion.ids)[:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(completion.token_logprobs), token_logprobs, rtol=1e-4, atol=1e-4)


def test_a_step_on_all_tokens_equals_an_offline_step_on_the_text(target, tokenizer, rows, options):
    """The signal of all ids is the whole distribution, so only its rounding on disk stands between the two."""
    draft = make_near_draft(target)
    offline = copy.deepcopy(draft)
    overrides = {**STREAM, **WHOLE, "max_steps": 1, "gradient_accumulation_steps": 2}
    trainer = make_trainer(
        draft, target, tokenizer, Dataset.from_list(rows), options, Keeper, trained_positions="all", **overrides
    )
    trainer.train()
    written = [
        {"prompt_ids": prompt, "completion_ids": ids}
        for prompt, ids in zip(trainer.prompts, trainer.completions, strict=True)
    ]
    expected = make_trainer(
        offline, target, tokenizer, Dataset.from_list(written), options, WhiteBoxDistillTrainer, max_steps=1,
        gradient_accumulation_steps=2, train_sampling_strategy="sequential",
    )  # fmt: skip
    expected.train()
    assert losses(trainer) == pytest.approx(losses(expected), rel=2e-3)
    log, offline_log = (t.state.log_history[0] for t in (trainer, expected))
    assert log["alpha_upper_bound_on_data"] == pytest.approx(offline_log["alpha_on_data"], rel=2e-3)


def test_the_loss_is_where_the_target_corrected_the_draft(target, tokenizer, rows, options):
    trainer = make_trainer(
        make_near_draft(target), target, tokenizer, Dataset.from_list(rows), options, Keeper,
        per_device_train_batch_size=2, update_interval=4, **STREAM,
    )  # fmt: skip
    trainer.train()
    assert trainer.args.gradient_accumulation_steps == 2 and len(trainer.served) == 2
    for state, window, prompts, completions in trainer.served:
        draft = copy.deepcopy(target)
        draft.load_state_dict(state)
        record = generate_speculatively(
            target, draft, prompts, num_assistant_tokens=3, max_new_tokens=8, eos_token_id=1, vocab_size=261
        )
        assert [completion.ids for completion in completions] == record.completion_ids
        assert [list(completion.rounds) for completion in completions] == record.rounds
        assert sum(map(len, record.rejected_positions)) > 0
        labels = [row for batch in window.batches for row in batch["labels"]]
        for prompt, rejected, ids, row in zip(
            prompts, record.rejected_positions, record.completion_ids, labels, strict=True
        ):
            assert row.ne(-100).nonzero().flatten().tolist() == [len(prompt) + position for position in rejected]
            assert row[row != -100].tolist() == [ids[position] for position in rejected]
    _, _, _, completions = trainer.served[0]
    rounds = [record for completion in completions for record in completion.rounds]
    tokens = sum(len(completion.ids) for completion in completions)
    log = trainer.state.log_history[0]
    assert log["stream/block_efficiency"] == pytest.approx(tokens / len(rounds))
    assert log["stream/acceptance_rate"] == pytest.approx(
        sum(r.accepted for r in rounds) / sum(r.drafted for r in rounds)
    )
    assert log["stream/rejected_share"] == pytest.approx(
        sum(len(completion.rejected_positions) for completion in completions) / tokens
    )
    assert log["on_policy_share"] == 1.0


def test_the_target_makes_no_pass_besides_those_of_serving(target, tokenizer, rows, options):
    draft, passes = make_near_draft(target), []
    handle = target.register_forward_hook(lambda *_: passes.append(1))
    trainer = make_trainer(draft, target, tokenizer, Dataset.from_list(rows), options, Keeper, **STREAM)
    passes.clear()  # of the checks before training
    trainer.train()
    handle.remove()
    rounds = sum(max(len(c.rounds) for c in completions) for *_, completions in trainer.served)
    assert len(passes) == rounds + len(trainer.served)  # and one over the prompts of each window


def test_an_endless_stream_is_served_in_its_order_and_resumed(target, tokenizer, options):
    def requests():
        for i in itertools.count():
            yield {"prompt_ids": [5 + i % 200, 6 + i % 7, 7 + i % 11]}

    options = {**options, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, **STREAM}
    options["generation_temperature"] = 1.0
    whole = make_near_draft(target)
    first = make_trainer(whole, target, tokenizer, IterableDataset.from_generator(requests), options, Keeper)
    first.train()
    assert first.prompts == [row["prompt_ids"] for row in itertools.islice(requests(), 16)]
    resumed = make_near_draft(target, seed=5)  # must come from the checkpoint
    trainer = make_trainer(resumed, target, tokenizer, IterableDataset.from_generator(requests), options, Keeper)
    trainer.train(resume_from_checkpoint=f"{options['output_dir']}/checkpoint-2")
    assert trainer.prompts == first.prompts[8:] and trainer.completions == first.completions[8:]
    assert_equal_weights(weights(whole), weights(resumed))


def test_a_dataset_is_a_stream_too(target, tokenizer, rows, options):
    trainer = make_trainer(
        make_near_draft(target), target, tokenizer, Dataset.from_list(rows), {**options, "max_steps": 4}, Keeper,
        **STREAM,
    )  # fmt: skip
    trainer.train()
    assert trainer.prompts == [row["prompt_ids"] for row in rows]


def test_a_window_without_a_rejection_teaches_nothing(target, tokenizer, rows, options):
    draft = copy.deepcopy(target)
    before = weights(draft)
    trainer = make_trainer(draft, target, tokenizer, Dataset.from_list(rows), options, Keeper, **STREAM)
    trainer.train()
    assert_equal_weights(before, weights(draft))
    assert losses(trainer) == [0.0, 0.0]
    assert all(log["stream/rejected_share"] == 0 for log in trainer.state.log_history if "loss" in log)


@pytest.mark.parametrize("positions", ["rejected", "all"])
def test_acceptance_recovers_after_a_shift(target, tokenizer, options, positions):
    """Prompts of one kind, then of another; the draft has to learn each from its own requests."""
    generator = torch.Generator().manual_seed(1)
    kinds = (torch.arange(5, 15), torch.arange(100, 110))
    prompts = [
        kind[torch.randint(0, len(kind), (3,), generator=generator)].tolist() for kind in kinds for _ in range(320)
    ]
    draft = make_near_draft(target, 0.08)
    trainer = make_trainer(
        draft, target, tokenizer, Dataset.from_dict({"prompt_ids": prompts}), options, Recorder,
        **{**STREAM, "per_device_train_batch_size": 8, "max_steps": 80, "learning_rate": 3e-3,
           "trained_positions": positions, "generation_temperature": 1.0},
    )  # fmt: skip
    trainer.train()
    stream = [log["stream/block_efficiency"] for log in trainer.state.log_history if "loss" in log]
    assert len(stream) == 80

    def mean(part):
        return sum(stream[part]) / len(stream[part])

    start, learnt, end = mean(slice(0, 5)), mean(slice(30, 40)), mean(slice(70, 80))
    assert learnt > start + 0.15 and end > start + 0.15, (start, learnt, mean(slice(40, 45)), end)


@pytest.mark.parametrize(
    ("signal", "divergence"), [("token_only", "forward_kl"), ("sampled_counts", "forward_kl"), ("top_k_tail", "jsd")]
)
def test_every_signal_trains(target, tokenizer, rows, options, signal, divergence):
    overrides = {"generation_temperature": 1.0, "served_signal": signal, "divergence": divergence}
    trainer = make_trainer(
        make_near_draft(target), target, tokenizer, Dataset.from_list(rows), options, Keeper,
        eval_dataset=Dataset.from_list(rows[:4]), **{**STREAM, **overrides},
    )  # fmt: skip
    trainer.train()
    assert all(loss > 0 for loss in losses(trainer)[:1])
    assert 0 < trainer.evaluate()["eval_alpha_on_data"] < 1  # with the target's whole distribution


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"lmbda": 0.3}, "`lmbda=0.3` has no use"),
        ({"sample_from": "mixed"}, "`sample_from='mixed'` has no use"),
        ({"num_iterations": 2}, "`num_iterations=2` has no use"),
        ({"top_p": 0.9}, "`top_p=0.9` has no use"),
        ({"trained_positions": "accepted"}, "rejected, all"),
        ({"update_interval": 6}, "not a multiple of `per_device_train_batch_size=4`"),
        ({"update_interval": 0}, "`update_interval` is 0"),
        ({"num_assistant_tokens": 0}, "num_assistant_tokens"),
        ({"draft_sampling": "beam"}, "draft_sampling"),
        ({"served_signal": "logits"}, "token_only, sampled_counts"),
        ({"served_signal": "token_only", "served_signal_size": 3}, "no use for"),
        ({"served_signal": "sampled_counts", "divergence": "reverse_kl"}, "cannot serve the divergence 'reverse_kl'"),
        ({"packing": True}, "`packing=True`"),
    ],
)
def test_bad_configuration_is_refused(options, overrides, message):
    with pytest.raises(ValueError, match=message):
        OnlineGKDConfig(**{**options, **STREAM, **overrides})


def test_an_interval_without_a_stream_is_refused(options):
    with pytest.raises(ValueError, match="only `mode='streaming'` has"):
        OnlineGKDConfig(**options, update_interval=4)


def test_text_of_another_distribution_is_refused(target, tokenizer, rows, options):
    with pytest.raises(ValueError, match="biased"):
        make_trainer(
            make_near_draft(target), target, tokenizer, Dataset.from_list(rows), options, Keeper,
            served_signal="token_only", **STREAM,
        )  # fmt: skip


@pytest.mark.parametrize("mode", [STREAM, {"lmbda": 1.0, "generation_temperature": 0.0, "max_new_tokens": 8}])
def test_compiled_models_teach_and_learn_the_same(tokenizer, rows, options, mode):
    """The loss is computed by compiled models, the text is written by those underneath."""
    results = []
    for compiled in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        trainer = make_trainer(
            build_llama(seed=0), build_llama(seed=1, hidden_size=48), tokenizer, Dataset.from_list(rows), options,
            OnlineGKDTrainer, max_steps=3, **mode, **compiled,
        )  # fmt: skip
        trainer.train()
        assert is_compiled_module(trainer.model_wrapped) == is_compiled_module(trainer._teacher.model) == bool(compiled)
        with trainer._whole_models() as models:
            assert models and not any(map(is_compiled_module, models.values()))
        results.append(losses(trainer))
    assert results[1] == pytest.approx(results[0], rel=1e-5) and len(results[0]) == 3
