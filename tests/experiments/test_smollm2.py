"""What the experiment keeps: completions that belong to their prompts, and figures that follow from the raw answers."""

import gzip
import json
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoConfig

from experiments.smollm2.complete_prompts import keep, restore
from experiments.smollm2.conversations import KEPT, NUM_SAMPLED, find_target, load_part
from experiments.smollm2.report import RESULTS, read_result, write_table
from experiments.smollm2.score_text import load_scored

MEASURED = sorted(path.with_suffix("").with_suffix("") for path in KEPT.glob("*/measured/*.jsonl.gz"))


def ask(*questions):
    return [[{"role": "user", "content": question}] for question in questions]


def test_kept_completions_come_back_with_their_prompts_alone(tokenizer, tmp_path):
    prompts = Dataset.from_dict({"prompt": ask("a", "b")})
    ids = [
        tokenizer.apply_chat_template(one, add_generation_prompt=True, return_dict=False) for one in prompts["prompt"]
    ]
    responses = prompts.add_column("prompt_ids", ids).add_column("completion_ids", [[5, 1], [6, 7, 1]])
    keep(responses, tmp_path / "kept.jsonl.gz")
    assert restore(prompts, tokenizer, tmp_path / "kept.jsonl.gz").to_list() == responses.to_list()
    with pytest.raises(ValueError, match="completions of other prompts"):
        restore(prompts.select([1, 0]), tokenizer, tmp_path / "kept.jsonl.gz")
    with pytest.raises(ValueError, match="completions of other prompts"):
        restore(prompts.select([0]), tokenizer, tmp_path / "kept.jsonl.gz")


def test_the_parts_of_a_domain_share_no_prompt_but_those_that_are_sampled_again(tokenizer, tmp_path, monkeypatch):
    folder = tmp_path / "biology"
    folder.mkdir()
    rows = [{"prompt": prompt, "completion": []} for prompt in ask(*(f"question {i}" for i in range(220)))]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setitem(NUM_SAMPLED, "biology", 150)
    names = ("target", "validation", "draft", "sampled")
    parts = {name: load_part(tmp_path, "biology", name, tokenizer) for name in names}
    texts = {name: [messages[0]["content"] for messages in part["prompt"]] for name, part in parts.items()}
    assert [len(texts[name]) for name in ("target", "validation", "draft")] == [110, 50, 60]
    assert len({text for name in ("target", "validation", "draft") for text in texts[name]}) == 220
    together = [(text, len(list(group))) for text, group in groupby(texts["sampled"])]
    assert together == [(text, 3 if i < 30 else 2) for i, text in enumerate(texts["draft"])]


def test_signals_of_the_engine_serve_completions_but_not_whole_conversations(tmp_path):
    folder = tmp_path / "completions" / "draft"
    folder.mkdir(parents=True)
    rows = {"prompt_ids": [[1]], "completion_ids": [[2]]}
    Dataset.from_dict(rows).to_parquet(folder / "responses.parquet")
    with pytest.raises(ValueError, match="score_text --texts completions"):
        load_scored(tmp_path, "completions")
    Dataset.from_dict({**rows, "teacher_signal": [b"1"]}).to_parquet(folder / "responses.parquet")
    assert load_scored(tmp_path, "completions")["teacher_signal"] == [b"1"]
    with pytest.raises(ValueError, match="score_text --texts conversations"):
        load_scored(tmp_path, "conversations")


def test_the_general_target_is_the_one_that_nobody_moved():
    assert find_target(Path("work"), "general") == Path("work/target")
    assert find_target(Path("work"), "biology") == Path("work/biology/target")


@pytest.mark.parametrize("path", MEASURED, ids=lambda path: path.name)
def test_a_committed_result_follows_from_its_raw_answers(path):
    found = json.loads(path.with_name(f"{path.name}.json").read_text())
    with gzip.open(f"{path}.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    draft, plain = ({row["row"]: row for row in rows if row.get("side") == side} for side in ("draft", "plain"))
    assert len(draft) == len(plain) == found["requests"] >= 100
    assert sum(draft[i]["completion_ids"] == plain[i]["completion_ids"] for i in draft) == found["equal_texts"]
    requests = [plain[i]["request_seconds"] / draft[i]["request_seconds"] for i in draft]
    assert np.median(requests) == pytest.approx(found["request_speedup"][0])
    decoding = [plain[i]["decoding_seconds"] / draft[i]["decoding_seconds"] for i in draft]
    assert np.median(decoding) == pytest.approx(found["speedup"][0], rel=0.01)
    if "metrics" in found:  # a draft's; n-grams have none
        accepted, drafted = (sum(row["counts"][name] for row in draft.values()) for name in ("accepted", "drafted"))
        assert accepted / drafted == pytest.approx(found["metrics"]["acceptance rate"][0][0])


def test_there_is_a_committed_result():
    assert MEASURED


def test_the_pages_show_the_result_that_follows_from_the_answers():
    table = write_table([read_result(domain) for domain in RESULTS])
    folder = KEPT.parent
    assert (folder / "result.md").read_text() == table
    root = folder.parents[1]
    for page in (folder / "README.md", root / "README.md", root / "docs" / "index.md"):
        assert table.strip() in page.read_text()


def test_kept_drafts_are_small_and_have_the_vocabulary_of_their_target():
    folders = sorted(KEPT.glob("*/draft"))
    assert {folder.parent.name for folder in folders} >= set(RESULTS)
    for folder in folders:
        config = AutoConfig.from_pretrained(folder)
        weights = load_file(folder / "model.safetensors")
        assert config.vocab_size == 49_152
        assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
        assert sum(tensor.numel() for tensor in weights.values()) < 15_000_000
