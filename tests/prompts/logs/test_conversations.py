"""Requests of one conversation are found whatever their ids are, and ids that only count part conversations."""

import json
import random

import pytest

from spec_kd.prompts.logs.conversations import ConversationLinks, hash_history, strip_piece_number
from spec_kd.prompts.logs.formats import read_record
from spec_kd.prompts.logs.query_logs import load_query_logs


def make_history(*texts: str) -> list[dict]:
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def load(path, output_dir, **options):
    return load_query_logs(path, output_dir, show_progress=False, near_duplicate_threshold=None, **options)


@pytest.mark.parametrize("key", ["trace_id", "request_id", "session_id", "conversation_id", "id", "thread_id"])
def test_an_id_of_one_request_does_not_part_a_conversation(tmp_path, key):
    records = []
    for n in range(6):
        texts = [f"Question {n} about bread?", "Rye.", f"And {n} with cheese?", "Walnut bread.", f"And {n} with jam?"]
        for length in (1, 3, 5):
            records.append({key: f"r-{n}-{length}", "messages": make_history(*texts[:length]), "response": "Yes."})
    random.Random(0).shuffle(records)
    write(tmp_path / "log.jsonl", records)
    for seed in range(4):
        result = load(tmp_path / "log.jsonl", tmp_path / f"out{seed}", test_fraction=0.5, seed=seed)
        sides = [{row["prompt"][0]["content"] for row in side} for side in (result.train, result.test)]
        assert not sides[0] & sides[1]
        assert (result.report.kept, result.report.conversations) == (18, 6)
        names = {row["conversation_id"] for side in (result.train, result.test) for row in side}
        assert len(names) == 6


def test_ids_that_only_count_name_conversations(tmp_path, caplog):
    texts = ("Is rye a grass?", "Do owls sleep by day?", "Can copper rust?", "Is the moon solid?")
    turns = [[{"from": "human", "value": text}, {"from": "gpt", "value": "Yes."}] for text in texts]
    write(tmp_path / "log.jsonl", [{"id": f"identity_{n}", "conversations": c} for n, c in enumerate(turns)])
    assert load(tmp_path / "log.jsonl", tmp_path / "out", test_fraction=0.5).report.conversations == 4
    write(tmp_path / "log.jsonl", [{"id": f"QWJhYvA_{17 * n}", "conversations": c} for n, c in enumerate(turns)])
    caplog.clear()
    result = load(tmp_path / "log.jsonl", tmp_path / "out", test_fraction=0.5)
    assert result.report.conversations == 1
    assert "set is empty" in caplog.text


@pytest.mark.parametrize(
    ("name", "conversation"),
    [("QWJhYvA_17", "QWJhYvA"), ("i6IyJda_0", "i6IyJda"), ("identity_0", "identity_0"), ("prompts_3", "prompts_3"),
     ("testSet_1", "testSet_1"), ("conv001_2", "conv001_2"), ("user_12_3", "user_12_3"), ("7", "7")],
)  # fmt: skip
def test_pieces_have_the_ids_of_sharegpt(name, conversation):
    assert strip_piece_number(name) == conversation


def test_a_few_shot_prompt_does_not_join_named_conversations(tmp_path):
    shots = make_history("Translate: one", "eins", "Translate: two", "zwei")
    records = [
        {"conversation_id": f"c{n}", "messages": [*shots, {"role": "user", "content": f"Translate: {n} sheep"}]}
        for n in range(20)
    ]
    result = load(write(tmp_path / "log.jsonl", records), tmp_path / "out", test_fraction=0.5)
    assert result.report.conversations == 20


def test_histories_are_compared_by_what_the_user_said():
    whole, beginnings = hash_history(make_history("One?", "1", "Two?", "2", "Three?"))
    assert (
        hash_history([{"role": "system", "content": "Today is Monday."}, *make_history("one?", "ONE", "two?")])[0]
        == (beginnings[1])
    )
    assert len({whole, *beginnings}) == 3
    assert len(hash_history(make_history(*map(str, range(101))))[1]) == 8


def test_links_join_what_the_log_names_apart():
    links = ConversationLinks()
    texts = ["One?", "1", "Two?", "2", "Three?", "3", "Four?"]
    for number, length in ((7, 5), (8, 1), (9, 3)):
        links.add(number, make_history(*texts[:length]))
    links.add(10, make_history("Something else?"))
    assert links.join().tolist() == [0, 0, 0, 3]
    # conversations with a beginning of their own are not joined with others that began alike, but are on one side
    links = ConversationLinks()
    for number in (1, 2):
        links.add(number, make_history("Hello"))
        links.add(number, make_history("Hello", "Hi.", f"Question {number}?"))
    assert (links.join().tolist(), links.group().tolist()) == ([0, 0, 2, 2], [0, 0, 0, 0])


def test_the_project_of_langsmith_is_no_conversation():
    run = {"run_type": "llm", "session_id": "project", "trace_id": "t", "inputs": {"messages": make_history("One?")}}
    assert read_record(run).conversation_id is None
    assert read_record({**run, "extra": {"metadata": {"thread_id": "c1"}}}).conversation_id == "c1"
