"""The benchmark of large logs: its log, and its exact search for near-duplicates."""

import json

from benchmarks.scale.logs import THRESHOLD, find_kept
from benchmarks.scale.made_logs import LogMaker, make_log
from spec_kd.prompts.deduplication import normalize_text
from spec_kd.prompts.logs.files import find_files, read_records
from spec_kd.prompts.similarity import END, LONG, WINDOW


def list_windows(text: str) -> set[str]:
    padded = text + "\0" * (WINDOW - 1)
    return {padded[start : start + WINDOW] for start in range(len(text))}


def is_alike(one: set[str], other: set[str]) -> bool:
    return len(one & other) >= THRESHOLD * len(one | other)


def test_the_exact_search_finds_what_all_pairs_show():
    maker = LogMaker(seed=1)
    lines = [maker.make_line(number) for number in range(700)]
    requests = [json.loads(line)["request"] for line in lines if line.endswith(b"}")]
    rows = [[request["messages"], json.dumps(request.get("tools"))] for request in requests]
    texts = [normalize_text(messages) for messages, _ in rows]
    parts = [[list_windows(part) for part in (text, text[:END], text[-END:])] for text in texts]
    scopes = [(len(messages), messages[0]["role"], messages[0]["content"] * (messages[0]["role"] == "system"), tools)
              for messages, tools in rows]  # fmt: skip
    kept: list[int] = []
    for row, scope in enumerate(scopes):
        for other in kept:
            num_parts = 3 if min(len(texts[row]), len(texts[other])) > LONG else 1
            pairs = zip(parts[row][:num_parts], parts[other][:num_parts], strict=True)
            if scope == scopes[other] and all(is_alike(*pair) for pair in pairs):
                break
        else:
            kept.append(row)
    assert find_kept(rows) == kept
    assert len(rows) - len(kept) > 60


def test_a_log_has_the_lines_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.scale.made_logs.LINES_OF_FILE", 60)
    make_log(230, tmp_path)
    files, _ = find_files(str(tmp_path), tmp_path / "out")
    assert [path.name for path in files] == [
        "log-00000.jsonl", "log-00001.jsonl.gz", "log-00002.jsonl", "log-00003.jsonl.zst",
    ]  # fmt: skip
    assert sum(1 for path in files for _ in read_records(path)) == 230
