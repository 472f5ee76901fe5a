"""A sparse method is one class: from generating over the stored columns to the loss, the replay and the refusals."""

import pytest
import torch
from tiny import build_llama, build_tokenizer

from spec_kd import WhiteBoxDistillConfig, WhiteBoxDistillTrainer, generate_responses, replay
from spec_kd.data.teacher_signal import TeacherInfo, unpack_sparse
from spec_kd.losses import (
    SPARSE_METHODS,
    CoarsenedMethod,
    SampledMethod,
    SparseMethod,
    build_divergence,
    register_sparse_method,
)


class IndependentDraws(SampledMethod):
    """Independent draws from p with their log-probabilities, where the package's own draws are systematic."""

    name = "independent_draws"
    default_size = 8

    def record(self, p, size, generator):
        drawn = torch.multinomial(p.logits.softmax(-1), size, replacement=True, generator=generator)
        drawn = drawn.sort(dim=-1).values
        return drawn.int(), p.log_p(drawn)


@pytest.fixture(scope="module", autouse=True)
def registered():
    """Other tests do not see the toy."""
    before = dict(SPARSE_METHODS)
    register_sparse_method(IndependentDraws)
    yield
    SPARSE_METHODS.clear()
    SPARSE_METHODS.update(before)


@pytest.fixture(scope="module")
def target():
    return build_llama(seed=1)


@pytest.fixture(scope="module")
def responses(target):
    return generate_responses(
        target, ["a", "hello there", "f(x)"], processing_class=build_tokenizer(), max_new_tokens=6,
        teacher_signal="independent_draws", show_progress=False,
    )  # fmt: skip


def compute_log_p(model, row):
    """Log-probabilities at the completion's tokens, float64 `(T, V)`."""
    ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, len(row["prompt_ids"]) - 1 : -1]
    return logits.double().log_softmax(-1)


def unpack(row):
    """Kept ids, log-probabilities and weights of a row, and the token that each belongs to."""
    info = TeacherInfo.from_json(row["teacher_info"])
    records, per_token = unpack_sparse(row["teacher_signal"], len(row["completion_ids"]), info)
    ids, log_p, weights = (torch.from_numpy(records[name].copy()) for name in ("id", "log_p", "weight"))
    return torch.arange(len(per_token)).repeat_interleave(torch.from_numpy(per_token)), ids.long(), log_p, weights


def test_columns_hold_the_draws_with_the_targets_log_probabilities(target, responses):
    for row in responses:
        info = TeacherInfo.from_json(row["teacher_info"])
        assert (info.method, info.num_draws, info.top_k) == ("independent_draws", 8, None)
        token, ids, log_p, weights = unpack(row)
        shares = torch.zeros(len(row["completion_ids"])).index_add_(0, token, weights)
        torch.testing.assert_close(shares, torch.ones_like(shares))
        expected = compute_log_p(target, row)[token, ids]
        torch.testing.assert_close(log_p.double(), expected, rtol=0, atol=1e-3)


def test_the_loss_is_the_mean_over_the_draws(responses, tmp_path):
    draft = build_llama(seed=0)
    args = WhiteBoxDistillConfig(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], per_device_train_batch_size=3, disable_tqdm=True,
        gradient_checkpointing=False,
    )  # fmt: skip
    trainer = WhiteBoxDistillTrainer(
        model=draft, args=args, train_dataset=responses, processing_class=build_tokenizer()
    )
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    loss = trainer.compute_loss(trainer.model, batch).item()
    total, count = 0.0, 0
    for row in responses:
        token, ids, log_p, weights = unpack(row)
        total += (weights * (log_p - compute_log_p(draft, row)[token, ids])).sum().item()
        count += len(row["completion_ids"])
    assert loss == pytest.approx(total / count, rel=1e-4)


def test_replay_without_the_target_reads_the_draws(responses):
    draft = build_llama(seed=0)
    found = replay(draft, None, responses, temperature=1.0, max_new_tokens=6, num_assistant_tokens=2)
    total, count = 0.0, 0
    for row in responses:
        token, ids, log_p, weights = unpack(row)
        ratio = (compute_log_p(draft, row)[token, ids] - log_p).clamp(max=0).exp()
        total, count = total + (weights * ratio).sum().item(), count + len(row["completion_ids"])
    assert found.alpha.value == pytest.approx(total / count, rel=1e-3)


def test_it_is_offered_where_it_serves_and_refused_where_it_does_not():
    method = SPARSE_METHODS["independent_draws"]
    assert method.describe_service(build_divergence("tvd")) == "unbiased"
    with pytest.raises(ValueError, match="'independent_draws' cannot serve the divergence 'jsd'"):
        method.check_serves(build_divergence("jsd"))
    with pytest.raises(ValueError, match=r"dataset made with .*'independent_draws' \(unbiased\)"):
        SPARSE_METHODS["sampled_counts"].check_serves(build_divergence("tvd"))
    with pytest.raises(ValueError, match="has no use for `top_k=3`"):
        generate_responses("x", ["a"], teacher_signal="independent_draws", signal_top_k=3)


def test_only_a_whole_method_with_a_name_of_its_own_is_registered():
    register_sparse_method(IndependentDraws)  # twice, as when a cell is run again
    with pytest.raises(ValueError, match=r"sparse method name 'top_k_tail' belongs to .*TopKTail"):
        register_sparse_method(type("Other", (CoarsenedMethod,), {"name": "top_k_tail"}))
    with pytest.raises(TypeError, match="no `name`"):
        register_sparse_method(type("Nameless", (SampledMethod,), {}))
    for other in (SparseMethod, dict):
        with pytest.raises(TypeError, match="not a sparse method"):
            register_sparse_method(other)
