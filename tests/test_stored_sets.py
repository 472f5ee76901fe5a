"""A flipped bit in a stored set is found wherever the set is read, and repaired by the call that wrote it."""

import json
import os
import stat

import pyarrow.parquet as pq
import pytest
from datasets import Dataset, load_dataset
from tiny import build_llama, build_tokenizer

from spec_kd import BlackBoxSFTConfig, BlackBoxSFTTrainer, stored_sets
from spec_kd.cli.rows import load_prompts, load_rows, save_prompts
from spec_kd.data.responses import generate_responses, score_completions
from spec_kd.prompts.logs.query_logs import load_query_logs
from spec_kd.prompts.mixing import mix_prompts
from spec_kd.stored_sets import check_stored_file, check_stored_set

TEXTS = ["a", "hello there", "the quick brown fox", "b"]


@pytest.fixture
def flip():
    """Changes one bit, and not the size or the time of modification, as a disk does."""

    def change(path, place=0.5):
        stored_sets._intact.clear()  # of another process
        state = path.stat()
        content = bytearray(path.read_bytes())
        content[int(place * len(content))] ^= 4
        path.write_bytes(content)
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))

    return change


@pytest.fixture
def respond(tmp_path):
    target, tokenizer = build_llama(seed=1), build_tokenizer()

    def generate(**options):
        options = {
            "max_new_tokens": 6, "temperature": 0.0, "batch_size": 2, "shard_size": 2, "show_progress": False,
            **options,
        }  # fmt: skip
        return generate_responses(target, TEXTS, processing_class=tokenizer, output_dir=tmp_path / "out", **options)

    return generate


@pytest.mark.parametrize("place", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_a_flipped_bit_of_the_finished_set(respond, flip, tmp_path, place):
    expected = respond().to_list()
    path = tmp_path / "out" / "responses.parquet"
    flip(path, place)
    with pytest.raises(ValueError, match=r"responses.parquet` is not what was written.*Repeat the call"):
        load_rows(str(path))
    with pytest.raises(ValueError, match="is not what was written"):
        load_rows(str(tmp_path / "out"))
    assert respond().to_list() == expected == load_rows(str(path)).to_list()


def test_trainers_scoring_and_generation_check_the_set_they_are_given(respond, flip, tmp_path):
    rows = respond()
    flip(tmp_path / "out" / ".arrow" / "responses.arrow", 0.4)
    args = BlackBoxSFTConfig(output_dir=str(tmp_path / "draft"), report_to="none", use_cpu=True)
    for use in (
        lambda: BlackBoxSFTTrainer(build_llama(), args, train_dataset=rows, processing_class=build_tokenizer()),
        lambda: score_completions(build_llama(seed=1), rows, processing_class=build_tokenizer(), show_progress=False),
        lambda: generate_responses(
            build_llama(seed=1), rows, processing_class=build_tokenizer(), show_progress=False, max_new_tokens=2
        ),
        lambda: mix_prompts({"a": rows.select(range(2))}),
    ):
        with pytest.raises(ValueError, match=r"responses.arrow` is not what was written"):
            use()
    check_stored_set(respond())


def test_a_copy_without_its_sum_has_the_checksums_of_its_pages(respond, flip, tmp_path):
    respond()
    copy = tmp_path / "copy.parquet"
    copy.write_bytes((tmp_path / "out" / "responses.parquet").read_bytes())
    assert len(load_rows(str(copy))) == 4
    column = pq.ParquetFile(copy).metadata.row_group(0).column(0)
    flip(copy, (column.data_page_offset + column.total_compressed_size - 2) / copy.stat().st_size)
    with pytest.raises(ValueError, match=r"copy.parquet` is damaged .*Copy it again"):
        check_stored_file(copy)


def test_a_damaged_shard_or_sum_is_asked_for_again(respond, flip, tmp_path):
    expected = respond().to_list()
    work = tmp_path / "out" / ".shards"
    flip(work / "00000.arrow", 0.6)
    flip(work / "00001.arrow.sha256")
    (work / "responses.parquet.sha256").write_bytes(b"\xff\xfe")
    assert respond().to_list() == expected


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"[]", b"{}", b'{"fingerprint": 3}'])
def test_a_damaged_manifest_is_named_with_what_to_do(respond, tmp_path, text):
    respond()
    (tmp_path / "out" / ".shards" / "manifest.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"manifest.json` is damaged.*Restore the file, or delete"):
        respond()


def test_prompt_sets_have_sums(flip, tmp_path):
    rows = Dataset.from_dict({"prompt": TEXTS})
    save_prompts(str(tmp_path), rows, rows.select(range(1)))
    assert load_prompts(str(tmp_path), "train").to_list() == rows.to_list()
    assert load_dataset(str(tmp_path), split="train", cache_dir=tmp_path / "cache").to_list() == rows.to_list()
    flip(tmp_path / "train.arrow")
    with pytest.raises(ValueError, match=r"train.arrow` is not what was written"):
        load_prompts(str(tmp_path), "train")


def test_prompts_of_logs_are_read_again_where_they_are_damaged(flip, tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps({"messages": [{"role": "user", "content": text}]}) + "\n" for text in TEXTS))
    options = {"test_fraction": 0, "show_progress": False}
    expected = load_query_logs(log, tmp_path / "out", **options).train.to_list()
    flip(tmp_path / "out" / "train.arrow")
    again = load_query_logs(log, tmp_path / "out", **options)
    assert again.train.to_list() == expected
    flip(tmp_path / "out" / "train.arrow")
    with pytest.raises(ValueError, match="is not what was written"):
        mix_prompts({"a": again.train})


def test_files_of_a_run_follow_the_umask(respond, tmp_path):
    previous = os.umask(0o022)
    try:
        respond()
    finally:
        os.umask(previous)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.is_file()}
    assert set(modes.values()) == {0o644}, modes


def test_an_empty_folder_name_is_refused(respond):
    with pytest.raises(ValueError, match="`output_dir`"):
        generate_responses(build_llama(), TEXTS, processing_class=build_tokenizer(), output_dir="")
