import pytest
from tiny import build_llama
from transformers import PretrainedConfig

from spec_kd.sampling.prompts import PromptBatch, UnusablePromptError, check_prompt_ids, check_room, get_max_length


def test_the_longest_prompt_is_named():
    check_room([1, 10], 24, {"draft": 34, "target": None})
    message = r"Prompt 1 has 12 tokens.*`max_new_tokens=24` in the draft's 34 positions\. 2 of 3 prompts.*Or this\.$"
    with pytest.raises(UnusablePromptError, match=message) as raised:
        check_room([11, 12, 1], 24, {"target": 100, "draft": 34}, advice="Or this.")
    assert raised.value.fault == "context_full"
    with pytest.raises(ValueError, match=r"^Row 1 of the logs has 12 tokens"):
        check_room([1, 12], 24, {"draft": 34}, name="Row {} of the logs".format)


def test_the_last_token_written_needs_no_position_where_nothing_reads_it():
    check_room([1, 11], 24, {"draft": 34}, num_unread=1)
    with pytest.raises(ValueError, match="Prompt 1 has 12 tokens"):
        check_room([1, 12], 24, {"draft": 34}, num_unread=1)


def test_positions_of_a_model():
    model = build_llama(seed=1)
    assert get_max_length(model) == model.config.max_position_embeddings
    model.config = PretrainedConfig()
    assert get_max_length(model) is None


@pytest.mark.parametrize(
    ("ids", "message"), [([], "has no tokens"), ([5, 9], "contains id 9, but the target has 9 ids"), ([-1, 3], "id -1")]
)
def test_ids_that_are_not_there(ids, message):
    check_prompt_ids([[0, 8]], 9, "the target has")
    with pytest.raises(ValueError, match=f"Prompt 1 .*{message}"):
        check_prompt_ids([[0, 8], ids], 9, "the target has")
    with pytest.raises(ValueError, match=r"^Row 70 "):
        check_prompt_ids(PromptBatch([[0, 8], ids], [30, 70]), 9, "the target has")
