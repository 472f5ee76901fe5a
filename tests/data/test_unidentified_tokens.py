import pytest

from spec_kd.data.unidentified_tokens import complete_batch, describe_unidentified, report_dropped
from spec_kd.engines.base import Completion
from spec_kd.engines.server.logprobs import UnidentifiedTokensError

WHOLE = Completion([5, 6], "length")


def test_ids_of_padded_rows_stop_the_job_or_are_named():
    answers = [WHOLE, Completion([5, 300, 301], "length"), WHOLE]
    with pytest.raises(
        ValueError, match=r'row 8 contains id 300, but the tokenizer has 261.*on_unidentified_token="drop"'
    ):
        complete_batch(lambda: answers, [4, 8, 2], 261, "raise")
    dropped = complete_batch(lambda: answers, [4, 8, 2], 261, "drop")
    assert dropped == [WHOLE, ["(id 300, beyond the tokenizer)", "(id 301, beyond the tokenizer)"], WHOLE]


def test_names_take_the_place_of_completions():
    def run():
        raise UnidentifiedTokensError([["x", "x"], []], [None, WHOLE])

    assert complete_batch(run, [0, 1], 261, "drop") == [["x", "x"], WHOLE]
    with pytest.raises(UnidentifiedTokensError, match="2 tokens, in 1 of 2 completions") as raised:
        complete_batch(run, [0, 1], 261, "raise")
    assert raised.value.examples == ["x"]


def test_the_report_counts_what_it_does_not_list(caplog):
    unidentified = {row: [f"token {row}", "common"] for row in range(3, 33)}
    text = describe_unidentified(unidentified)
    assert text.startswith("30 responses have no exact ids, as 60 of their tokens are not exactly one id")
    assert "such as 'token 3', 'common', 'token 4', 'token 5', 'token 6': rows 3, 4," in text
    assert text.endswith(", 22 and 10 more")
    report_dropped({}, 40)
    assert not caplog.records
    report_dropped(unidentified, 40)
    assert "10 rows for 40 prompts" in caplog.text
    with pytest.raises(ValueError, match="Nothing is left"):
        report_dropped(unidentified, 30)
