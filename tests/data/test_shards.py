import pytest

from spec_kd.data.shards import IdLists

LISTS = [[5, 6, 7], [151_935], [], [1, 2]]


@pytest.mark.parametrize("is_on_disk", [False, True])
def test_lists_come_back(tmp_path, is_on_disk):
    lists = IdLists(iter(LISTS), tmp_path if is_on_disk else None)
    assert list(lists) == LISTS and len(lists) == 4 and lists[-1] == [1, 2]
    assert lists.lengths.tolist() == [3, 1, 0, 2]
    assert max(map(max, filter(None, lists))) == 151_935
    with pytest.raises(IndexError):
        lists[4]
    assert not list(tmp_path.iterdir())  # the file has no name, so that nothing has to tidy it up
