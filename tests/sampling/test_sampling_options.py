import dataclasses

import pytest
from transformers import HfArgumentParser

from spec_kd.sampling.options import SamplingOptions, check_truncation


@pytest.mark.parametrize(
    ("top_k", "top_p", "message"), [(-1, 1.0, "`top_k` is -1"), (0, 0.0, "`top_p` is 0.0"), (0, 1.1, "`top_p` is 1.1")]
)
def test_truncation_out_of_range(top_k, top_p, message):
    with pytest.raises(ValueError, match=message):
        check_truncation(top_k, top_p)
    with pytest.raises(ValueError, match=message):
        SamplingOptions(top_k=top_k, top_p=top_p)


@pytest.mark.parametrize(
    ("name", "value"), [("max_new_tokens", 0), ("temperature", -0.1), ("temperature", "1"), ("seed", None)]
)
def test_an_option_out_of_range_is_named(name, value):
    with pytest.raises(ValueError, match=f"`{name}` is {value!r}"):
        SamplingOptions(**{name: value})


def test_whole_numbers_and_numbers_are_one_setting():
    options = SamplingOptions(8, temperature=1, top_p=1)
    assert repr(dataclasses.asdict(options)) == repr(dataclasses.asdict(SamplingOptions(8)))


@pytest.mark.parametrize(
    ("options", "is_truncated"),
    [({}, False), ({"top_k": 5}, True), ({"top_p": 0.9}, True), ({"top_k": 5, "top_p": 0.9, "temperature": 0}, False)],
)
def test_greedy_text_is_not_truncated(options, is_truncated):
    assert SamplingOptions(**options).is_truncated is is_truncated


def test_the_command_line_parses_it():
    parsed = HfArgumentParser(SamplingOptions).parse_args_into_dataclasses(["--temperature", "0.7", "--top_k", "5"])
    assert parsed == (SamplingOptions(temperature=0.7, top_k=5),)
