import json

import pytest
from datasets import Dataset

from spec_kd import score_completions, tokenize_corpus
from spec_kd.data.shards import ShardStore
from spec_kd.loading import load_tokenizer

TEXTS = [f"The {word} of cell {i}, and a few words more." for i in range(3) for word in ("wall", "core", "skin")]


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


@pytest.fixture
def options(models, corpus, tmp_path):
    return [
        "score", "--target", models / "target", "--corpus", corpus, "--output_dir", tmp_path / "scored",
        "--max_length", 16, "--shard_size", 4, "--batch_size", 4,
    ]  # fmt: skip


def test_a_corpus_is_scored_and_trained_on_without_the_target(
    call, options, models, flags, tmp_path, read_rows, monkeypatch
):
    status, result, errors = call(*options, "--num_rows", 6)
    assert status == 0, errors
    rows = read_rows(result["path"])
    corpus = tokenize_corpus(
        Dataset.from_dict({"text": TEXTS[:6]}), load_tokenizer(str(models / "target")), max_length=16
    )
    expected = score_completions(str(models / "target"), corpus, batch_size=4, shard_size=4).to_list()
    assert rows == expected
    assert result["num_texts"] == 6 and result["num_rows"] == len(corpus) > 6
    assert result["num_tokens"] == sum(len(row["completion_ids"]) for row in rows)
    assert call(*options, "--num_rows", 6)[1] == {**result, "is_reused": True}

    monkeypatch.setattr("spec_kd.trainer.white_box_distill_trainer.load_teacher", None)
    training = ("--responses", result["path"], "--draft", models / "draft", "--output_dir", tmp_path / "draft")
    status, trained, errors = call("train", "white_box", *training, *flags)
    assert status == 0 and trained["steps"] == 4, errors


def test_a_killed_job_continues(call, options, monkeypatch, read_rows, tmp_path):
    class Killed(BaseException):
        pass

    write = ShardStore.write

    def die(self, number, table):
        if number == 2:
            raise Killed
        write(self, number, table)

    whole = call(*[tmp_path / "whole" if option == tmp_path / "scored" else option for option in options])[1]
    with monkeypatch.context() as patched:
        patched.setattr(ShardStore, "write", die)
        with pytest.raises(Killed):
            call(*options)
    status, result, errors = call(*options)
    assert status == 0, errors
    assert read_rows(result["path"]) == read_rows(whole["path"])


def test_raw_text_is_trained_on_with_the_live_target(call, models, corpus, flags, tmp_path):
    status, result, errors = call(
        "train", "white_box", "--responses", corpus, "--draft", models / "draft", "--target", models / "target",
        "--output_dir", tmp_path / "draft", "--completion_only_loss", "false", *flags, "--max_length", 16,
        "--packing", "--packing_strategy", "bfd_split", "--eval_strategy", "steps", "--eval_steps", 2,
    )  # fmt: skip
    assert status == 0 and result["steps"] == 4 and "eval_alpha_on_data" in errors, errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--corpus", "nowhere.jsonl"], "`nowhere.jsonl` does not exist"),
        (["--teacher_signal", "top_k"], "Unknown method 'top_k'"),
        (["--max_length", 1], "`max_length` is 1, but must be at least 2"),
        (["--text_field", "body"], "columns ['text']"),
    ],
)
def test_wrong_input_is_one_line(call, options, arguments, message):
    status, _, errors = call(*options, *arguments)
    assert status == 2 and message in errors and "Traceback" not in errors
