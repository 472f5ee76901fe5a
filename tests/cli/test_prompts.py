import json

import pytest
from datasets import Dataset, load_dataset

from spec_kd.cli.rows import load_prompts, save_prompts
from spec_kd.prompts.splitting import split_prompts

QUESTIONS = [
    "how do I bake bread", "what is the capital of France", "explain photosynthesis to a child",
    "write a poem about the sea", "fix this python loop for me", "translate good morning to Dutch",
    "why is the sky blue at noon", "plan a week of dinners", "name three prime numbers",
    "who painted the night watch", "convert 10 miles to km", "what does HTTP 404 mean",
]  # fmt: skip


@pytest.fixture
def logs(tmp_path):
    """A log in OpenAI's format, with a duplicate, a secret and a broken line."""
    path = tmp_path / "log.jsonl"
    rows = [
        {
            "messages": [{"role": "user", "content": text}],
            "choices": [{"message": {"role": "assistant", "content": f"answer {i}"}}],
        }
        for i, text in enumerate([*QUESTIONS, QUESTIONS[0], "mail jane.doe@example.com the minutes"])
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    return path


@pytest.fixture
def curated(tmp_path):
    path = tmp_path / "curated.jsonl"
    path.write_text("".join(json.dumps({"question": text, "answer": "no"}) + "\n" for text in QUESTIONS))
    return path


def read_users(rows):
    return [row["prompt"][-1]["content"] for row in rows]


def test_logs_become_a_prompt_set(call, logs, models, tmp_path):
    options = ["prompts", "logs", "--paths", logs, "--output_dir", tmp_path / "out", "--tokenizer", models / "target"]
    options += ["--redact", "email", "--test_fraction", 0.3]
    status, result, errors = call(*options)
    assert status == 0, errors
    assert result["malformed"] == 1 and result["dropped"] == {"exact_duplicate": 1}
    train, test = (load_prompts(result["path"], split) for split in ("train", "test"))
    assert (len(train), len(test)) == (result["num_train"], result["num_test"]) and len(train) + len(test) == 13
    assert "mail [EMAIL] the minutes" in read_users([*train, *test])
    assert call(*options)[1]["is_reused"]
    logs.touch()
    assert call(*options)[1]["is_reused"]  # the same content
    logs.write_text(logs.read_text().replace("bread", "cakes"))
    assert call(*options)[0] == 2


def test_curated_prompts_are_held_out_by_text(call, curated, tmp_path):
    options = ["prompts", "curated", "--dataset", curated, "--prompt_column", "question", "--test_fraction", 0.3]
    status, result, errors = call(*options, "--output_dir", tmp_path / "out")
    assert status == 0, errors
    train, test = (read_users(load_prompts(result["path"], split)) for split in ("train", "test"))
    assert 0 < len(test) < 8 and sorted(train + test) == sorted(QUESTIONS)
    # another order and more rows: the same texts on the same side
    rows = [{"question": text} for text in [*reversed(QUESTIONS), "one more"]]
    curated.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = call(*options, "--output_dir", tmp_path / "more")[1]
    assert set(test) <= set(read_users(load_prompts(result["path"], "test"))) <= {*test, "one more"}


def test_a_split_of_its_own_for_testing(call, curated, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for split, texts in (("train", QUESTIONS[:9]), ("test", QUESTIONS[9:])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    status, result, errors = call(
        "prompts", "curated", "--dataset", folder, "--test_split", "test", "--output_dir", tmp_path / "out"
    )
    assert status == 0, errors
    assert (result["num_train"], result["num_test"]) == (9, 3)


def test_a_mix_of_two_sets(call, logs, curated, models, tmp_path):
    for kind, source in (
        ("logs", ["--logs", logs]),
        ("curated", ["--dataset", curated, "--prompt_column", "question"]),
    ):
        argv = ["prompts", kind, *source, "--output_dir", tmp_path / kind, "--test_fraction", 0.3]
        assert call(*argv)[0] == 0
    options = [
        "prompts", "mix", "--parts", f"logs={tmp_path / 'logs'}", f"curated={tmp_path / 'curated'}",
        "--output_dir", tmp_path / "mix", "--tokenizer", models / "target",
    ]  # fmt: skip
    status, result, errors = call(*options, "--weights", '{"logs": 2, "curated": 1}', "--num_prompts", 6)
    assert status == 0, errors
    assert result["rows_by_part"] == {"logs": 4, "curated": 2} and result["num_train"] == 6
    assert result["num_test"] > 0
    for name in ("prompts.json", "prompts.md", "mix.json"):
        assert (tmp_path / "mix" / name).stat().st_size > 0
    rows = load_dataset(str(tmp_path / "mix"), split="train")
    assert sorted(rows["scenario"]) == ["curated"] * 2 + ["historical"] * 4


def test_a_test_prompt_of_one_part_is_no_training_prompt_of_another(call, tmp_path, caplog):
    rows = {name: Dataset.from_list([{"prompt": text} for text in QUESTIONS]) for name in ("a", "b")}
    for seed, name in enumerate(rows):
        (tmp_path / name).mkdir()
        save_prompts(str(tmp_path / name), *split_prompts(rows[name], 0.4, seed))
    parts = [f"{name}={tmp_path / name}" for name in rows]
    status, result, errors = call("prompts", "mix", "--parts", *parts, "--output_dir", tmp_path / "mix")
    assert status == 0, errors
    train, test = (set(load_prompts(result["path"], split)["prompt"]) for split in ("train", "test"))
    assert train and test and not train & test
    assert "of `a` are test prompts too, and are left out" in caplog.text


def test_a_mix_without_test_prompts_is_said(call, tmp_path, caplog):
    rows = Dataset.from_list([{"prompt": text} for text in QUESTIONS])
    (tmp_path / "a").mkdir()
    save_prompts(str(tmp_path / "a"), *split_prompts(rows, 0, 0))
    assert not caplog.text
    assert call("prompts", "mix", "--parts", f"a={tmp_path / 'a'}", "--output_dir", tmp_path / "mix")[0] == 0
    assert "The mix has no test prompts" in caplog.text


def test_held_out_texts_do_not_depend_on_case_and_spaces():
    rows = Dataset.from_list([{"prompt": text} for text in QUESTIONS])
    changed = Dataset.from_list([{"prompt": f"  {text.upper()} "} for text in QUESTIONS])
    for left, right in zip(split_prompts(rows, 0.4, 3), split_prompts(changed, 0.4, 3), strict=True):
        assert [text.upper() for text in left["prompt"]] == [text.strip() for text in right["prompt"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["curate"], "no kind of prompts 'curate'. Did you mean curated?"),
        (["logs", "--paths", "none*.jsonl", "--output_dir", "x"], "none*.jsonl"),
        (["logs", "--output_dir", "x"], "the following arguments are required: --paths"),
        (["curated", "--dataset", "./none", "--output_dir", "x"], "`./none` does not exist"),
        (["curated", "--dataset", "a/b", "--output_dir", "x", "--test_fraction", "1"], "`test_fraction`"),
        (["mix", "--parts", "a", "--output_dir", "x"], "NAME=PATH"),
        (["mix", "--parts", "a=b", "--weights", '{"b": 1}', "--output_dir", "x"], "`weights` names b"),
    ],
)
def test_wrong_arguments(call, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    status, _, errors = call("prompts", *arguments)
    assert status == 2 and message in errors
