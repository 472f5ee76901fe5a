"""The result that an earlier version wrote, a sample in `tests/prompts/old`, is read."""

import os
import shutil
from pathlib import Path

from spec_kd.prompts.logs import query_logs
from spec_kd.prompts.logs.query_logs import load_query_logs

OLD = Path(__file__).parents[1] / "old"


def test_prompts_of_a_log_are_not_read_again(tmp_path, monkeypatch):
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    os.utime(tmp_path / "log.jsonl", ns=(1_700_000_000 * 10**9,) * 2)  # a part of what tells one log from another
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(query_logs, "LogReader", None)
    logs = load_query_logs("log.jsonl", "logs", test_fraction=0, redact=["email"], show_progress=False)
    assert logs.train["prompt"][1] == [{"role": "user", "content": "When was paper invented?"}]
    assert logs.train["completion"][:] == [[{"role": "assistant", "content": "Five meters."}], None]
    assert (logs.report.kept, logs.report.malformed, logs.report.with_completion) == (2, 1, 1)
