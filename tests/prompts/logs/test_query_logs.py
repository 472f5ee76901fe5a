"""Logs from files to a dataset that the rest of the package takes."""

import gzip
import json
import os
import random
import subprocess
import sys

import pytest
from datasets import load_dataset
from tiny import CHAT_TEMPLATE

from spec_kd.data.prompt_rendering import prepare_prompts, render_prompt_ids
from spec_kd.prompts.logs import log_reader
from spec_kd.prompts.logs.query_logs import load_query_logs

TOOL_TEMPLATE = CHAT_TEMPLATE.replace(
    "{{ m['content'] }}", "{{ m['content'] }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}"
)
TOPICS = ("weather", "chess", "tea", "volcano", "violin", "tax", "orbit", "bread", "fern", "glacier", "loom", "quartz")


def ask(text: str, **more) -> dict:
    return {"messages": [{"role": "user", "content": text}], **more}


def answer(text: str) -> dict:
    return {"choices": [{"message": {"role": "assistant", "content": text}}]}


def write(path, records) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def question(n: int) -> str:
    rng = random.Random(n)
    return f"Question {n}: " + " ".join(f"{rng.choice(TOPICS)}{rng.randrange(100)}" for _ in range(12))


def load(paths, output_dir, **options):
    return load_query_logs(paths, output_dir, show_progress=False, **options)


def read_texts(dataset) -> list[str]:
    return [row["prompt"][-1]["content"] for row in dataset]


def test_from_mixed_files_to_prompts(tmp_path):
    logs = tmp_path / "logs"
    logs.mkdir()
    write(logs / "a.jsonl", [ask(question(1), **answer("1")), ask(question(2)), ask(question(1))])
    with gzip.open(logs / "b.jsonl.gz", "wt") as file:
        conversation = [("human", question(3)), ("gpt", "3"), ("human", "And " + question(4)), ("gpt", "4")]
        file.write(json.dumps({"conversations": [{"from": f, "value": v} for f, v in conversation]}) + "\nnot json\n")
    (logs / "c.txt").write_text(question(5) + "\n")
    (logs / "notes.md").touch()

    result = load(logs, tmp_path / "out", test_fraction=0)
    assert len(result.test) == 0
    rows = list(result.train)
    assert [row["prompt"][-1]["content"].removeprefix("And ") for row in rows] == [question(n) for n in (1, 2, 3, 4, 5)]
    assert [row["completion"] and row["completion"][0]["content"] for row in rows] == ["1", None, "3", "4", None]
    assert {row["scenario"] for row in rows} == {"historical"}
    assert rows[2]["source"] == str(logs / "b.jsonl.gz")
    assert rows[2]["conversation_id"] == rows[3]["conversation_id"] != rows[0]["conversation_id"]
    assert "tools" not in result.train.column_names

    report = result.report
    assert (report.files, report.records, report.malformed, report.prompts, report.kept) == (3, 6, 1, 6, 5)
    assert report.dropped == {"exact_duplicate": 1}
    assert report.malformed_examples[0].startswith(f"{logs / 'b.jsonl.gz'}:2: not JSON")
    assert report.ignored_files == (str(logs / "notes.md"),)
    assert (report.train, report.test, report.conversations, report.with_completion) == (5, 0, 4, 3)
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()
    assert "not JSON" in report.to_markdown()


def test_tool_calls_are_rendered_as_the_target_saw_them(tmp_path, tokenizer):
    call = {
        "id": "c1",
        "type": "function",
        "function": {"name": "f", "arguments": '{"z": [1, 0.1], "a": null, "b": {}}'},
    }
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"z": {"type": "array"}}}}}]
    messages = [
        {"role": "user", "content": "Call f."},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "7"},
    ]
    write(tmp_path / "log.jsonl", [{"messages": messages, "tools": tools, **answer("It is 7.")}, ask("Plain question")])
    result = load(tmp_path / "log.jsonl", tmp_path / "out", test_fraction=0)
    tokenizer.chat_template, before = TOOL_TEMPLATE, tokenizer.chat_template
    try:
        _, rows = prepare_prompts(result.train)
        rendered = [tokenizer.decode(ids) for ids in render_prompt_ids(rows, tokenizer)]
    finally:
        tokenizer.chat_template = before
    assert rendered[1] == "<|user|>Plain question<|end|><|assistant|>"
    parsed = {**call, "function": {"name": "f", "arguments": {"z": [1, 0.1], "a": None, "b": {}}}}
    shown = json.dumps([parsed])  # the `null` that the target wrote with it
    turns = [f"<|system|>{json.dumps(tools)}", "<|user|>Call f.", f"<|assistant|>{shown}", "<|tool|>7", "<|assistant|>"]
    assert rendered[0] == "<|end|>".join(turns)
    assert result.train[0]["prompt"][1]["tool_calls"][0]["function"]["arguments"]["a"] is None


