"""A log cut into shares: nothing is read twice, nothing is left out, and no record is torn."""

import gzip
import json

import pytest

from spec_kd.prompts.logs.files import read_records
from spec_kd.prompts.logs.scale.shares import cut_into_shares


def write_lines(path, num_lines: int) -> None:
    records = [{"messages": [{"role": "user", "content": f"Question {n} " * (n % 7 + 1)}]} for n in range(num_lines)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def read_all(parts) -> list:
    return [record for part in parts for _, record in read_records(part)]


@pytest.mark.parametrize("num_shares", [1, 2, 5, 40])
def test_all_records_are_in_one_share_in_order(tmp_path, num_shares):
    files = [tmp_path / name for name in ("a.jsonl", "b.jsonl.gz", "c.log", "empty.jsonl", "d.txt")]
    write_lines(files[0], 90)
    files[1].write_bytes(gzip.compress(files[0].read_bytes()))
    write_lines(files[2], 7)
    files[3].touch()
    files[4].write_text("Why?\nHow?\n" * 30)
    shares = cut_into_shares(files, num_shares)
    assert len(shares) == num_shares
    assert read_all(part for share in shares for part in share) == read_all(files)
    for name, most in (("a.jsonl", num_shares), ("b.jsonl.gz", 1)):
        assert 1 <= sum(part.name == name for share in shares for part in share) <= most
    if num_shares == 5:
        assert sum(part.name == "a.jsonl" for share in shares for part in share) > 1


def test_events_stay_with_their_request(tmp_path):
    event = "data: " + json.dumps({"choices": [{"delta": {"content": "Yes."}, "finish_reason": "stop"}]})
    lines = []
    for n in range(40):
        lines += [json.dumps({"messages": [{"role": "user", "content": f"Question {n}"}]}), event, "", event]
    path = tmp_path / "log.jsonl"
    path.write_text("\n".join(lines))
    shares = cut_into_shares([path], 9)
    assert sum(map(bool, shares)) > 5
    assert read_all(part for share in shares for part in share) == read_all([path])
    assert all("response" in record for record in read_all([path]))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("array.json", json.dumps([{"text": "Why? " * 9}] * 50).encode()),
        ("objects.jsonl", json.dumps({"text": "Why? " * 9}, indent=1).encode() * 50),
        ("table.csv", b"text\n" + b'"a question\nof two lines"\n' * 50),
        ("wide.jsonl", ('{"text": "Why?"}\n' * 50).encode("utf-16")),
    ],
)
def test_what_is_not_in_lines_is_not_cut(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data)
    shares = cut_into_shares([path], 4)
    assert [len(share) for share in shares] == [1, 0, 0, 0]
    assert read_all(shares[0]) == read_all([path])


def test_lines_before_a_part_are_counted(tmp_path):
    write_lines(path := tmp_path / "log.jsonl", 100)
    parts = [part for share in cut_into_shares([path], 6) for part in share]
    starts = [part.count_lines_before() for part in parts]
    assert starts[0] == 0
    assert [start + part.count_lines() for start, part in zip(starts, parts, strict=True)][:-1] == starts[1:]
    assert sum(1 for _ in read_records(parts[-1])) == 100 - starts[-1]
