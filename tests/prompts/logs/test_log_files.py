"""Records of every kind of file, with their places."""

import bz2
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spec_kd.prompts.logs import files as log_files
from spec_kd.prompts.logs.files import find_files, read_records

RECORDS = [{"text": f"line {n}", "more": {"n": n}} for n in range(1, 4)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
NUMBERED = list(enumerate(RECORDS, start=1))


def compress_zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("log.jsonl", LINES),
        ("log", LINES),
        ("log.jsonl.gz", gzip.compress(LINES, mtime=0)),
        (
            "log.jsonl.gz",
            gzip.compress(LINES[:30], mtime=0) + gzip.compress(LINES[30:], mtime=0),
        ),  # as appended by a log rotation
        ("log.jsonl.zst", compress_zstd(LINES)),
        ("log.ndjson.bz2", bz2.compress(LINES)),
        ("log.json", LINES),
        ("log.json", json.dumps(RECORDS).encode()),
        ("log.json", json.dumps(RECORDS, indent=2).encode()),
        ("log.json.gz", gzip.compress(json.dumps(RECORDS, indent=2).encode(), mtime=0)),
    ],
)
def test_json_in_every_wrapping(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    assert list(read_records(tmp_path / name)) == NUMBERED


def test_one_object_over_several_lines(tmp_path):
    (tmp_path / "call.json").write_text(json.dumps(RECORDS[0], indent=2))
    assert list(read_records(tmp_path / "call.json")) == NUMBERED[:1]


def test_text_is_a_record_a_line(tmp_path):
    (tmp_path / "prompts.txt").write_text("one\n\n  two \n三\n", encoding="utf-8")
    assert list(read_records(tmp_path / "prompts.txt")) == [(1, "one"), (3, "two"), (4, "三")]


def test_parquet_without_the_keys_that_arrow_adds(tmp_path):
    messages = [[{"role": "user", "content": "a"}], [{"role": "tool", "content": "b", "tool_call_id": "c"}]]
    pq.write_table(pa.table({"messages": messages}), tmp_path / "log.parquet")
    assert [record["messages"] for _, record in read_records(tmp_path / "log.parquet")] == messages


def test_json_arrays_are_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(log_files, "CHUNK", 7)
    (tmp_path / "log.json").write_text(json.dumps(RECORDS, indent=1))
    assert list(read_records(tmp_path / "log.json")) == NUMBERED


def test_what_cannot_be_read_is_an_error_in_its_place(tmp_path):
    (tmp_path / "log.jsonl").write_bytes(LINES + b'{"text": "cut\n' + LINES[:0] + b"\xff\xfe\n" + b'{"text": "last"}')
    numbers, records = zip(*read_records(tmp_path / "log.jsonl"), strict=True)
    assert numbers == (1, 2, 3, 4, 5, 6)
    assert [isinstance(record, ValueError) for record in records] == [False, False, False, True, True, False]


def test_a_json_file_of_lines_may_begin_with_a_broken_or_a_long_one(tmp_path):
    (tmp_path / "log.json").write_bytes(b'{"broken\n' + LINES)
    (_, error), *rest = read_records(tmp_path / "log.json")
    assert isinstance(error, ValueError) and [record for _, record in rest] == RECORDS
    long = {"text": "x" * 100_000}
    (tmp_path / "log.json").write_bytes(json.dumps(long).encode() + b"\n" + LINES)
    assert [record for _, record in read_records(tmp_path / "log.json")] == [long, *RECORDS]


def test_a_cut_file_ends_with_an_error(tmp_path):
    lines = "".join(f'{{"text": "{n * 7919 % 10007}"}}\n' for n in range(20_000)).encode()
    (tmp_path / "log.jsonl.gz").write_bytes(gzip.compress(lines)[:-2000])
    *records, (number, error) = read_records(tmp_path / "log.jsonl.gz")
    assert isinstance(error, OSError)
    assert number == len(records) + 1 > 100
    (tmp_path / "array.json").write_text(json.dumps(RECORDS)[:-10])
    *records, (number, error) = read_records(tmp_path / "array.json")
    assert (records, number) == (NUMBERED[:2], 3) and isinstance(error, ValueError)


def test_files_folders_and_patterns(tmp_path):
    for name in ("b.jsonl", "a.jsonl.gz", "deep/c.json", "deep/readme.md", ".hidden/d.jsonl", "out/train.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names = lambda paths: [str(path.relative_to(tmp_path)) for path in paths]  # noqa: E731
    found, ignored = find_files(tmp_path, tmp_path / "out")
    assert (names(found), names(ignored)) == (["a.jsonl.gz", "b.jsonl", "deep/c.json"], ["deep/readme.md"])
    found, _ = find_files([str(tmp_path / "b*"), tmp_path / "**/*.json", tmp_path / "deep"], tmp_path / "out")
    assert names(found) == ["b.jsonl", "deep/c.json"]  # each once
    for missing in (tmp_path / "none.jsonl", f"{tmp_path}/*.csv", tmp_path / ".hidden/deeper"):
        with pytest.raises(FileNotFoundError, match="no file"):
            find_files([tmp_path, missing], tmp_path / "out")
