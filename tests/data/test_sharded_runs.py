"""Runs that keep the teacher's signal: killed, shared between processes, on a full disk, over text that exists."""

import errno
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import forked
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from tiny import build_llama, build_tokenizer

from spec_kd.data import shards
from spec_kd.data.responses import generate_responses, score_completions

ROOT = Path(__file__).parents[2]
TEXTS = [f"{word} {i}" for i in range(3) for word in ("a", "hello there", "the quick brown fox")]
SIGNAL = {"teacher_signal": "sampled_logprobs", "num_draws": 16}

RUN = """
import os, signal, sys
from datasets import Dataset
from tiny import build_llama, build_tokenizer
from spec_kd.data import shards
from spec_kd.data.responses import generate_responses, score_completions

if sys.argv[2] not in ("whole", "resumed"):
    replace, count = os.replace, 0
    def replace_then_die(source, place):
        global count
        count += 1
        if count == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, place)
    shards.os.replace = replace_then_die
generate_responses(
    build_llama(seed=1, hidden_size=48), sys.argv[3:], processing_class=build_tokenizer(), max_new_tokens=12,
    temperature=1.0, teacher_signal="sampled_logprobs", num_draws=16, batch_size=2, shard_size=2,
    output_dir=sys.argv[1], show_progress=False,
)
"""


def run(arguments, *launcher):
    """In processes that share nothing with each other, not even the seed of hashes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    script = [*launcher] if launcher else ["-c", RUN]
    return subprocess.run([sys.executable, *script, *map(str, arguments)], cwd=ROOT, env=environment, timeout=300)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The finished file of an undisturbed run."""
    folder = tmp_path_factory.mktemp("whole")
    assert run([folder, "whole", *TEXTS]).returncode == 0
    return (folder / "responses.parquet").read_bytes()


def test_log_probabilities_are_not_kept_in_a_dictionary(whole):
    """Parquet tries one on every column, which costs floats a third."""
    metadata = pq.ParquetFile(io.BytesIO(whole)).metadata
    columns = {
        metadata.row_group(0).column(i).path_in_schema: metadata.row_group(0).column(i)
        for i in range(metadata.num_columns)
    }
    logprobs = columns["teacher_token_logprobs.list.element"]
    assert "BYTE_STREAM_SPLIT" in logprobs.encodings
    assert not any(column.has_dictionary_page for column in columns.values())
    assert {column.compression for column in columns.values()} == {"ZSTD"}


@pytest.mark.parametrize("moment", [2, 5, 14])
def test_a_run_killed_at_any_moment_ends_with_the_same_bytes(whole, tmp_path, moment):
    """The n-th file about to be moved into place: manifest, five shards and sums, mapped copy and sum, finished set.

    The rerun is a process like the killed one: another number of threads adds floats in another order, and the last
    bit of a log-probability is not the same.
    """
    assert forked.run(RUN, tmp_path, moment, *TEXTS).returncode == -signal.SIGKILL
    assert not (tmp_path / "responses.parquet").exists()
    assert forked.run(RUN, tmp_path, "resumed", *TEXTS).returncode == 0
    assert (tmp_path / "responses.parquet").read_bytes() == whole


@pytest.mark.distributed
def test_two_processes_share_the_shards_and_end_with_the_same_bytes(whole, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(RUN)
    output = tmp_path / "out"
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    assert run([output, "whole", *TEXTS], *launcher, "--rdzv_endpoint", "localhost:0", script).returncode == 0
    assert (output / "responses.parquet").read_bytes() == whole


def call(target, output_dir=None, **options):
    return generate_responses(
        target, TEXTS, processing_class=build_tokenizer(), max_new_tokens=12, temperature=1.0, batch_size=2,
        shard_size=2, output_dir=output_dir, show_progress=False, **{**SIGNAL, **options},
    )  # fmt: skip


@pytest.fixture(scope="module")
def target():
    return build_llama(seed=1, hidden_size=48)


@pytest.mark.parametrize("moment", [6, 12, 14], ids=["shard", "mapped copy", "finished set"])
def test_a_full_disk_stops_with_a_clear_error_and_a_state_to_resume_from(target, tmp_path, monkeypatch, moment):
    written = []

    def fill_up(descriptor):
        written.append(descriptor)
        if len(written) == moment:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shards.os, "fsync", fill_up)
        with pytest.raises(OSError, match=r"not be written \(No space left on device\); finished shards are kept"):
            call(target, tmp_path)
    assert not [path for path in tmp_path.rglob(".*") if path.is_file()]  # nothing half-written is left
    assert call(target, tmp_path).to_list() == call(target).to_list()


def test_another_signal_is_another_run(target, tmp_path):
    call(target, tmp_path)
    with pytest.raises(ValueError, match="signal: "):
        call(target, tmp_path, teacher_signal="token_only", num_draws=None)
    with pytest.raises(ValueError, match="signal: "):
        call(target, tmp_path, teacher_signal=None, num_draws=None)


def test_the_text_does_not_depend_on_the_signal_and_its_columns_are_replaced(target):
    plain, kept = call(target, teacher_signal=None, num_draws=None), call(target)
    assert plain["completion_ids"][:] == kept["completion_ids"][:]
    assert set(kept.column_names) - set(plain.column_names) == {
        "teacher_token_logprobs", "teacher_signal", "teacher_info", "teacher_checksum"
    }  # fmt: skip
    again = generate_responses(
        target, kept, processing_class=build_tokenizer(), max_new_tokens=4, temperature=0.0, show_progress=False
    )
    assert again.column_names == plain.column_names  # nothing of the old answers is left beside the new ones


def test_scoring_resumes_and_equals_generation(target, tmp_path, monkeypatch):
    """Token by token what generation kept; a second call reads it from disk."""
    responses = call(target)
    options = {
        "processing_class": build_tokenizer(), **SIGNAL, "sampling_temperature": 1.0, "batch_size": 2,
        "shard_size": 2, "output_dir": tmp_path, "show_progress": False,
    }  # fmt: skip
    scored = score_completions(target, responses, **options)
    for mine, theirs in zip(scored, responses, strict=True):
        assert mine["completion_ids"] == theirs["completion_ids"]
        assert mine["teacher_token_logprobs"] == pytest.approx(theirs["teacher_token_logprobs"], abs=1e-4)
    monkeypatch.setattr("spec_kd.engines.transformers.TransformersEngine.score", lambda *_: pytest.fail("it scored"))
    assert score_completions(target, responses, **options).to_list() == scored.to_list()
    with pytest.raises(ValueError, match=r"sampling_temperature: 1.0 in the folder, None now"):
        score_completions(target, responses, **{**options, "sampling_temperature": None})


def test_scoring_refuses_what_it_cannot_score(target):
    options = {"processing_class": build_tokenizer(), "show_progress": False}
    with pytest.raises(ValueError, match="with its own tokenizer"):
        score_completions(target, Dataset.from_dict({"prompt": ["a"], "completion": ["b"]}), **options)
    rows = Dataset.from_dict({"prompt_ids": [[5], [5]], "completion_ids": [[6], []]})
    with pytest.raises(ValueError, match=r"`completion_ids` of row 1 is empty"):
        score_completions(target, rows, **options)
    with pytest.raises(ValueError, match="Unknown method 'logits'"):
        score_completions(target, rows.select([0]), teacher_signal="logits", **options)
