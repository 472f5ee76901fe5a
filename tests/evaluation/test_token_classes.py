import json

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from spec_kd.evaluation.token_classes import (
    DIGITS,
    IDEOGRAPH,
    JSON_PUNCTUATION,
    KEY,
    PUNCTUATION,
    SPECIAL,
    TOOL_NAME,
    VALUE,
    WHITESPACE,
    WORD,
    classify_characters,
    classify_tokens,
    split_into_pieces,
)

CALL = '[{"name": "get_weather", "arguments": {"city": "Paris, \\"75\\"", "days": 3, "name": "x"}}]'


def classes_of(text, part, start=0):
    position = text.index(part, start)
    return set(classify_characters(text)[position : position + len(part)])


def test_function_calls_are_read_as_json():
    assert classes_of(CALL, "get_weather") == {TOOL_NAME}
    assert classes_of(CALL, "city") == classes_of(CALL, "days") == {KEY}
    assert classes_of(CALL, 'Paris, \\"75\\"') == {VALUE}
    assert classes_of(CALL, "3") == {VALUE}
    # a key of the call itself is part of its form, and `name` among the arguments names no tool
    assert classes_of(CALL, "arguments") == {JSON_PUNCTUATION}
    assert classes_of(CALL, '"x"') == {JSON_PUNCTUATION, VALUE} and classes_of(CALL, "x") == {VALUE}
    assert set(classify_characters(CALL)) == {JSON_PUNCTUATION, TOOL_NAME, KEY, VALUE, WHITESPACE}


@pytest.mark.parametrize("cut", range(1, len(CALL)))
def test_a_call_that_was_cut_off_is_read_as_far_as_it_goes(cut):
    whole, part = classify_characters(CALL), classify_characters(CALL[:cut])
    assert len(part) == cut
    same = sum(a == b for a, b in zip(part, whole, strict=False))
    # only the string that was cut may be taken for something else
    opened = max(CALL[:cut].rfind('"'), 0)
    assert same >= min(opened, cut) - len("get_weather") - 2


def test_text_goes_by_its_characters():
    text = "天气 is 25 度, ok."
    assert classify_characters(text)[:4] == [IDEOGRAPH, IDEOGRAPH, WHITESPACE, WORD]
    assert classes_of(text, "25") == {DIGITS} and classes_of(text, ",") == {PUNCTUATION}
    assert classify_characters("what {json} is") == classify_characters("what ") + [PUNCTUATION] + [WORD] * 4 + [
        PUNCTUATION, WHITESPACE, WORD, WORD,
    ]  # fmt: skip


def test_a_token_belongs_to_most_of_its_characters():
    pieces = [" hello", "!!a", "\n", "", "气", "<|end|>"]
    assert classify_tokens(pieces, ["<|end|>"]) == [WORD, PUNCTUATION, WHITESPACE, IDEOGRAPH, IDEOGRAPH, SPECIAL]


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
                    max_leaves=8), st.booleans())  # fmt: skip
def test_any_json_is_classified_whole(value, is_ascii):
    text = json.dumps([value], ensure_ascii=is_ascii)
    classes = classify_characters(text)
    assert len(classes) == len(text)
    assert set(classes) <= {JSON_PUNCTUATION, TOOL_NAME, KEY, VALUE, WHITESPACE}


@given(st.text(max_size=30))
def test_pieces_join_to_the_text(text):
    tokenizer = tiny.build_tokenizer()
    ids = tokenizer(text)["input_ids"]
    pieces = split_into_pieces(ids, tokenizer)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert len(classify_tokens(pieces)) == len(ids)


def test_bytes_of_one_character_belong_to_its_last_token():
    tokenizer = tiny.build_tokenizer()
    ids = tokenizer("a气<|end|>")["input_ids"]
    assert split_into_pieces(ids, tokenizer) == ["a", "", "", "气", "<|end|>"]
    assert split_into_pieces(ids[:3], tokenizer)[-1] == "\ufffd"  # cut within a character
