import pytest

from spec_kd.decoding.speculative import CompletionInProgress, Round, leave_out_drafts_after_end

EOS = 1


def write(max_new_tokens, *rounds):
    text = CompletionInProgress(0, max_new_tokens, {EOS})
    for i, record in enumerate(rounds):
        assert not text.is_complete, f"complete before round {i}"
        text.add_round(*record)
    return text


@pytest.mark.parametrize(
    ("drafted", "accepted", "next_token", "ids", "expected", "rejected"),
    [
        ([4, 5, 6], 3, 7, [4, 5, 6, 7], Round(3, 3, 4), []),  # all accepted and a bonus
        ([4, 5, 6], 1, 9, [4, 9], Round(3, 1, 2), [1]),  # a correction
        ([4, 5, 6], 0, 9, [9], Round(3, 0, 1), [0]),
        ([4, EOS], 2, 8, [4, EOS], Round(2, 2, 2), []),  # an accepted EOS, no bonus
        ([4, 5, 6], 1, EOS, [4, EOS], Round(3, 1, 2), [1]),  # EOS as correction
        ([4, 5], 2, EOS, [4, 5, EOS], Round(2, 2, 3), []),  # EOS as bonus
        ([4, EOS], 1, 8, [4, 8], Round(2, 1, 2), [1]),  # a rejected EOS
        ([], 0, 4, [4], Round(0, 0, 1), []),  # nothing drafted
    ],
)
def test_one_round(drafted, accepted, next_token, ids, expected, rejected):
    text = write(9, (drafted, accepted, next_token))
    assert text.ids == ids and text.rounds == [expected] and text.rejected_positions == rejected
    assert text.is_complete == (ids[-1] == EOS) and text.num_left == 9 - len(ids)


def test_positions_count_from_the_start_of_the_text():
    text = write(7, ([4, 5], 1, 6), ([7], 1, 8), ([9, 10], 0, 11), ([12], 0, 13))
    assert text.ids == [4, 6, 7, 8, 11, 13]
    assert text.rejected_positions == [1, 4, 5]
    assert text.num_left == 1 and not text.is_complete
    text.add_round([], 0, 14)
    assert text.is_complete


def test_drafts_behind_the_end_are_left_out_in_every_round():
    assert leave_out_drafts_after_end([Round(5, 0, 1), Round(5, 1, 2)]) == [Round(3, 0, 1), Round(2, 1, 2)]
    assert leave_out_drafts_after_end([Round(2, 1, 2), Round(1, 1, 2)]) == [Round(2, 1, 2), Round(1, 1, 2)]
