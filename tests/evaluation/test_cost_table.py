import json

import pytest

from spec_kd.evaluation import ServingCosts, read_costs


def write(tmp_path, text):
    path = tmp_path / "costs.json"
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    return path


def test_one_table_or_one_for_each_batch_size(tmp_path):
    table = {"cost_ratio": 0.1, "verify_cost": {"1": 1, "4": 1.3}, "round_overhead": 0.05}
    expected = ServingCosts(cost_ratio=0.1, verify_cost={1: 1.0, 4: 1.3}, round_overhead=0.05)
    assert read_costs(write(tmp_path, table)) == [expected]
    first, second = read_costs(write(tmp_path, [table, {**table, "batch_size": 8}]))
    assert first == expected and second.batch_size == 8
    assert first.verify(2) == pytest.approx(1.1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ([], "has no costs"),
        ([3], r"lack \['cost_ratio', 'verify_cost'\]"),
        ({"cost_ratio": 0.1, "verify_cost": {"1": 1}, "gamma": 5}, r"unknown \['gamma'\]"),
        ({"cost_ratio": 0.1, "verify_cost": {"five": 1}}, "cannot be"),
        ({"cost_ratio": 0.1, "verify_cost": 1.1}, "cannot be"),
        ({"cost_ratio": -0.1, "verify_cost": {"1": 1}}, "`cost_ratio` is -0.1, but must be at least 0"),
        ({"cost_ratio": "much", "verify_cost": {"1": 1}}, "cannot be"),
    ],
)
def test_a_file_without_costs_is_refused_with_an_example(tmp_path, text, message):
    with pytest.raises(ValueError, match=f"(?s){message}.*like .*cost_ratio"):
        read_costs(write(tmp_path, text))
