"""The parts of the run of TRL's suites that need no checkout of TRL."""

import pytest

from benchmarks.trl_suite.__main__ import compare
from benchmarks.trl_suite.stand_ins import find_models
from benchmarks.trl_suite.tokenizers import FAMILIES, build_tokenizer

TEXTS = ["Beautiful is better than ugly.", "Explicit is better than implicit."] * 3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stand_in_keeps_special_tokens_and_template(family):
    tokenizer = build_tokenizer(f"{family}-1B", TEXTS)
    for token in (FAMILIES[family].eos, FAMILIES[family].pad, *FAMILIES[family].others):
        assert len(tokenizer(token, add_special_tokens=False)["input_ids"]) == 1, token
    assert tokenizer.decode(tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"]) == TEXTS[0]
    assert bool(tokenizer.chat_template) == (FAMILIES[family].template is not None)


def test_an_unknown_family_is_refused_by_name():
    with pytest.raises(KeyError, match="my-org/model"):
        build_tokenizer("my-org/model", TEXTS)


def test_models_are_found_in_the_source_of_a_test(tmp_path):
    (tmp_path / "test.py").write_text('a = "trl-internal-testing/tiny-Qwen2ForCausalLM-2.5"\nb = "my-org/tiny-x"\n')
    assert find_models(tmp_path / "test.py") == {"tiny-Qwen2ForCausalLM-2.5"}


def test_the_table_counts_what_passes_with_trl_and_lists_what_differs():
    theirs = {"a": {"outcome": "passed", "reason": ""}, "b": {"outcome": "passed", "reason": ""},
              "c": {"outcome": "failed", "reason": "KeyError: x"}}  # fmt: skip
    ours = {"Ours": {"a": {"outcome": "passed", "reason": ""}, "b": {"outcome": "failed", "reason": "ValueError: y"}}}
    table = compare(theirs, ours)
    assert "| tests that pass with TRL's trainer | 2 | 1 |" in table
    assert "| `b` | passed | Ours: failed | ValueError: y |" in table and "| `a` |" not in table
    assert "| `c` | failed | Ours: not run | KeyError: x |" in table
