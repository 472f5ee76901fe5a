"""Near-duplicates against the exact Jaccard similarity of all pairs."""

import random
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spec_kd.prompts.deduplication import (
    MAX_COMPARED,
    NUM_HASHES,
    NearDuplicateIndex,
    _compare,
    _sign,
    find_near_duplicates,
    normalize_text,
)
from spec_kd.prompts.similarity import WINDOW, ComparedText

WORDS = (
    "alpha",
    "beta",
    "gamma",
    "delta",
    "epsilon",
    "zeta",
    "lambda",
    "omicron",
    "sigma",
    "tau",
    "东京",
    "天气",
    "今天",
)


def write_text(rng: random.Random, num_words: int = 40) -> str:
    return " ".join(rng.choice(WORDS) + str(rng.randrange(1000)) for _ in range(num_words))


def edit(rng: random.Random, text: str, num_words: int) -> str:
    words = text.split()
    for position in rng.sample(range(len(words)), num_words):
        words[position] = write_text(rng, 1)
    return " ".join(words)


def list_windows(text: str) -> set[str]:
    padded = text + "\0" * (WINDOW - 1)
    return {padded[start : start + WINDOW] for start in range(len(text))}


def compute_jaccard(first: str, second: str) -> float:
    a, b = list_windows(first), list_windows(second)
    return len(a & b) / len(a | b)


def build_chains(num_chains: int, seed: int) -> list[str]:
    """Texts of which many pairs are alike, in every degree."""
    rng = random.Random(seed)
    texts = []
    for _ in range(num_chains):
        texts.append(write_text(rng))
        texts += [edit(rng, texts[-1], number) for number in (1, 2, 4, 8, 16)]
    rng.shuffle(texts)
    return texts


def test_estimates_are_those_of_exact_jaccard():
    texts = build_chains(16, seed=0)
    signatures, _ = _sign(texts, None)
    assert signatures.shape == (len(texts), NUM_HASHES)
    exact = np.array([[compute_jaccard(a, b) for b in texts] for a in texts])
    errors = (_compare(signatures[:, None], signatures[None]) - exact)[np.triu_indices(len(texts), 1)]
    assert abs(errors.mean()) < 0.005
    near = (exact > 0.3)[np.triu_indices(len(texts), 1)]
    assert errors[near].std() < 0.05
    assert np.abs(errors).max() < 0.25


@pytest.mark.parametrize("threshold", [0.6, 0.8])
def test_finds_what_brute_force_finds(threshold):
    texts = build_chains(60, seed=1)
    found = find_near_duplicates(texts, threshold)
    windows = [list_windows(text) for text in texts]
    kept: list[int] = []
    missed = 0
    for number, is_duplicate in enumerate(found):
        best = max((len(windows[number] & windows[k]) / len(windows[number] | windows[k]) for k in kept), default=0.0)
        assert best >= threshold or not is_duplicate, (best, texts[number])
        missed += best >= threshold and not is_duplicate
        if best > threshold + 0.12:
            assert is_duplicate, (best, texts[number])
        if not is_duplicate:
            kept.append(number)
    assert 50 < found.sum() < len(texts) - 60  # both kinds were there
    assert missed <= 0.05 * found.sum()


def test_batches_and_single_texts_agree():
    texts = build_chains(60, seed=2)
    index = NearDuplicateIndex(0.8)
    one_by_one = []
    for text in texts:
        one_by_one.append(index.contains(text))
        if not one_by_one[-1]:
            index.add(text)
    assert len(index) == len(texts) - sum(one_by_one)
    # bands miss some pairs near the threshold that a batch, in which all pairs are compared, does not
    assert (find_near_duplicates(texts, 0.8) != np.array(one_by_one)).mean() < 0.03


def test_identical_texts_are_always_found_while_tables_grow():
    rng = random.Random(3)
    texts = [write_text(rng, 12) for _ in range(6000)]
    found = find_near_duplicates(texts + texts, 0.9)
    assert not found[: len(texts)].any()
    assert found[len(texts) :].all()


def test_find_returns_the_number_of_the_text():
    rng = random.Random(4)
    texts = [write_text(rng) for _ in range(20)]
    index = NearDuplicateIndex()
    assert index.find(texts[0]) is None
    assert [index.add(text) for text in texts] == list(range(20))
    assert [index.find(edit(rng, text, 1)) for text in texts] == list(range(20))


def test_texts_of_an_index_go_to_a_folder(tmp_path):
    index = NearDuplicateIndex(folder=tmp_path / "later")  # made before the first text is added
    assert not index.contains("some text")
    with pytest.raises(FileNotFoundError):
        index.add("some text")
    (tmp_path / "later").mkdir()
    index = NearDuplicateIndex(folder=tmp_path / "later")
    index.add("some text")
    assert index.contains("some text")
    assert not list((tmp_path / "later").iterdir())  # a file without a name, of which a killed run leaves nothing


