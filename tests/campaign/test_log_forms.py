"""Every form of a log is read as it is meant, or its records are refused with a reason, and none is lost unsaid."""

import bz2
import gzip
import json
import logging
import lzma
import re

import pyarrow as pa
import pytest
from campaign_table import Table
from log_forms import ROWS, Form

from spec_kd.prompts.logs.query_logs import load_query_logs

TEXT = {name for name, form in ROWS.items() if all(isinstance(content, str) for content in form.files.values())}
BINARY = "bytes of their own"
TABLE = Table(
    "log_forms",
    ROWS,
    columns=("read", "numbered_gz", "xz", "zst", "bz2", "utf_16", "utf_8_sig", "crlf"),
    missing={name: {"utf_16": BINARY, "utf_8_sig": BINARY, "crlf": BINARY} for name in set(ROWS) - TEXT}
    | {"CSV": {"crlf": "a cell holds a line break"}},
)


def show(messages, tools=None) -> str:
    """Messages on one line."""
    turns = []
    for message in messages:
        calls = [
            f"-> {c['function']['name']}({json.dumps(c['function']['arguments'])})"
            for c in message.get("tool_calls") or ()
        ]
        turns.append(f"{message['role']}: " + " ".join(filter(None, [message["content"], *calls])))
    if tools:
        turns.insert(0, "tools " + ", ".join(tool.get("function", tool)["name"] for tool in json.loads(tools)))
    return " | ".join(turns)


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


COLUMNS = {
    "read": lambda name, data: (name, data),
    "numbered_gz": lambda name, data: (f"{name}.1.gz", gzip.compress(data)),
    "xz": lambda name, data: (f"{name}.xz", lzma.compress(data)),
    "zst": lambda name, data: (f"{name}.zst", zstd(data)),
    "bz2": lambda name, data: (f"{name}.bz2", bz2.compress(data)),
    "utf_16": lambda name, data: (name, data.decode().encode("utf-16") if data else data),
    "utf_8_sig": lambda name, data: (name, data.decode().encode("utf-8-sig")),
    "crlf": lambda name, data: (name, data.replace(b"\n", b"\r\n")),
}


def test_cell(cell, outcome, tmp_path, caplog, tokenizer):
    form: Form = TABLE[cell]
    (tmp_path / "logs").mkdir()
    for name, content in form.files.items():
        name, data = COLUMNS[cell.column](name, content.encode() if isinstance(content, str) else content)
        (tmp_path / "logs" / name).write_bytes(data)
    options = {"near_duplicate_threshold": None, "test_fraction": 0, "show_progress": False, **form.options}
    before = tokenizer.chat_template
    if form.template is not None:
        tokenizer.chat_template = form.template
        options["processing_class"] = tokenizer
    try:
        with caplog.at_level(logging.WARNING):
            if not form.prompts:
                with pytest.raises(ValueError, match="No prompt of") as error:
                    load_query_logs(tmp_path / "logs", tmp_path / "out", **options)
                assert re.search(form.says, str(error.value)), error.value
                assert not (tmp_path / "out/.partial").exists()
                outcome.note(str(error.value).replace(str(tmp_path), ""))
                return
            result = load_query_logs(tmp_path / "logs", tmp_path / "out", **options)
    finally:
        tokenizer.chat_template = before
    rows, report = list(result.train), result.report
    assert [show(row["prompt"], row.get("tools")) for row in rows] == form.prompts
    answers = [show([{**row["completion"][0], "role": "a"}])[3:] if row.get("completion") else None for row in rows]
    assert answers == (form.answers or [None] * len(rows))
    assert (report.malformed, report.left_out) == (form.malformed, form.left_out)
    assert report.records == sum(file["records"] for file in report.per_file)
    assert sum(run["last"] - run["first"] + 1 for run in report.outcomes) >= (form.malformed + form.left_out > 0)
    said = [*report.reasons, *report.notes, *report.malformed_examples, *(run["reason"] for run in report.outcomes)]
    assert re.search(form.says, "\n".join(said)), said
    assert "\ufeff" not in json.dumps(rows, ensure_ascii=False)
