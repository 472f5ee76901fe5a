import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spec_kd.data.teacher_signal import SPARSE_FEATURE, TeacherInfo, pack_sparse, split_tokens, unpack_sparse
from spec_kd.losses import SparseDistribution


def make_info(method, vocab_size=300, **numbers):
    return TeacherInfo(
        target_name="target", target="hash", tokenizer="abc", vocab_size=vocab_size, engine="transformers",
        method=method, num_draws=numbers.get("num_draws"), top_k=numbers.get("top_k"), sampling_temperature=1.0,
        max_new_tokens=64,
        logprobs_mode="processed", logprobs_temperature=1.0,
    )  # fmt: skip


def draw_sparse(rng, tokens, vocab_size, method, num_draws=None, top_k=None):
    ids, log_p, counts = [], [], []
    for _ in range(tokens):
        if top_k is not None:
            ids.append(rng.choice(vocab_size, top_k, replace=False).astype(np.int32))
        else:
            drawn, count = np.unique(rng.integers(0, vocab_size, num_draws), return_counts=True)
            ids.append(drawn.astype(np.int32))
            counts.append(count.astype(np.int32))
        log_p.append(-rng.exponential(8, len(ids[-1])).astype(np.float32))
    return SparseDistribution(ids, None if method == "sampled_counts" else log_p, counts or None)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    tokens=st.integers(1, 40),
    vocab_size=st.sampled_from([2, 255, 256, 257, 32768, 151_936, 262_144]),
    method=st.sampled_from(["sampled_counts", "sampled_logprobs", "top_k_tail"]),
    number=st.integers(1, 64),
)
def test_what_is_packed_comes_back(seed, tokens, vocab_size, method, number):
    numbers = {"top_k": min(number, vocab_size)} if method == "top_k_tail" else {"num_draws": number}
    info = make_info(method, vocab_size, **numbers)
    sparse = draw_sparse(np.random.default_rng(seed), tokens, vocab_size, method, **numbers)
    content = pack_sparse(sparse, info)
    unpacked, per_token = unpack_sparse(content, tokens, info)
    assert per_token.tolist() == [len(ids) for ids in sparse.ids]
    assert unpacked["id"].tolist() == np.concatenate(sparse.ids).tolist()
    if sparse.counts is not None:
        np.testing.assert_allclose(unpacked["weight"], np.concatenate(sparse.counts) / number, rtol=1e-6)
    if sparse.log_p is None:
        assert np.isnan(unpacked["log_p"]).all()
    else:
        true = np.concatenate(sparse.log_p)
        is_kept = true >= -63.99
        assert np.abs(unpacked["log_p"][is_kept] - true[is_kept]).max(initial=0) <= 0.5 / 1024 + 1e-6
        assert np.isneginf(unpacked["log_p"][true < -64.0]).all()
    entries = split_tokens(unpacked, per_token)
    assert [len(entry) // SPARSE_FEATURE.itemsize for entry in entries] == per_token.tolist()
    assert b"".join(entries) == unpacked.tobytes()


def test_the_size_is_what_the_docstring_says():
    """50 draws with 12 distinct ids of 151,936: 33 bytes a token with counts, 57 with log p."""
    counts = [np.array([39] + [1] * 11, np.int32)] * 1000
    ids = [np.arange(12, dtype=np.int32) * 12_000] * 1000
    log_p = [np.full(12, -3.0, np.float32)] * 1000
    plain = pack_sparse(SparseDistribution(ids, None, counts), make_info("sampled_counts", 151_936, num_draws=50))
    assert len(plain) / 1000 == pytest.approx((50 + 12 * 18) / 8, abs=0.01) and len(plain) <= 33.3 * 1000
    whole = pack_sparse(SparseDistribution(ids, log_p, counts), make_info("sampled_logprobs", 151_936, num_draws=50))
    assert len(whole) == len(plain) + 24 * 1000


def test_a_signal_of_other_tokens_is_refused():
    info = make_info("sampled_logprobs", num_draws=8)
    content = pack_sparse(draw_sparse(np.random.default_rng(0), 9, 300, "sampled_logprobs", num_draws=8), info)
    for tokens in (1, 8, 10, 100):
        with pytest.raises(ValueError, match="does not belong to"):
            unpack_sparse(content, tokens, info)
    with pytest.raises(ValueError, match="7 draws, the dataset 8"):
        pack_sparse(draw_sparse(np.random.default_rng(0), 3, 300, "sampled_counts", num_draws=7), info)
    with pytest.raises(ValueError, match="must have 4 ids"):
        sparse = draw_sparse(np.random.default_rng(0), 3, 300, "top_k_tail", top_k=5)
        pack_sparse(sparse, make_info("top_k_tail", top_k=4))


def test_info_survives_json_and_refuses_what_it_does_not_know():
    info = make_info("top_k_tail", top_k=4)
    assert TeacherInfo.from_json(info.to_json()) == info
    assert info.signal.top_k == 4 and info.sparse_method.name == "top_k_tail"
    for text in ("{}", "no json", '{"version": 7}'):
        with pytest.raises(ValueError, match="Create the dataset again"):
            TeacherInfo.from_json(text)