def test_scopes_keep_texts_apart():
    index = NearDuplicateIndex()
    text = "what is the weather like in Paris today?"
    assert index.find_and_add([text, text, text], [1, 2, 1]).tolist() == [False, False, True]
    assert index.find_and_add([text, text], [3, 2]).tolist() == [False, True]


def test_texts_that_are_not_admitted_are_not_added():
    index = NearDuplicateIndex()
    asked = []
    flags = index.find_and_add(
        ["first text", "first text", "another one"], admit=lambda p: bool(asked.append(p)) or p == 1
    )
    assert flags.tolist() == [False, False, False]
    assert asked == [0, 1, 2]
    assert len(index) == 1
    assert index.contains("first text") and not index.contains("another one")


@given(st.lists(st.text(max_size=12), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_any_text_is_found_again(texts):
    index = NearDuplicateIndex(1.0)
    for text in texts:
        index.add(text)
    for text in texts:
        assert list_windows(texts[index.find(text)]) == list_windows(text)
    for other in ("", "something else entirely"):
        if other not in texts:
            assert not index.contains(other)


def test_boilerplate_openings_do_not_slow_it_down_or_match():
    rng = random.Random(5)
    opening = write_text(rng, 30)
    texts = [f"{opening} {write_text(rng, 30)}" for _ in range(3000)]
    assert not find_near_duplicates(texts, 0.8).any()


def test_texts_of_one_template_are_compared_a_bounded_number_of_times(monkeypatch):
    rng = random.Random(10)
    template = write_text(rng, 60)
    texts = [f"{template} {write_text(rng, 11)}" for _ in range(1200)]
    similarity = [compute_jaccard(texts[0], text) for text in texts[1:50]]
    assert min(similarity) > 0.7 and max(similarity) < 0.8  # pairs that the estimate cannot tell from duplicates
    calls = []
    is_like = ComparedText.is_like
    monkeypatch.setattr(ComparedText, "is_like", lambda *given: calls.append(given) or is_like(*given))
    assert not find_near_duplicates(texts, 0.8).any()
    assert len(texts) < len(calls) <= 2 * MAX_COMPARED * len(texts)


def test_memory_per_text():
    rng = random.Random(6)
    index = NearDuplicateIndex()
    batches = [[write_text(rng, 5) for _ in range(250)] for _ in range(32)]
    tracemalloc.start()
    for batch in batches:
        index.find_and_add(batch)
    current, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(index) > 7_500
    assert current / len(index) < 340


@pytest.mark.parametrize("threshold", [0.2, 1.2])
def test_refuses_thresholds_out_of_range(threshold):
    with pytest.raises(ValueError, match="threshold"):
        NearDuplicateIndex(threshold)


def test_normalized_text():
    assert normalize_text("  ＡＢ\tc\n\nStraße ") == "ab c strasse"
    messages = [
        {"role": "system", "content": "You are helpful."},
        {"role": "user", "content": "Hello  World"},
        {"role": "assistant", "content": "Hi", "tool_calls": []},
        {"role": "tool", "content": "21 C"},
        {"role": "user"},
    ]
    assert normalize_text(messages) == "hello world 21 c"
    assert find_near_duplicates([], 0.8).shape == (0,)


QUESTIONS = [
    "What is the main argument of the author?",
    "Which year does the second paragraph mention?",
    "Who pays for the damage, and until when?",
    "Summarize this in one sentence.",
]


@pytest.mark.parametrize(
    "place", ["{document} {question}", "{question} {document}", "Read. {document} Q: {question} A:"]
)
@pytest.mark.parametrize("num_words", [60, 200, 3000])
def test_questions_about_one_document_are_no_duplicates(place, num_words):
    document = write_text(random.Random(7), num_words)
    texts = [normalize_text(place.format(document=document, question=question)) for question in QUESTIONS]
    assert find_near_duplicates(texts, 0.8)[1:].any()  # as a whole they are
    assert not find_near_duplicates(texts, 0.8, compare_ends=True).any()
    index = NearDuplicateIndex(0.8, compare_ends=True)
    for text in texts:  # one by one, through the tables
        assert not index.contains(text)
        index.add(text)
    again = [text + "!" for text in texts]
    assert all(map(index.contains, texts)) and all(map(index.contains, again))
    assert find_near_duplicates(texts + again, 0.8, compare_ends=True).tolist() == [False] * 4 + [True] * 4


def test_ends_of_short_texts_are_not_compared():
    texts = [text[:140] for text in build_chains(40, seed=8)]
    expected = find_near_duplicates(texts, 0.8)
    np.testing.assert_array_equal(find_near_duplicates(texts, 0.8, compare_ends=True), expected)
    assert expected.any()


def test_ends_survive_growth():
    rng = random.Random(9)
    texts = [write_text(rng, 60) for _ in range(3000)]
    found = find_near_duplicates(texts + texts, 0.9, compare_ends=True)
    assert not found[: len(texts)].any() and found[len(texts) :].all()
