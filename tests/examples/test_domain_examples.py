"""The other domains: held-out terms stay held out, and the three examples differ in their data alone."""

import json
import re
from dataclasses import astuple, replace
from pathlib import Path

import pytest
import train_bio
import train_fc
import train_zh
import yaml
from made_up import biology, chinese, embedded_run, general
from made_up.arguments import parse_arguments
from made_up.language_model_training import Budget
from made_up.models import BuildRecipe, ModelSize

NUM_ROWS = 1500
CONFIGS = Path(train_fc.__file__).parent / "configs"
CORPORA = pytest.mark.parametrize("corpus", [biology, chinese])


def flatten(value):
    return [value] if isinstance(value, str) else [text for part in value for text in flatten(part)]


def join_prompt(row):
    return "\n".join(message["content"] for message in row["prompt"])


def mentions(text, term):
    """Whether a text has a term: as a word in English, anywhere in Chinese."""
    return re.search(rf"\b{re.escape(term)}\b" if term.isascii() else re.escape(term), text, re.IGNORECASE)


@pytest.fixture(scope="module")
def rows():
    return {
        corpus: {split: corpus.generate_conversations(split, NUM_ROWS) for split in ("train", "test")}
        for corpus in (biology, chinese)
    }


@CORPORA
def test_test_terms_never_occur_in_training_and_always_in_tests(rows, corpus):
    terms = flatten(astuple(corpus.TEST))
    text = "\n".join(join_prompt(row) + "\n" + row["completion"][0]["content"] for row in rows[corpus]["train"])
    assert [term for term in terms if mentions(text, term)] == []
    assert all(any(mentions(join_prompt(row), term) for term in terms) for row in rows[corpus]["test"])
    everything = "\n".join(map(join_prompt, rows[corpus]["test"]))
    named = [term for term in terms if mentions(everything, term)]
    assert len(named) > 0.7 * len(terms)  # the others are parts of answers


@CORPORA
def test_rows_are_distinct_conversations_and_follow_the_seed(rows, corpus):
    for split in ("train", "test"):
        found = rows[corpus][split]
        assert len({json.dumps(row["prompt"]) for row in found}) == NUM_ROWS
        assert len({row["completion"][0]["content"] for row in found}) > NUM_ROWS / 3
        for row in found:
            roles = [message["role"] for message in row["prompt"]]
            assert roles in (["user"], ["user", "assistant", "user"])
            assert all(message["content"] for message in row["prompt"] + row["completion"])
        assert corpus.generate_conversations(split, 100, seed=0) == found[:100]
        assert corpus.generate_conversations(split, 100, seed=1) != found[:100]
    with pytest.raises(ValueError, match="'train' or 'test'"):
        corpus.generate_conversations("validation", 1)


def test_answers_follow_from_their_questions(rows):
    for row in rows[biology]["train"] + rows[biology]["test"]:
        question, answer = row["prompt"][0]["content"], row["completion"][0]["content"]
        if found := re.search(r"reads ([ATGC ]+)\.", question):
            assert answer.removesuffix(".").endswith(found[1].translate(str.maketrans("ATGC", "TACG")))
        if found := re.search(r"\(p = 0\.(\d+)\)", question):
            assert answer.startswith("Yes." if found[1].startswith("00") else "Probably not.")
        if found := re.search(r"every (\d+) minutes.* in (\d+) hours", question):
            assert f"so {60 // int(found[1]) * int(found[2])} times" in answer
    for row in rows[chinese]["train"]:
        if prices := re.findall(r"在(\w+)店卖(\d+)元", row["prompt"][0]["content"]):
            shop, price = min(prices, key=lambda found: int(found[1]))
            assert row["completion"][0]["content"].startswith(f"在{shop}店买更便宜")
            assert f"只要{price}元" in row["completion"][0]["content"]


def test_domains_share_little_with_general_text(rows):
    general_words = {word for row in general.generate_conversations(1000, 1)[0] for word in join_prompt(row).split()}
    words = [word for row in rows[biology]["test"] for word in row["completion"][0]["content"].split()]
    assert sum(word in general_words for word in words) < 0.5 * len(words)
    characters = "".join(row["completion"][0]["content"] for row in rows[chinese]["test"])
    assert sum(character.isascii() for character in characters) < 0.1 * len(characters)


@pytest.mark.parametrize("example", [train_bio, train_zh])
def test_embedded_run_from_nothing_to_a_draft(example, tmp_path, monkeypatch):
    steps = Budget(max_steps=2, tokens_per_step=128, eval_steps=2)
    recipe = BuildRecipe(
        vocab_size=400,
        target=ModelSize(16, 32, 1, 2),
        draft=ModelSize(16, 32, 1, 2),
        general_target=steps,
        domain_target=steps,
        general_draft=replace(steps, until_flat=True),
    )
    monkeypatch.setenv("SPEC_KD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded_run, "RECIPE", recipe)
    monkeypatch.setattr(
        embedded_run,
        "ROWS",
        {"domain_train": 40, "domain_test": 4, "general_train": 40, "general_test": 4},
    )
    monkeypatch.setattr(embedded_run, "use_all_cores", lambda: None)  # of the whole test session
    options = {
        "max_steps": 1, "eval_steps": 1, "num_train_prompts": 8, "num_eval_prompts": 2, "max_new_tokens": 4,
        "output_dir": str(tmp_path / "run"), "use_cpu": True,
    }  # fmt: skip
    result = example.main([text for name, value in options.items() for text in (f"--{name}", str(value))])
    assert [step for step, _ in result.history] == [0, 1]
    record = json.loads((tmp_path / "run" / "acceptance.json").read_text())
    before, after, *general = record["metrics"]
    assert before == f"{example.DOMAIN.name}, unseen subjects: generic draft"
    assert after.endswith("after white_box distillation") and len(general) == 2
    for name in ("acceptance.png", "acceptance.md", "README.md", "model.safetensors"):
        assert (tmp_path / "run" / name).stat().st_size > 0, name


def test_examples_have_homes_of_their_own():
    domains = [example.DOMAIN for example in (train_fc, train_bio, train_zh)]
    assert len({domain.output_dir for domain in domains}) == len({domain.name for domain in domains}) == 3


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_configurations_are_understood(path, tmp_path):
    options = yaml.safe_load(path.read_text(encoding="utf-8"))
    copy = tmp_path / path.name
    # what needs a GPU or another tracker is left out
    copy.write_text(yaml.safe_dump({**options, "bf16": False, "report_to": "none", "output_dir": str(tmp_path)}))
    arguments, training, model = parse_arguments(["--config", str(copy)], {})
    assert training.teacher_model_name_or_path == options["teacher_model_name_or_path"]
    assert model.model_name_or_path == options["model_name_or_path"]
    assert arguments.num_eval_prompts == 200
