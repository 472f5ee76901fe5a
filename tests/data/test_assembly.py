"""Datasets larger than memory: what is held at a time, and that it changes nothing."""

import os
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from tiny import build_tokenizer

from spec_kd.data import assembly
from spec_kd.data.responses import generate_responses, score_completions
from spec_kd.data.sharded_runs import RunResult
from spec_kd.engines.base import Completion, Engine

ROWS = 320
TOKENS = 2000


class Writer(Engine):
    """An engine that says much: every answer follows from its prompt."""

    name = "writer"
    is_reproducible = True
    logprobs_mode = "raw"
    default_batch_size = 4
    processing_class = build_tokenizer()

    def check(self, prompts, options, signal):
        assert all(len(ids) for ids in prompts)

    def describe(self):
        return {"target": "written here"}

    def generate(self, prompts, options, signal=None, seed=""):
        completions = []
        for ids in prompts:
            length = options.max_new_tokens - sum(ids) % 50
            written = [5 + (sum(ids) + i) % 100 for i in range(length)]
            completions.append(Completion(written, "length", [-i / 1000 for i in written]))
        return completions

    def score(self, prompts, completions, signal, seed=""):
        return [Completion(ids, "length", [-i / 500 for i in ids]) for ids in completions]


def make_prompts():
    rows = [
        {"prompt": f"{'long ' * (i % 7)}{i}", "number": i, "extra": {"a": i} if i % 2 else [i]} for i in range(ROWS)
    ]
    return Dataset.from_list(rows, on_mixed_types="use_json").shuffle(seed=3)  # an indices mapping


def generate(output_dir, **options):
    return generate_responses(
        Writer(), make_prompts(), max_new_tokens=TOKENS, teacher_signal="token_only", shard_size=4,
        output_dir=output_dir, show_progress=False, **options,
    )  # fmt: skip


@pytest.fixture
def watch(monkeypatch):
    """Makes small slices, and records what Arrow and the process hold whenever one is read."""
    monkeypatch.setattr(assembly, "ROWS_AT_A_TIME", 8)
    read, seen = RunResult.read, []
    descriptors = Path("/proc/self/fd")

    def read_and_look(self, rows):
        table = read(self, rows)
        open_files = len(os.listdir(descriptors)) if descriptors.exists() else 0
        seen.append((len(rows), pa.total_allocated_bytes(), open_files))
        return table

    monkeypatch.setattr(RunResult, "read", read_and_look)
    return seen


def test_little_of_a_run_on_disk_is_in_memory(tmp_path, watch):
    generate(tmp_path / "warm up", batch_size=40)
    watch.clear()
    arrow = pa.total_allocated_bytes()
    files = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    python_peaks = []
    for folder in ("run", "again"):  # the interpreter's table of interned strings may double (8 MB) in one of them
        watch.clear()
        tracemalloc.start()
        dataset = generate(tmp_path / folder)
        python_peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()

    size = dataset.data.nbytes
    assert size > ROWS * TOKENS * 8  # ids and log-probabilities alone
    assert [rows for rows, _, _ in watch] == [8] * (ROWS // 8)
    assert max(held for _, held, _ in watch) - arrow < size / 8
    assert min(python_peaks) < size / 2
    assert max(open_files for _, _, open_files in watch) < files + ROWS // 8  # not one for each of the 80 shards
    assert pa.total_allocated_bytes() - arrow < size / 8
    assert [Path(file["filename"]).parent.name for file in dataset.cache_files] == [".arrow"]
    groups = pq.ParquetFile(tmp_path / "run" / "responses.parquet").metadata
    assert [groups.row_group(i).num_rows for i in range(groups.num_row_groups)] == [8] * (ROWS // 8)


def test_the_set_on_disk_is_the_set_in_memory(tmp_path, watch):
    on_disk, in_memory = generate(tmp_path), generate(None)
    assert in_memory.cache_files == [] and on_disk.cache_files
    assert on_disk.features == in_memory.features and on_disk.to_list() == in_memory.to_list()
    prompts = make_prompts()
    assert on_disk["number"][:] == prompts["number"][:] and on_disk["extra"][:] == prompts["extra"][:]
    for row in on_disk.select(range(0, ROWS, 13)):
        start = sum(row["prompt_ids"])
        assert row["completion_ids"] == [5 + (start + i) % 100 for i in range(TOKENS - start % 50)]
        assert row["prompt_ids"] == Writer.processing_class(row["prompt"])["input_ids"]
    written = (tmp_path / "responses.parquet").read_bytes()
    (tmp_path / ".arrow" / "responses.arrow").unlink()
    assert generate(tmp_path).to_list() == in_memory.to_list()
    assert (tmp_path / "responses.parquet").read_bytes() == written


def test_scores_share_the_path(tmp_path, watch):
    responses = generate(tmp_path / "responses")
    watch.clear()
    scored = [
        score_completions(
            Writer(), responses, teacher_signal="token_only", shard_size=4, output_dir=folder, show_progress=False
        )
        for folder in (tmp_path / "scores", None)
    ]
    assert {rows for rows, _, _ in watch} == {8}
    assert scored[0].to_list() == scored[1].to_list() and scored[0].features == scored[1].features
    assert scored[0].column_names[:-2] == responses.column_names[:-2]
    for row in scored[0].select(range(0, ROWS, 13)):
        assert row["teacher_token_logprobs"] == pytest.approx([-i / 500 for i in row["completion_ids"]])
    with pytest.raises(ValueError, match="`dataset` has no rows"):
        score_completions(Writer(), responses.select([]), show_progress=False)