def test_near_duplicates_are_told_from_turns_and_system_prompts(tmp_path):
    system = "You are the assistant of a large bakery. " + question(2) + question(3)
    history = [{"role": "user", "content": question(1)}, {"role": "assistant", "content": "Yes."}]
    follow_up = [*history, {"role": "user", "content": "Why?"}]

    def with_system(text, prompt=system):
        return {"messages": [{"role": "system", "content": prompt}, {"role": "user", "content": text}]}

    kept = [
        ask(question(1)),
        {"messages": follow_up, **answer("So.")},  # nearly the same text, but a turn later
        with_system("Do you have rye bread?"),
        with_system("When do you open?"),  # the same but for a few words, behind a long system prompt
        with_system("When do you open?", "You sell stamps from all countries of the world, and envelopes."),
    ]
    dropped = [
        ask(question(1) + "!"),
        {"messages": [*follow_up[:2], {"role": "user", "content": "why??"}], **answer("So.")},
        with_system("WHEN do  you open?", system + "It is Monday."),
    ]
    write(tmp_path / "log.jsonl", kept + dropped)
    result = load(tmp_path / "log.jsonl", tmp_path / "out", test_fraction=0)
    assert result.report.dropped == {"near_duplicate": 3}
    assert read_texts(result.train) == [record["messages"][-1]["content"] for record in kept]
    everything = load(tmp_path / "log.jsonl", tmp_path / "all", near_duplicate_threshold=None)
    assert everything.report.kept == len(kept + dropped)


def test_questions_about_one_document_are_kept(tmp_path):
    document = "Please read this. " + " ".join(question(n) for n in range(100, 110))
    asked = ["What is the author's main point?", "Which places are named?", "Is the tone formal?", "Give it a title."]
    records = [ask(f"{document}\n\n{text}") for text in asked] + [ask(f"{document}\n\n{asked[0]}!")]
    write(tmp_path / "log.jsonl", records)
    result = load(tmp_path / "log.jsonl", tmp_path / "out", test_fraction=0)
    assert [text.split("\n\n")[1] for text in read_texts(result.train)] == asked
    assert "only in their middle" in result.report.to_markdown()


