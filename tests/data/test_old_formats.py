"""Folders and columns that earlier versions wrote: they are read, and a run in them is continued."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny import build_tokenizer

from spec_kd.data.responses import generate_responses
from spec_kd.data.teacher_signal import TeacherInfo
from spec_kd.data.token_columns import LOGPROB_COLUMN, SPARSE_COLUMN, read_token_column
from spec_kd.engines.base import Completion, Engine
from spec_kd.losses import SparseDistribution

FORMAT_1 = Path(__file__).parent / "old_formats" / "responses_of_format_1"
PROMPTS = ["a", "unclear", "bb", "refuse", "cccc"]
IDS = [[74, 77, 80, 83], [45, 48, 51, 54], [89, 92, 95, 98]]


class Writer(Engine):
    """The engine that wrote the folder; two of the prompts got no completion."""

    name = "writer"
    is_reproducible = True
    logprobs_mode = "processed"
    default_batch_size = 2
    processing_class = build_tokenizer()

    def __init__(self):
        self.num_asked = 0

    def check(self, prompts, options, signal):
        pass

    def describe(self):
        return {"target": "written here"}

    def generate(self, prompts, options, signal=None, seed=""):
        self.num_asked += len(prompts)
        written = [[5 + (sum(ids) + 3 * i) % 100 for i in range(4)] for ids in prompts]
        log_p = [np.array([-0.25 * (i + 1), -3.0], np.float32) for i in range(4)]
        return [
            Completion(
                ids,
                "length",
                [-0.25, -0.5, -0.75, -1.0],
                SparseDistribution(
                    [np.array([id, 200 + i], np.int32) for i, id in enumerate(ids)], log_p, [np.array([3, 1])] * 4
                ),
            )
            for ids in written
        ]


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(FORMAT_1, tmp_path / "run")


def read_old():
    return pq.read_table(FORMAT_1 / "responses.parquet").to_pylist()


def repeat(folder, engine):
    return generate_responses(
        engine, PROMPTS, max_new_tokens=4, temperature=1.0, teacher_signal="sampled_logprobs", num_draws=4,
        batch_size=2, shard_size=2, on_unidentified_token="drop", on_unusable_prompt="skip", output_dir=folder,
        show_progress=False,
    )  # fmt: skip


def test_a_finished_run_of_format_1_is_returned_without_asking(folder):
    engine = Writer()
    rows = repeat(folder, engine)
    assert engine.num_asked == 0
    assert rows["prompt"][:] == ["a", "bb", "cccc"] and rows["completion_ids"][:] == IDS
    for name in ("completion_ids", "teacher_token_logprobs", "teacher_signal", "teacher_checksum"):
        assert rows[name][:] == [row[name] for row in read_old()]
    assert all(map(json.loads(rows[0]["teacher_info"]).__contains__, ("format", "logprobs_mode")))


def test_a_run_of_format_1_is_continued(folder):
    (folder / "responses.parquet").unlink()
    (folder / ".shards" / "00000.arrow").unlink()
    engine = Writer()
    rows = repeat(folder, engine)
    assert engine.num_asked == 2  # the rows of that shard
    assert set(map(tuple, IDS)) <= set(map(tuple, rows["completion_ids"]))


def test_teacher_columns_of_format_1_are_read():
    row = read_old()[0]
    info = TeacherInfo.from_json(row["teacher_info"])
    assert (info.logprobs_mode, info.logprobs_temperature, info.method) == ("processed", 1.0, "sampled_logprobs")
    assert json.loads(info.to_json())["format"] == 2
    assert read_token_column(row, LOGPROB_COLUMN, "Row 0") == [-0.25, -0.5, -0.75, -1.0]
    assert len(read_token_column(row, SPARSE_COLUMN, "Row 0")) == 4


def test_newer_formats_are_refused_in_a_sentence(folder):
    manifest = folder / ".shards" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 9}))
    with pytest.raises(ValueError, match=r"has the format 9, and this version of spec_kd reads 1. Upgrade spec_kd"):
        repeat(folder, Writer())
    info = json.loads(read_old()[0]["teacher_info"])
    with pytest.raises(ValueError, match=r"newer format than 2.*upgrade spec_kd"):
        TeacherInfo.from_json(json.dumps({**info, "format": 3}))
