"""`check_serving`: each broken pair is named by exactly the check that it was made for, in every engine."""

import itertools
import json
from dataclasses import replace

import pytest
from checks_table import PAGE, TABLE, tabulate
from tiny import build_llama, build_tokenizer
from transformers import AutoTokenizer

from benchmarks.serving.break_llama_cpp import OUTPUT
from benchmarks.serving.broken_pairs import ENGINES, PAIRS, BrokenPair, write_pair
from spec_kd import check_serving
from spec_kd.serving import SERVING_ENGINES
from spec_kd.serving.check import check_pair
from spec_kd.serving.pair import ERRORS, ServedPair, read_model

RECORD = json.loads(OUTPUT.read_text(encoding="utf-8"))["pairs"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    return {pair.name: write_pair(pair, folder / pair.name) for pair in PAIRS}


@pytest.fixture(scope="module")
def findings(folders):
    """What is found in each pair, for all engines; `check_serving` reads a pair anew for each."""
    found = {}
    for pair in PAIRS:
        draft, target = folders[pair.name]
        served = ServedPair(read_model("draft", draft), read_model("target", target), **pair.options)
        found[pair.name] = check_pair(served, SERVING_ENGINES)
    return found


def test_the_pairs_are_of_all_engines():
    assert set(ENGINES) == set(SERVING_ENGINES)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
@pytest.mark.parametrize("engine", SERVING_ENGINES)
def test_a_broken_pair_is_named(findings, engine, pair):
    assert {one.check for one in findings[pair.name] if one.engine == engine} == pair.expected.get(engine, set())


@pytest.mark.parametrize("engine", SERVING_ENGINES)
def test_every_check_has_a_broken_pair(engine):
    """An adapter as a draft has a test of its own."""
    found = {name for pair in PAIRS for name in pair.expected.get(engine, ())}
    assert {check.name for check in SERVING_ENGINES[engine].checks} - {"adapter_draft"} == found


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair.name in RECORD], ids=lambda pair: pair.name)
def test_llama_server_did_with_a_pair_what_its_record_says(findings, pair):
    """`python -m benchmarks.serving.break_llama_cpp` recorded it."""
    observed = RECORD[pair.name]["verdict"]
    found = [one for one in findings[pair.name] if one.engine == "llama.cpp"]
    errors = {one.consequence for one in found if one.severity == "error"} - {"drafts one by one"}
    assert observed in errors if errors else observed == "drafts"


def test_a_finding_says_what_it_leads_to_and_how_to_mend_it(folders):
    (finding,) = check_serving(*folders["many_more_rows"], "llama.cpp")
    assert (finding.engine, finding.check, finding.severity) == ("llama.cpp", "distant_rows", "error")
    assert str(finding) == (
        "llama.cpp does not draft: The draft has 512 vocabulary rows, the target 272: more than 128 apart. "
        'llama-server logs "the target and draft vocabs are not compatible" and serves the target alone. '
        "Export the draft with `export_draft(..., target_vocab_size=272)`."
    )
    assert replace(finding, consequence="slower").severity == "warning" and finding.consequence in ERRORS


def test_sentences_are_whole(findings):
    for finding in itertools.chain(*findings.values()):
        for text in (finding.what, finding.effect, finding.fix):
            assert text.endswith(".") and not text.endswith(".."), text
        assert finding.what[0].isupper() or finding.what[0] == "`", finding.what


def test_lengths_are_those_that_are_served(tmp_path):
    draft, target = write_pair(BrokenPair("short", draft={"max_position_embeddings": 128}), tmp_path)
    assert check_serving(draft, target, "vllm", max_length=100) == []
    assert check_serving(draft, target, "vllm", max_length=124, num_assistant_tokens=4) == []
    assert [one.check for one in check_serving(draft, target, "vllm", max_length=125, num_assistant_tokens=4)] == [
        "short_draft"
    ]
    assert check_serving(draft, target, "sglang", max_length=128, num_assistant_tokens=4) == []
    assert "may need 512" in check_serving(draft, target, "sglang")[0].what


def test_scaled_positions_count(tmp_path):
    scaled = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
    pair = BrokenPair("scaled", draft={"max_position_embeddings": 128, "rope_parameters": scaled})
    assert check_serving(*write_pair(pair, tmp_path), "vllm") == []


def test_cards_share_heads(folders):
    draft, target = folders["heads"]
    assert check_serving(draft, target, "vllm", tensor_parallel_size=2) == []
    (finding,) = check_serving(draft, target, "vllm", tensor_parallel_size=4)
    assert finding.what == "The draft has 2 attention heads, which 4 cards cannot share."


def test_an_adapter_is_no_draft(tmp_path, folders):
    from peft import LoraConfig, get_peft_model

    _, target = folders["sound"]
    adapter = get_peft_model(build_llama(vocab_size=272), LoraConfig(task_type="CAUSAL_LM"))
    tokenizer = AutoTokenizer.from_pretrained(target)
    for engine in SERVING_ENGINES:
        findings = check_serving(adapter, target, engine, draft_processing_class=tokenizer)
        assert [one.check for one in findings] == ([] if engine == "transformers" else ["adapter_draft"])


def test_loaded_models_are_checked(target):
    draft = build_llama(vocab_size=288)
    tokenizer = build_tokenizer()
    (finding,) = check_serving(
        draft, target, draft_processing_class=tokenizer, target_processing_class=build_tokenizer()
    )
    assert finding.check == "unequal_rows" and "has 288 vocabulary rows" in finding.what
    with pytest.raises(ValueError, match=r"The draft has no tokenizer.*pass `draft_processing_class`"):
        check_serving(draft, target)


def test_wrong_options_are_refused(folders):
    for options, message in (
        ({"serving_engine": "lamma"}, "`serving_engine` is 'lamma'"),
        ({"tensor_parallel_size": 0}, "`tensor_parallel_size` is 0"),
        ({"max_length": 1.5}, "`max_length` is 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            check_serving(*folders["sound"], **options)


def test_the_page_lists_every_check():
    """`python tests/serving/checks_table.py` writes the table."""
    assert TABLE.findall(PAGE.read_text(encoding="utf-8")) == [tabulate()]