@pytest.mark.parametrize("split_by", ["hash", "time"])
def test_a_conversation_is_in_one_split(tmp_path, split_by):
    records = []
    for n in range(300):
        named = {"conversation_id": n // 3} if n < 150 else {}
        history = [{"role": "user", "content": question(n if named else 2000 + n // 3)}]
        for turn in range(n % 3 if not named else 0):
            history += [
                {"role": "assistant", "content": "ok"},
                {"role": "user", "content": question(1000 + 7 * n + turn)},
            ]
        records.append({"messages": history, "timestamp": 1.7e9 + 977 * n % 10_000, **named})
    write(tmp_path / "log.jsonl", records)
    result = load(tmp_path / "log.jsonl", tmp_path / "out", test_fraction=0.2, split_by=split_by)
    train, test = ({row["conversation_id"] for row in split} for split in (result.train, result.test))
    assert train and test and not train & test
    assert 0.1 < len(result.test) / result.report.kept < 0.3
    opening = [{row["prompt"][0]["content"] for row in split} for split in (result.train, result.test)]
    assert not opening[0] & opening[1]
    assert len(train | test) == result.report.conversations


@pytest.mark.parametrize("split_by", ["hash", "time"])
@pytest.mark.parametrize("seed", range(3))
def test_one_question_under_two_system_prompts_is_in_one_split(tmp_path, split_by, seed):
    systems = ("You are a baker.", "You sell stamps from all countries, and envelopes.")
    records = [
        {
            "messages": [{"role": "system", "content": systems[n % 2]}, {"role": "user", "content": question(n // 2)}],
            "conversation_id": n,
            "timestamp": 1.7e9 + 977 * n % 1000,
        }
        for n in range(40)
    ]
    write(tmp_path / "log.jsonl", records)
    result = load(tmp_path / "log.jsonl", tmp_path / "out", test_fraction=0.5, split_by=split_by, seed=seed)
    assert result.report.kept == result.report.conversations == 40
    train, test = (set(read_texts(split)) for split in (result.train, result.test))
    assert train and test and not train & test


@pytest.mark.parametrize("split_by", ["hash", "time"])
def test_an_empty_side_is_said(tmp_path, caplog, split_by):
    write(tmp_path / "log.jsonl", [ask(question(n), conversation_id="all", timestamp=1.7e9 + n) for n in range(5)])
    result = load(tmp_path / "log.jsonl", tmp_path / "out", split_by=split_by)
    assert {len(result.train), len(result.test)} == {0, 5}
    assert "set is empty, although `test_fraction` is 0.05: the 5 prompts belong to one conversation" in caplog.text


def test_limits(tmp_path, tokenizer):
    day = 86_400
    records = [ask(question(n), user=f"u{n % 2}", timestamp=1.7e9 + n * day / 4) for n in range(12)]
    records += [ask("short", user="u9", timestamp=1.8e9), ask(question(50) * 5, user="u9", timestamp=1.8e9)]
    write(tmp_path / "log.jsonl", records)
    by_user = load(tmp_path / "log.jsonl", tmp_path / "user", max_per_user=4)
    assert by_user.report.dropped == {"over_user_limit": 4}
    by_day = load(tmp_path / "log.jsonl", tmp_path / "day", max_per_day=3)
    counts = {}
    for record in records:
        counts[record["timestamp"] // day] = counts.get(record["timestamp"] // day, 0) + 1
    assert by_day.report.dropped == {"over_day_limit": sum(max(0, count - 3) for count in counts.values())}
    lengths = [len(ids) for ids in render_prompt_ids([{"prompt": r["messages"]} for r in records], tokenizer)]
    limits = {"min_tokens": min(lengths) + 1, "max_tokens": max(lengths) - 1}
    by_length = load(tmp_path / "log.jsonl", tmp_path / "length", processing_class=tokenizer, **limits)
    assert by_length.report.dropped == {"too_short": 1, "too_long": 1}
    with pytest.raises(ValueError, match="processing_class"):
        load(tmp_path / "log.jsonl", tmp_path / "x", max_tokens=9)


def test_a_prompt_over_the_limit_does_not_count_as_an_earlier_one(tmp_path):
    records = [ask(question(1), user="a"), ask(question(2), user="a"), ask(question(2) + "!", user="b")]
    write(tmp_path / "log.jsonl", records)
    result = load(tmp_path / "log.jsonl", tmp_path / "out", max_per_user=1, test_fraction=0)
    assert read_texts(result.train) == [question(1), question(2) + "!"]


def test_malformed_records_by_choice(tmp_path):
    path = tmp_path / "log.jsonl"
    broken = [
        b'{"messages": [{"role": "user", "content": "cut',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [null]}',
        b'{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [{"function": '
        b'{"name": "f", "arguments": "{\\"n\\": 123456789012345678901234567890}"}}]}]}',
        b"[]",
        b"null",
    ]
    path.write_bytes(
        b"\n".join([json.dumps(ask(question(1))).encode(), *broken, json.dumps(ask(question(2))).encode()])
    )
    result = load(path, tmp_path / "out", test_fraction=0)
    assert read_texts(result.train) == [question(1), question(2)]
    assert (result.report.records, result.report.malformed) == (8, len(broken))
    places = [example.split(": ")[0] for example in result.report.malformed_examples]
    assert places == [f"{path}:{number}" for number in range(2, 8)]
    with pytest.raises(ValueError, match=f"{path}:2: not JSON"):
        load(path, tmp_path / "fatal", on_error="raise")
    for option, name in (({"split_by": "time"}, "split_by"), ({"max_per_user": 1}, "max_per_user")):
        with pytest.raises(ValueError, match=f"{path}:1: no .*{name}"):
            load(path, tmp_path / "fatal", on_error="raise", **option)
    write(path, [{"foo": 1}])
    with pytest.raises(ValueError, match="No prompt of 1 records is kept"):
        load(path, tmp_path / "none")


def test_redaction_comes_before_duplicates(tmp_path):
    records = [ask(f"Write to {name}@example.org about " + question(1), **answer("+49 30 901820")) for name in "ab"]
    write(tmp_path / "log.jsonl", records)
    result = load(tmp_path / "log.jsonl", tmp_path / "out", redact=["email", "phone"], test_fraction=0)
    assert read_texts(result.train) == ["Write to [EMAIL] about " + question(1)]
    assert result.train[0]["completion"][0]["content"] == "[PHONE]"
    assert (result.report.redacted, result.report.dropped) == (2, {"exact_duplicate": 1})
    with pytest.raises(ValueError, match="redact"):
        load(tmp_path / "log.jsonl", tmp_path / "out", redact=["names"])


def test_redaction_covers_all_that_is_stored(tmp_path):
    card, mail = 4111111111111111, "someone@example.com"
    call = {"type": "function", "function": {"name": "pay", "arguments": json.dumps({"card": card, mail: [mail]})}}
    tools = [{"type": "function", "function": {"name": "pay", "description": f"Questions to {mail}"}}]
    records = [
        {
            "session_id": name,
            "messages": [
                {"role": "user", "content": question(n), "name": mail},
                {"role": "assistant", "content": "", "tool_calls": [call]},
            ],
            "tools": tools,
        }
        for n, name in enumerate([mail, "other@example.com", mail, "plain"])
    ]
    folder = tmp_path / mail
    folder.mkdir()
    write(folder / "log.jsonl", [*records, {"messages": [{"role": mail, "content": "x"}]}])
    result = load(folder, tmp_path / "out", test_fraction=0, redact=["email", "card"])
    stored = [json.dumps(row) for row in result.train]
    assert not any(secret in row for row in stored for secret in (mail, "example.com", str(card)))
    assert result.train[0]["completion"][0]["tool_calls"][0]["function"]["arguments"] == {
        "card": "[CARD]",
        "[EMAIL]": ["[EMAIL]"],
    }
    # conversations stay apart, and together
    assert result.train["conversation_id"][:] == ["[EMAIL]-1", "[EMAIL]-2", "[EMAIL]-1", "plain"]
    assert result.report.conversations == 3
    assert result.report.malformed == 1 and mail not in result.report.malformed_examples[0]


def test_a_finished_result_is_reused_until_something_changes(tmp_path, monkeypatch):
    path = tmp_path / "log.jsonl"
    write(path, [ask(question(n)) for n in range(20)])
    first = load(path, tmp_path / "out")
    reads = []
    read_records = log_reader.read_records
    monkeypatch.setattr(log_reader, "read_records", lambda path, **options: reads.append(path) or read_records(path))
    again = load(path, tmp_path / "out")
    assert (again.report, again.train[:], again.test[:], reads) == (first.report, first.train[:], first.test[:], [])
    load(path, tmp_path / "out", seed=1)
    assert len(reads) == 1
    write(path, [ask(question(n)) for n in range(21)])
    assert load(path, tmp_path / "out", seed=1).report.records == 21
    loaded = load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert loaded["train"][:] == load(path, tmp_path / "out", seed=1).train[:]


def test_a_killed_run_is_redone(tmp_path):
    path = tmp_path / "log.jsonl"
    write(path, [ask(question(n)) for n in range(3000)])
    code = (
        "import os\nfrom spec_kd.prompts.logs import prompt_store, query_logs\n"
        "def kill(self, *arguments):\n    os._exit(9)\n"
        "prompt_store.PromptStore.split = kill\n"
        f"query_logs.load_query_logs({str(path)!r}, {str(tmp_path / 'out')!r}, show_progress=False)"
    )
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "HF_HUB_OFFLINE": "1"}).returncode == 9
    assert (tmp_path / "out/.partial/kept.arrow").stat().st_size > 0
    killed, whole = load(path, tmp_path / "out"), load(path, tmp_path / "other")
    assert killed.train[:] == whole.train[:] and killed.test[:] == whole.test[:]
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names - {".test.arrow.sha256", ".train.arrow.sha256"} == {"report.json", "test.arrow", "train.arrow"}


def test_torch_is_not_needed(tmp_path):
    write(tmp_path / "log.jsonl", [ask(question(1))])
    code = (
        "import sys\nfrom spec_kd.prompts.logs.query_logs import load_query_logs\n"
        f"load_query_logs({str(tmp_path / 'log.jsonl')!r}, {str(tmp_path / 'out')!r}, show_progress=False)\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "option",
    [{"format": "xml"}, {"turns": "some"}, {"split_by": "user"}, {"on_error": "ignore"}, {"test_fraction": 1.0},
     {"near_duplicate_threshold": 0.2}],
)  # fmt: skip
def test_options_are_checked(tmp_path, option):
    write(tmp_path / "log.jsonl", [ask("x")])
    with pytest.raises(ValueError, match=next(iter(option)).split("_")[-1]):
        load(tmp_path / "log.jsonl", tmp_path / "out", **option)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_files_of_others_is_refused(tmp_path):
    write(tmp_path / "log.jsonl", [ask(question(1))])
    (tmp_path / "out").mkdir()
    (tmp_path / "out/train.arrow").write_bytes(b"of another")
    with pytest.raises(ValueError, match=r"out/train.arrow` is there already"):
        load(tmp_path / "log.jsonl", tmp_path / "out")
    assert (tmp_path / "out/train.arrow").read_bytes() == b"of another"
    (tmp_path / "out/train.arrow").unlink()
    load(tmp_path / "log.jsonl", tmp_path / "out", test_fraction=0)
    load(tmp_path / "log.jsonl", tmp_path / "out", test_fraction=0, turns="all")  # its own is replaced
    with pytest.raises(ValueError, match="is a file"):
        load(tmp_path / "log.jsonl", tmp_path / "log.jsonl")


def test_the_report_says_what_became_of_each_record(tmp_path, caplog):
    def read(record):
        return None if "skip" in record else record

    records = [ask(question(1)), {"skip": 1}, {"skip": 2}, {"foo": 1}, ask(question(2), response={"strange": 1})]
    write(tmp_path / "log.jsonl", records)
    result = load(tmp_path / "log.jsonl", tmp_path / "out", test_fraction=0, format=read)
    report = result.report
    path = str(tmp_path / "log.jsonl")
    assert [(r["file"], r["first"], r["last"], r["outcome"]) for r in report.outcomes] == [
        (path, 2, 3, "left_out"),
        (path, 4, 4, "malformed"),
    ]
    (file,) = report.per_file
    assert (file["records"], file["read"], file["left_out"], file["malformed"]) == (5, 2, 2, 1)
    assert report.reasons == {"`format` returned `None` for it": 2, "none of the known forms": 1}
    assert any("not understood: `response`" in note for note in report.notes)
    assert "1 of 5 records are malformed" in caplog.text and "not understood: `response`" in caplog.text
    assert load(tmp_path / "log.jsonl", tmp_path / "out", test_fraction=0, format=read).report == report
    assert "none of the known forms" in report.to_markdown()


def test_any_error_of_one_record_is_malformed(tmp_path):
    def read(record):
        raise {"recursion": RecursionError, "zero": ZeroDivisionError, "key": KeyError}[record["kind"]]("x")

    write(tmp_path / "log.jsonl", [{"kind": kind} for kind in ("recursion", "zero", "key")])
    with pytest.raises(ValueError, match="3 are malformed"):
        load(tmp_path / "log.jsonl", tmp_path / "out", format=read)
