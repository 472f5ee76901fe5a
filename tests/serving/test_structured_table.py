"""What the records say of structured output, in the docs and for other code."""

import pytest
from structured_table import PAGE, TABLE, tabulate

from spec_kd.serving import SERVING_ENGINES


def test_the_table_is_that_of_the_records():
    """`python tests/serving/structured_table.py` writes the table."""
    assert TABLE.findall(PAGE.read_text(encoding="utf-8")) == [tabulate()]


@pytest.mark.parametrize("engine", SERVING_ENGINES.values(), ids=lambda one: one.name)
def test_every_rule_of_an_engine_cuts_drafts_or_none(engine):
    countings = [engine.find_counting(rule.sampling) for rule in engine.rules]
    assert {one.cuts_refused for one in countings} == {engine.name == "vllm"}
    assert not (engine.counting.cuts_refused and "draft" in engine.masked_models)
