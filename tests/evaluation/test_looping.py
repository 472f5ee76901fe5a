"""Loops that were planted are found where they stand, and no real text is taken for one."""

import random

import pytest
from made_up import function_calling

from spec_kd.evaluation.looping import Loop, find_loop

OPENING = list(range(1000, 1030))


def search(ids, max_period=128, min_repeats=3, min_tokens=24, long_tokens=96, min_share=0.5):
    """An independent reference: every period and every start, token by token."""
    for period in range(1, max_period + 1):
        for start in range(len(ids) - period + 1):
            if start and start - 1 + period < len(ids) and ids[start - 1] == ids[start - 1 + period]:
                continue
            end = start + period
            while end < len(ids) and ids[end] == ids[end - period]:
                end += 1
            length = end - start
            is_often = length >= min_repeats * period or (length >= 2 * period and length >= long_tokens)
            if is_often and length >= min_tokens and (end == len(ids) or length >= min_share * len(ids)):
                return Loop(start, length, period)
    return None


@pytest.mark.parametrize(("period", "repeats"), [(1, 24), (3, 8), (20, 3), (31, 3), (48, 2), (128, 2)])
def test_a_loop_at_the_end(period, repeats):
    unit = list(range(period))
    text = OPENING + unit * repeats
    assert find_loop(text) == Loop(30, period * repeats, period)
    assert find_loop(text[:-1]) is None  # a token too short
    assert find_loop([*text, unit[0]]) == Loop(30, period * repeats + 1, period)  # cut within a period


def test_a_loop_that_begins_within_a_period_starts_there():
    assert find_loop([*OPENING, 2, *[1, 2] * 20]) == Loop(30, 41, 2)


def test_the_shortest_period_counts():
    assert find_loop(OPENING + [5, 6] * 30).period == 2  # it also repeats after 4, 6, ... tokens
    assert find_loop(([7] * 9 + [8]) * 5).period == 10  # the sevens alone are too few


def test_a_loop_that_was_left_counts_if_it_is_half_of_the_text():
    assert find_loop([*[5, 6] * 15, *OPENING]) == Loop(0, 30, 2)
    assert find_loop([*[5, 6] * 15, *OPENING, 9]) is None
    assert find_loop([*[5, 6] * 15, *OPENING, 9], min_share=0.45) == Loop(0, 30, 2)
    assert find_loop([*OPENING[:20], *[3] * 30, 2]) == Loop(20, 30, 1)  # it ends by the EOS


def test_an_interrupted_loop_is_two_short_ones():
    assert find_loop([*OPENING, *[5, 6] * 11, 9, *[5, 6] * 11]) is None
    assert find_loop([*OPENING, *[5, 6] * 11, 9, *[5, 6] * 12]) == Loop(53, 24, 2)


@pytest.mark.parametrize("ids", [[], [1], [1] * 23, list(range(500)), list(range(40)) * 2])
def test_no_loop(ids):
    assert find_loop(ids) is None


def test_thresholds():
    text = OPENING + list(range(40)) * 2
    assert find_loop(text) is None  # twice, and short
    assert find_loop(text, min_repeats=2) == find_loop(text, long_tokens=80) == Loop(30, 80, 40)
    assert find_loop(text, min_repeats=2, max_period=39) is None
    assert find_loop(text, min_repeats=2, min_tokens=81) is None
    assert find_loop(list(range(129)) * 2) is None and find_loop(list(range(129)) * 2, max_period=129).period == 129


def test_all_periods_and_places_as_a_plain_search_finds_them():
    found = 0
    for seed in range(800):
        rng = random.Random(seed)
        unit = [rng.randrange(4) for _ in range(rng.randint(1, 12))]
        parts = ([rng.randrange(5) for _ in range(rng.randint(0, 30))] for _ in range(2))
        text = [*next(parts), *unit * rng.randint(0, 9), *(next(parts) if seed % 2 else [])]
        assert find_loop(text) == search(text), text
        found += find_loop(text) is not None
    assert 200 < found < 600


REAL = {
    "list": "Buy these:\n- 2 apples\n- 2 pears\n- 2 plums\n- 2 limes\n- 2 figs\n- 2 dates\n- 2 kiwis\n- 2 melons\n",
    "numbers": "\n".join(f"{n} x 7 = {7 * n}" for n in range(1, 21)),
    "table": "| name | age |\n|------|-----|\n" + "".join(f"| {n} | {30 + i} |\n" for i, n in enumerate("ABCDEFG")),
    "calls": '[{"name": "add", "arguments": {"a": 1, "b": 2}}, {"name": "add", "arguments": {"a": 2, "b": 2}}, '
    '{"name": "add", "arguments": {"a": 3, "b": 2}}, {"name": "add", "arguments": {"a": 4, "b": 2}}]',
    "matrix": '{"rows": [[0, 0, 1], [0, 1, 0], [1, 0, 0]], "shape": [3, 3]}',
    "refrain": "Row, row, row your boat,\nGently down the stream,\n"
    "Merrily, merrily, merrily, merrily,\nLife is but a dream.",
    "code": "def f(x):\n    if x:\n        return 1\n    return 0\n\n\ndef g(x):\n    if x:\n        return 2",
}


@pytest.mark.parametrize("text", REAL.values(), ids=REAL)
def test_repeated_structure_is_no_loop(tokenizer, text):
    # an id for each byte: three to four times the repeated tokens of a real tokenizer
    assert find_loop(tokenizer(text)["input_ids"]) is None


def test_function_calls_are_no_loops(tokenizer):
    rows = function_calling.generate_conversations("test", 200, seed=0)
    assert not any(find_loop(tokenizer(row["completion"][0]["content"])["input_ids"]) for row in rows)
