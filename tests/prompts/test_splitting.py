"""Each conversation on one side, for any log."""

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from spec_kd.prompts.splitting import choose_test_rows, find_leaks, group_rows, hold_out_rows, split_prompts


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


@given(
    rows=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=40),
)
def test_rows_that_share_a_key_are_one_group(rows):
    first, second = (np.array(keys, dtype=np.uint64) for keys in zip(*rows, strict=True))
    groups = group_rows(first, second)
    # by repeated merging of sets, as slow as it is plain
    sets = [{("first", a), ("second", b)} for a, b in rows]
    for _ in rows:
        sets = [set().union(*(other for other in sets if other & one)) for one in sets]
    expected = [next(i for i, other in enumerate(sets) if other == one) for one in sets]
    assert groups.tolist() == expected


def make_prompts(*texts, **columns):
    return Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in texts], **columns})


def follow_up(*texts):
    turns = [{"role": "assistant", "content": "ok"}] * (2 * len(texts) - 1)
    turns[::2] = [{"role": "user", "content": text} for text in texts]
    return turns


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("named", [False, True])
def test_turns_of_one_conversation_are_on_one_side(seed, named):
    prompts = [turns for n in range(6) for turns in (follow_up(f"q{n}"), follow_up(f"q{n}", "why?"))]
    names = {"conversation_id": [f"c{n // 2}" for n in range(12)]} if named else {}
    train, test = split_prompts(Dataset.from_dict({"prompt": prompts, **names}), 0.5, seed)
    openings = [{prompt[0]["content"] for prompt in side["prompt"]} for side in (train, test)]
    assert not openings[0] & openings[1] and len(openings[0] | openings[1]) == 6


@pytest.mark.parametrize("seed", range(8))
def test_one_question_under_two_system_prompts_is_on_one_side(seed):
    questions = [f"Question {n}?" for n in range(8)]
    prompts = [
        [{"role": "system", "content": system}, {"role": "user", "content": text}]
        for system in ("You sell bread.", "You sell stamps.")
        for text in questions
    ]
    dataset = Dataset.from_dict({"prompt": prompts, "conversation_id": [str(n) for n in range(16)]})
    train, test = split_prompts(dataset, 0.5, seed)
    sides = [{prompt[-1]["content"] for prompt in side["prompt"]} for side in (train, test)]
    assert not sides[0] & sides[1] and len(train) + len(test) == 16


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
@pytest.mark.parametrize("num_prompts", [1, 3])
def test_an_empty_side_is_said(caplog, fraction, num_prompts):
    train, test = split_prompts(make_prompts(*(f"q{n}" for n in range(num_prompts))), fraction)
    assert not len(train) or not len(test)
    name = "test" if fraction < 0.5 else "training"
    assert f"The {name} set is empty, although" in caplog.text
    assert ("one conversation" in caplog.text) == (num_prompts == 1)


def test_nothing_is_said_where_no_test_prompts_are_wanted(caplog):
    train, test = split_prompts(make_prompts("a", "b"), 0.0)
    assert (len(train), len(test)) == (2, 0) and not caplog.text
    with pytest.raises(ValueError, match="is 1"):
        split_prompts(make_prompts("a"), 1)


def test_leaks_are_rows_of_the_same_text_or_conversation():
    test = make_prompts("Why?", "How?", source=["a", "a"], conversation_id=["1", None])
    train = make_prompts(
        " why? ", "When?", "When?", "When?", source=["b", "a", "b", "a"], conversation_id=["7", "1", "1", None]
    )
    assert find_leaks(train, test).tolist() == [True, True, False, False]
    assert find_leaks(train.remove_columns("source"), test).tolist() == [True, False, False, False]


@pytest.mark.parametrize("num_rows", [1, 2, 3, 100])
def test_rows_held_out_are_whole_conversations(num_rows):
    prompts = [turns for n in range(4) for turns in (follow_up(f"q{n}"), follow_up(f"q{n}", "why?"))]
    prompts += [follow_up("q0", "how?")]  # the first conversation again, far behind
    held_out, rest = hold_out_rows(Dataset.from_dict({"prompt": prompts}), num_rows)
    openings = [{prompt[0]["content"] for prompt in side["prompt"]} for side in (held_out, rest)]
    assert not openings[0] & openings[1] and len(openings[0] | openings[1]) == 4
    assert len(held_out) == {1: 3, 2: 3, 3: 3, 100: 7}[num_rows] and len(rest) == 9 - len(held_out)


def test_rows_of_ids_are_told_apart_by_them():
    dataset = Dataset.from_dict({"prompt_ids": [[1, 2], [3], [1, 2], [4]], "completion_ids": [[5], [6], [7], [8]]})
    held_out, rest = hold_out_rows(dataset, 1)
    assert held_out["completion_ids"][:] == [[5], [7]] and rest["completion_ids"][:] == [[6], [8]]
    with pytest.raises(ValueError, match="The 2 rows belong to one conversation"):
        hold_out_rows(dataset.select([0, 2]), 1)
    other = Dataset.from_dict({"completion": ["a", "a", "b"]})
    assert [len(side) for side in hold_out_rows(other, 1)] == [1, 2]
