"""The language-model training of the small models."""

import random

import pytest
import torch
from made_up import language_model_training
from made_up.language_model_training import Budget, EncodedRow, train_language_model
from tiny import build_llama


def build_rows(number: int, seed: int) -> list[EncodedRow]:
    rng = random.Random(seed)
    return [EncodedRow([rng.randrange(5, 60) for _ in range(rng.randint(6, 12))], 2) for _ in range(number)]


def train(budget: Budget, checkpoint=None) -> tuple[dict, dict]:
    model = build_llama(seed=0)
    record = train_language_model(
        model, build_rows(20, seed=0), build_rows(4, seed=1), budget, seed=3, description="test", checkpoint=checkpoint
    )
    record.pop("seconds")
    return record, model.state_dict()


@pytest.mark.parametrize("until_flat", [False, True])
def test_a_killed_training_goes_on_to_the_same_weights(tmp_path, monkeypatch, until_flat):
    # About 4 batches an epoch: it is killed in the third epoch, between two points of the curve.
    budget = Budget(
        max_steps=40, until_flat=until_flat, tokens_per_step=60, learning_rate=0.02, prompt_weight=0.5, eval_steps=3
    )
    expected, weights = train(budget)
    checkpoint = tmp_path / "state.pt"
    original, seen = language_model_training.sum_loss, []

    def die(model, batch, prompt_weight):
        if prompt_weight:  # a training step, not an evaluation
            seen.append(batch)
            if len(seen) == 11:
                raise KeyboardInterrupt
        return original(model, batch, prompt_weight)

    monkeypatch.setattr(language_model_training, "sum_loss", die)
    with pytest.raises(KeyboardInterrupt):
        train(budget, checkpoint)
    assert checkpoint.exists()
    seen.extend([None] * 100)  # past the point where it dies
    record, resumed = train(budget, checkpoint)
    assert len(seen) == 11 + 100 + expected["num_steps"] - 9  # only what was done after the last point is done again
    assert record == expected
    for name, value in weights.items():
        assert torch.equal(resumed[name], value), name
    assert list(tmp_path.iterdir()) == []


def test_training_until_flat_stops_early_at_a_lower_rate():
    budget = Budget(max_steps=400, until_flat=True, tokens_per_step=60, learning_rate=0.02, eval_steps=5)
    record, _ = train(budget)
    assert record["is_flat"] and record["num_steps"] < 400
    assert record["curve"][-1][2] == pytest.approx(0.02 / 9)
