import dataclasses
import json
import logging
import sys
from pathlib import Path

import pytest

from spec_kd.evaluation.report import EvaluationReport, load_report, save_report


def test_json_keeps_everything(report, small_report):
    # a NaN equals nothing, not even what it was read back as
    draft = dataclasses.replace(
        report.draft, settings=[dataclasses.replace(s, breakdowns=s.breakdowns[:2]) for s in report.draft.settings]
    )
    finite = dataclasses.replace(report, drafts=[draft])
    assert EvaluationReport.from_json(finite.to_json()) == finite
    for one in (report, small_report):
        assert EvaluationReport.from_json(one.to_json()).to_json() == one.to_json()


def test_files(report, tmp_path):
    paths = save_report(report, tmp_path / "new" / "folder")
    assert paths == {kind: tmp_path / "new" / "folder" / f"report.{kind}" for kind in ("json", "md", "html", "png")}
    assert json.loads(paths["json"].read_text(encoding="utf-8"))["num_assistant_tokens"] == 5
    assert paths["png"].read_bytes().startswith(b"\x89PNG")
    assert "把下面这句话翻译成英文" in paths["html"].read_text(encoding="utf-8")


def test_rendering_again_gives_the_same_files(report, tmp_path):
    provenance = {**report.provenance, "pair": (1, 2), "undefined": float("nan"), "nested": {"empty": None}}
    first = save_report(dataclasses.replace(report, provenance=provenance), tmp_path / "first")
    second = save_report(load_report(first["json"]), tmp_path / "second")
    third = save_report(load_report(tmp_path / "second"), tmp_path / "second")  # over what is there
    for kind in ("json", "md", "html", "png"):
        assert first[kind].read_bytes() == second[kind].read_bytes() == third[kind].read_bytes(), kind


def test_without_matplotlib(small_report, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    (tmp_path / "report.png").write_bytes(b"of an older report")
    with caplog.at_level(logging.WARNING):
        paths = save_report(small_report, tmp_path)
    assert sorted(paths) == ["html", "json", "md"] and not (tmp_path / "report.png").exists()
    assert "report.png` is not written" in caplog.text and "pip install spec_kd[report]" in caplog.text


def test_what_is_no_report_is_refused(small_report, tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no report"):
        load_report(tmp_path)
    path = tmp_path / "report.json"
    for text in ("", "[]", "{}", "3", '{"drafts": null}', small_report.to_json().replace('"alpha"', '"beta"')):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="no evaluation report"):
            load_report(path)


def test_a_report_of_format_1_is_read_and_written_as_the_present_one(tmp_path):
    """`report_format_1.json` was written when the serving engine was called `engine` and the responses `texts`."""
    report = load_report(Path(__file__).parent / "report_format_1.json")
    assert report.serving_engine == "transformers" and report.serving_rule.startswith("the draft samples")
    assert report.provenance["responses"]["temperature 1"] == {"prompts": 96, "completion_tokens": 3232}
    assert report.draft.setting("t1").at_gamma(5).block_efficiency.value == pytest.approx(2.9577, abs=1e-4)
    paths = save_report(report, tmp_path)
    written = json.loads(paths["json"].read_text(encoding="utf-8"))
    assert written["format"] == 2 and "engine" not in written
    assert load_report(tmp_path) == report


def test_a_report_of_a_later_format_is_refused(small_report):
    with pytest.raises(ValueError, match="has format 3, but this version reads 2"):
        EvaluationReport.from_json(small_report.to_json().replace('"format": 2', '"format": 3'))
