"""The options of the functions that make prompt sets, as command lines and recipes read them."""

import pytest
from transformers import HfArgumentParser

from spec_kd.prompts.curated import CuratedOptions
from spec_kd.prompts.filters import TextFilter
from spec_kd.prompts.logs.options import LogOptions
from spec_kd.prompts.mixing import MixOptions
from spec_kd.prompts.synthesis.options import SynthesisOptions


@pytest.mark.parametrize(
    ("argv", "options"),
    [
        ("", LogOptions()),
        (
            "--redact email key --turns all --max_tokens 9",
            LogOptions(redact=["email", "key"], turns="all", max_tokens=9),
        ),
        ("", CuratedOptions()),
        ("--question_template {q} {a}", CuratedOptions(question_template=["{q}", "{a}"])),
        ("", MixOptions()),
        ("--num_queries 5", SynthesisOptions(5)),
        ("--num_queries 5 --temperature 0.7 1 --num_turns 2", SynthesisOptions(5, temperature=[0.7, 1.0], num_turns=2)),
        ("", TextFilter()),
        ("--languages en zh", TextFilter(languages=["en", "zh"])),
    ],
)
def test_a_command_line_makes_the_options_of_the_function(argv, options):
    (parsed,) = HfArgumentParser(type(options)).parse_args_into_dataclasses(argv.split())
    assert parsed == options


def test_one_value_is_a_list_of_one():
    assert SynthesisOptions(1, system_prompts="Steer.", top_p=0.9).system_prompts == ["Steer."]
    assert CuratedOptions(question_template="{q}").question_template == ["{q}"]
