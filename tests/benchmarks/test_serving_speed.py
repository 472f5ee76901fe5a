"""The parts of the benchmark of speed that need no server."""

import json

import numpy as np
import pytest

from benchmarks.serving import speed
from spec_kd import AcceptanceMetrics, ServingCosts


def make_record(plain_ms, draft_ms, drafted, accepted, tokens=13):
    ids = list(range(tokens))
    plain = {"completion_ids": ids, "ms": plain_ms, "drafted": 0, "accepted": 0}
    return {"plain": plain, "draft": {"completion_ids": ids, "ms": draft_ms, "drafted": drafted, "accepted": accepted}}


def test_predicted_beside_observed():
    """12 tokens in 5 passes that draft 3 tokens each but for the last one, which is plain; 2.8 and 1 steps."""
    records = [make_record(120.0, 120.0, 12, 7), make_record(240.0, 240.0, 12, 7)]
    metrics = AcceptanceMetrics(
        tokens=np.array([12, 12]), target_calls=np.array([5, 5]), accepted=np.array([7, 7]), drafted=np.array([12, 12]),
        drafting_rounds=np.array([4, 4]), accepted_by_position=np.zeros((2, 3)), temperature=0.0,
        num_assistant_tokens=3, draft_sampling="stochastic", method="replay",
    )  # fmt: skip
    costs = ServingCosts(round_cost={3: 2.8}, round_cost_range={3: [2.5, 3.1]})
    row = speed.describe("cut", 3, records, metrics, costs)
    # the plain pass is one step, as the line from 1 at no drafted token to 2.8 at 3 says of 12 tokens in 5 passes
    assert row["predicted_round_cost"] == pytest.approx((4 * 2.8 + 1) / 5)
    assert row["predicted_speedup"] == pytest.approx(12 / (4 * 2.8 + 1), abs=1e-3)
    assert row["observed_speedup"][0] == 1.0 and row["observed_round_cost"] == pytest.approx(2.4)
    assert row["difference"] == pytest.approx(12 / 12.2 - 1, abs=1e-3)
    assert row["tokens_per_second"] == pytest.approx(24 / 0.36, abs=1e-2)
    assert row["same_texts"] == 2 and row["round_cost_range"] == [2.5, 3.1]
    table = speed.tabulate({"speed": [row]})
    assert "| cut | 3 | 2.44 | 2.40 | 0.98 | 1.00 [1.00, 1.00] | -2 % |" in table


def test_the_committed_record_is_the_table_of_the_readme():
    record = json.loads(speed.OUTPUT.read_text())
    assert speed.tabulate(record) in speed.README.read_text()
    assert {one["num_draft_tokens"] for one in record["speed"] if one["draft"] == "cut"} == {2, 4, 6}
