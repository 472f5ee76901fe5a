"""Text of files whatever its compression and encoding, by lines that memory can hold."""

import bz2
import gzip
import json
import lzma
import subprocess
import sys

import pytest

from spec_kd.prompts.logs import files as log_files
from spec_kd.prompts.logs import text_decoding
from spec_kd.prompts.logs.files import find_files, find_kind, read_records
from spec_kd.prompts.logs.query_logs import load_query_logs

LINE = json.dumps({"messages": [{"role": "user", "content": "größer?"}]}, ensure_ascii=False)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.jsonl", ".jsonl"), ("a.jsonl.1", ".jsonl"), ("a.jsonl.12.gz", ".jsonl"), ("a.log-20260131", ".log"),
     ("a.log.2026-01-31", ".log"), ("a.log.2026-01-31_12.xz", ".log"), ("a.jsonl.gz.1", ".jsonl"), ("A.CSV", ".csv"),
     ("chat-2024.jsonl", ".jsonl"), ("a.1", ""), ("model-7.md", ".md"), ("v1.2.tar.gz", ".tar"), ("log", "")],
)  # fmt: skip
def test_kinds_of_numbered_files(tmp_path, name, kind):
    assert find_kind(tmp_path / name) == kind


def test_files_that_are_not_read_are_named(tmp_path, caplog):
    for name in ("a.jsonl", "a.jsonl.1", "b.csv.xz", "notes.md", ".hidden.jsonl", ".git/config"):
        (tmp_path / "logs" / name).parent.mkdir(parents=True, exist_ok=True)
        content = "prompt\nCSV?\n" if "csv" in name else LINE.replace("größer", name)
        data = content.encode()
        (tmp_path / "logs" / name).write_bytes(lzma.compress(data) if name.endswith(".xz") else data)
    found, ignored = find_files(tmp_path / "logs", tmp_path / "out")
    assert [path.name for path in found] == ["a.jsonl", "a.jsonl.1", "b.csv.xz"]
    assert sorted(path.name for path in ignored) == [".hidden.jsonl", "notes.md"]
    result = load_query_logs(tmp_path / "logs", tmp_path / "out", test_fraction=0, show_progress=False)
    assert result.report.kept == 3
    assert "2 files of the folders are not read because of their names" in caplog.text
    assert [file["read"] for file in result.report.per_file] == [1, 1, 1]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("wrap", [bytes, gzip.compress, lzma.compress])
def test_encodings_in_compressions(tmp_path, encoding, wrap):
    (tmp_path / "log.jsonl").write_bytes(wrap(f"{LINE}\n{LINE}".encode(encoding)))
    assert list(read_records(tmp_path / "log.jsonl")) == [(1, json.loads(LINE)), (2, json.loads(LINE))]


def test_a_line_over_the_limit_is_an_error_and_the_next_is_read(tmp_path, monkeypatch):
    for module in (text_decoding, log_files):
        monkeypatch.setattr(module, "LONGEST", 1000)
    long = json.dumps({"text": "x" * 5000})
    (tmp_path / "log.jsonl").write_text(f"{LINE}\n{long}\n{LINE}\n{long}")
    records = list(read_records(tmp_path / "log.jsonl"))
    assert [number for number, _ in records] == [1, 2, 3, 4]
    assert [isinstance(record, ValueError) for _, record in records] == [False, True, False, True]
    assert "longer than" in str(records[1][1])


def test_a_gzip_bomb_stays_within_memory(tmp_path):
    with gzip.open(tmp_path / "log.jsonl.gz", "wb", compresslevel=9) as file:
        file.write(b'{"messages": "')
        for _ in range(256):
            file.write(bytes(2**20))
        file.write(b'"}\n' + LINE.encode() + b"\n")
    code = (
        "import resource\nfrom spec_kd.prompts.logs.files import read_records\nfrom pathlib import Path\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"kinds = [type(record).__name__ for _, record in read_records(Path({str(tmp_path / 'log.jsonl.gz')!r}))]\n"
        "assert kinds == ['ValueError', 'dict'], kinds\n"
        "grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before\n"
        "assert grown < 100 * 1024, grown\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_came_before_a_break_is_not_lost(tmp_path):
    lines = "".join(f'{{"text": "{n * 7919 % 10007}"}}\n' for n in range(20_000)).encode()
    for name, data in (("a.jsonl.gz", gzip.compress(lines)), ("a.jsonl.xz", lzma.compress(lines))):
        (tmp_path / name).write_bytes(data[: len(data) // 2])
        *records, (number, error) = read_records(tmp_path / name)
        assert isinstance(error, Exception) and [n for n, _ in records] == list(range(1, number))
        assert number > 100
    for compress in (gzip.compress, lzma.compress, bz2.compress):
        (tmp_path / "a.jsonl").write_bytes(
            compress(LINE.encode()) + compress(b"\n" + LINE.encode()) + bytes(9) + b"more"
        )
        *records, (number, error) = read_records(tmp_path / "a.jsonl")
        assert [n for n, _ in records] == list(range(1, number)) and records
        assert "follows the compressed data" in str(error)
    (tmp_path / "a.json").write_bytes(f"[{LINE}, {LINE}, ".encode() + b'{"text": "\xff"}, ' + f"{LINE}]".encode())
    assert [isinstance(record, dict) for _, record in read_records(tmp_path / "a.json")] == [True, True, False, True]


def test_errors_of_files_obey_on_error_and_name_the_place(tmp_path):
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "a.jsonl").write_text(LINE)
    (logs / "b.json").write_bytes(f"[{LINE}, ".encode() + b'{"text": "\xff"}]')
    (logs / "c.parquet").write_bytes(b"PAR1 this is none PAR1")
    (logs / "d.jsonl.xz").write_bytes(lzma.compress(LINE.encode())[:30])
    report = load_query_logs(logs, tmp_path / "out", show_progress=False, test_fraction=0).report
    places = [example.split(": ")[0] for example in report.malformed_examples]
    assert places == [f"{logs / 'b.json'}:2", f"{logs / 'c.parquet'}:1", f"{logs / 'd.jsonl.xz'}:1"]
    for name in ("b.json", "c.parquet", "d.jsonl.xz"):
        with pytest.raises(ValueError, match=f"{name}:[12]: "):
            load_query_logs(logs / name, tmp_path / "out2", on_error="raise", show_progress=False)
