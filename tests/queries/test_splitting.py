"""Each conversation on one side, for any log."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spec_kd.queries.splitting import choose_test_rows


def choose(conversations, timestamps, fraction, split_by, seed=0):
    return choose_test_rows(
        np.array(conversations, dtype=np.uint64), np.array(timestamps, dtype=float), fraction, split_by, seed
    )


@pytest.mark.parametrize("split_by", ["hash", "time"])
@given(
    rows=st.lists(st.tuples(st.integers(0, 12), st.floats(0, 1e9)), min_size=1, max_size=60),
    fraction=st.sampled_from([0.0, 0.05, 0.3, 0.99]),
)
def test_no_conversation_is_on_both_sides(split_by, rows, fraction):
    conversations, times = zip(*rows, strict=True)
    is_test = choose(conversations, times, fraction, split_by)
    sides = {}
    for conversation, side in zip(conversations, is_test, strict=True):
        assert sides.setdefault(conversation, side) == side
    if fraction == 0:
        assert not is_test.any()
    elif split_by == "time":
        assert is_test.mean() >= fraction
        starts = {c: min(t for d, t in rows if d == c) for c in conversations}
        begun = {side: [starts[c] for c, s in sides.items() if s == side] for side in (True, False)}
        assert max(begun[False], default=-1) <= min(begun[True])
        # one conversation fewer would not be enough
        first = min(begun[True])
        rest = sum(s and starts[c] > first for c, s in zip(conversations, is_test, strict=True))
        assert rest / len(rows) < fraction


def test_hash_meets_the_share_and_does_not_change_when_the_log_grows():
    conversations = np.random.default_rng(0).integers(0, 2**63, 50_000)
    is_test = choose(conversations, np.zeros(50_000), 0.1, "hash")
    assert abs(is_test.mean() - 0.1) < 0.01
    np.testing.assert_array_equal(choose(conversations[:1000], np.zeros(1000), 0.1, "hash"), is_test[:1000])
    other = choose(conversations, np.zeros(50_000), 0.1, "hash", seed=1)
    assert abs((other & is_test).mean() - 0.01) < 0.003  # independent of it
