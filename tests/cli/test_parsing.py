"""Options as they are written: paths, pairs, keys of YAML, mistyped names, calls without any."""

import json
import re
from dataclasses import fields

import pytest

from spec_kd.cli.arguments import RunArguments
from spec_kd.cli.commands import COMMANDS, build_parser
from spec_kd.cli.main import main, parse_command
from spec_kd.cli.parsing import Parser, is_ours
from spec_kd.cli.paths import PATH_OPTIONS
from spec_kd.cli.yaml_files import read_pairs, read_yaml

PARSERS = [build_parser(command) for command in COMMANDS]
OURS = {kind for parser in PARSERS for kind in parser.dataclass_types}


def parse(*argv):
    return parse_command(argv)[1]


@pytest.fixture
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_every_option_of_ours_that_names_a_file_is_read_as_a_path():
    """By its help, so that a new option cannot be forgotten."""
    words = ("file", "folder", "Hub", "prompt sets")
    for kind in OURS:
        for field in fields(kind):
            says_path = any(word in field.metadata["help"] for word in words) and is_ours(kind, field.name)
            is_text = "str" in str(field.type) and "dict" not in str(field.type)
            is_other = field.name in ("split", "config_name", "test_split", "redact")  # their help speaks of files
            if says_path and is_text and not is_other:
                assert field.name in PATH_OPTIONS, f"{kind.__name__}.{field.name}"


def test_every_option_comes_from_one_dataclass_and_states_its_default():
    for parser in PARSERS:
        names = [field.name for kind in parser.dataclass_types for field in fields(kind) if field.init]
        assert len(names) == len(set(names)), parser.prog
        text = " ".join(parser.format_help().partition("\nA recipe is")[0].split())
        for actions in parser.group_options().values():
            for action in actions:
                (kind,) = (k for k in parser.dataclass_types if action.dest in k.__dataclass_fields__)
                if not is_ours(kind, action.dest):
                    continue
                words = ("default", "if not set", "without")
                said = action.required or action.default is not None or any(w in action.help.lower() for w in words)
                assert said or kind.__module__.startswith("spec_kd.trainer"), (
                    f"{parser.prog}: --{action.dest} does not state its default"
                )
                if action.default is not None:
                    assert f"(default: {action.default})" in text


def test_a_home_is_expanded_on_a_command_line_and_in_yaml(home, tmp_path):
    config = tmp_path / "logs.yaml"
    config.write_text("paths: [~/a.jsonl, b.jsonl]\noutput_dir: ~/out\ntokenizer: ~/target\n")
    from_yaml = parse("prompts", "logs", "--config", "~/logs.yaml")
    argv = ["logs", "--paths", "~/a.jsonl", "b.jsonl", "--output_dir=~/out", "--tokenizer", "~/target"]
    assert from_yaml == parse("prompts", *argv)
    files, *_ = from_yaml
    assert files.paths == [f"{home}/a.jsonl", "b.jsonl"] and files.output_dir == f"{home}/out"
    parts = parse("prompts", "mix", "--parts", "a=~/a", "b=b", "--output_dir", "x")[0].parts
    assert parts == {"a": f"{home}/a", "b": "b"}


def test_a_home_in_a_trainers_options(home):
    argv = ["--draft", "~/draft", "--responses", "~/r.parquet", "--output_dir", "~/out"]
    (call,) = parse("train", "black_box", *argv)
    assert call.draft.model_name_or_path == f"{home}/draft" and call.arguments.responses == f"{home}/r.parquet"
    assert call.config.output_dir == f"{home}/out"


@pytest.mark.parametrize(
    ("argv", "option"),
    [
        (["prompts", "logs", "--paths", "", "--output_dir", "x"], "paths"),
        (["prompts", "logs", "--paths", "a", "", "--output_dir", "x"], "paths"),
        (["prompts", "logs", "--paths", "a", "--output_dir", ""], "output_dir"),
        (["prompts", "curated", "--dataset", "", "--output_dir", "x"], "dataset"),
        (["prompts", "mix", "--parts", "a=", "--output_dir", "x"], "parts"),
        (["respond", "--prompts", "", "--output_dir", "x", "--target", "t"], "prompts"),
        (["respond", "--prompts", "p", "--output_dir", "x", "--target", ""], "target"),
        (["evaluate", "--drafts", "a=", "--prompts", "p", "--output_dir", "x"], "drafts"),
        (["evaluate", "--drafts", "a", "--prompts", "p", "--output_dir", " "], "output_dir"),
        (["synthesize", "--num_queries", "1", "--output_dir", "x", "--test_sets", ""], "test_sets"),
        (["run", ""], "recipe"),
        (["train", "black_box", "--draft", "", "--responses", "r", "--output_dir", "x"], "model_name_or_path"),
        (["train", "black_box", "--draft", "d", "--responses", "r", "--output_dir", ""], "output_dir"),
        (["respond", "--config", ""], "config"),
    ],
)
def test_an_empty_path_is_refused(call, argv, option):
    status, result, errors = call(*argv)
    assert status == 2 and result is None
    assert f"`{option}` is " in errors and "names no file or folder" in errors and len(errors.splitlines()) == 1


@pytest.mark.parametrize("argv", [[], ["train"], ["prompts"]])
def test_a_call_that_says_too_little_is_wrong(capsys, argv):
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("usage: spec-kd")


@pytest.mark.parametrize(
    ("argv", "meant"),
    [
        (["prompts", "logs", "--path", "a"], "--paths"),
        (["prompts", "logs", "--path=a", "--output_dir", "x"], "--paths"),
        (["prompts", "curated", "--datset", "a"], "--dataset"),
        (["respond", "--prompt", "a"], "--prompts"),
        (["evaluate", "--draftss", "a"], "--drafts"),
        (["synthesize", "--num-querys", "3"], "--num-queries"),
        (["train", "black_box", "--response", "a"], "--responses"),
        (["run", "--recpie", "a"], "--recipe"),
    ],
)
def test_a_mistyped_option_is_named_before_those_that_miss(call, argv, meant):
    status, _, errors = call(*argv)
    assert status == 2 and f"Did you mean {meant}?" in errors and "required" not in errors


@pytest.mark.parametrize("written", [["a.yaml"], ["--config", "a.yaml"], ["--config=a.yaml"], ["--recipe", "a.yaml"]])
def test_a_recipe_in_every_way_it_is_written(written):
    assert parse("run", *written, "--only_check") == (RunArguments("a.yaml", only_check=True),)


PAIRS = {"dtype": "float16", "max_concurrency": 4, "trust_remote_code": True, "rate": 0.5}


@pytest.mark.parametrize(
    "value",
    [
        PAIRS,
        [PAIRS],
        json.dumps(PAIRS),
        [json.dumps(PAIRS)],
        ["dtype=float16", "max_concurrency=4", "trust_remote_code=true", "rate=0.5"],
    ],
)
def test_pairs_are_written_in_one_way_on_a_command_line_and_in_yaml(value):
    assert read_pairs(value, "engine_kwargs") == PAIRS


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (1.0, "`x` is 1.0, but must be NAME=VALUE pairs"),
        (["a"], "`x` is 'a', but must be NAME=VALUE pairs"),
        (["=1"], "`x` is '=1'"),
        (["a=1", "a=2"], "`x` has 'a' twice"),
        ("{a", "no JSON"),
        ({1: 2}, "`x` has the key 1, but keys must be names"),
        ("[1]", "`x` is 1, but must be NAME=VALUE pairs"),
    ],
)
def test_what_is_no_pair_is_refused(value, message):
    with pytest.raises(ValueError) as caught:
        read_pairs(value, "x")
    assert message in str(caught.value)


def test_pairs_of_every_command(tmp_path):
    written = ["--weights", "a=2", "b=1", "--output_dir", "x"]
    call = parse("prompts", "mix", "--parts", "a=p", "b=q", *written)
    assert call[1].weights == {"a": 2, "b": 1}
    config = tmp_path / "mix.yaml"
    config.write_text("parts: {a: p, b: q}\nweights: {a: 2, b: 1}\noutput_dir: x\n")
    assert parse("prompts", "mix", "--config", str(config)) == call
    config.write_text("drafts: {new: p}\nprompts: t\noutput_dir: x\nfail_under: {block_efficiency: 2}\n")
    arguments, *_ = parse("evaluate", "--config", str(config))
    assert arguments.drafts == {"new": "p"} and arguments.fail_under == {"block_efficiency": 2}
    argv = ["--drafts", "new=p", "runs/other", "--prompts", "t", "--output_dir", "x"]
    assert parse("evaluate", *argv)[0].drafts == {"new": "p", "other": "runs/other"}
    argv = ["--draft", "d", "--responses", "r", "--output_dir", str(tmp_path), "--divergence", "lk_hybrid"]
    (call,) = parse("train", "white_box", *argv, "--divergence_kwargs", "eta=3.0")
    assert call.config.divergence_kwargs == {"eta": 3.0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("5: a", "has the key 5, but keys must be names"),
        ("on: a", "has the key True, but keys must be names"),
        ("output_dir: a\noutput_dir: b", "the key 'output_dir' is there twice"),
        ("a: {b: 1, b: 2}", "the key 'b' is there twice"),
        ("fail_under: 1.0", "`fail_under` is 1.0, but must be NAME=VALUE pairs"),
        ("fail_under: [1.0]", "`fail_under` is 1.0, but must be NAME=VALUE pairs"),
        ("prompts: 5", "`prompts` is 5, but must be text"),
        ("group_by: [no]", "`group_by` is False, but must be text: put it in quotes"),
        ("seed: 1.5", "`seed` is 1.5, but must be a whole number"),
    ],
)
def test_yaml_that_says_something_else_is_refused(call, tmp_path, text, message):
    config = tmp_path / "evaluate.yaml"
    config.write_text(text)
    needed = ["--drafts", "a", "--output_dir", "x"] + ([] if "prompts" in text else ["--prompts", "p"])
    status, _, errors = call("evaluate", *needed, "--config", config)
    assert status == 2 and message in errors and "Traceback" not in errors


def test_choices_hold_in_yaml_too(tmp_path, call):
    config = tmp_path / "train.yaml"
    config.write_text("dtype: float17\n")
    argv = ["train", "black_box", "--draft", "d", "--responses", "r", "--output_dir", str(tmp_path / "out")]
    status, _, errors = call(*argv, "--config", config)
    assert status == 2 and "`dtype` is 'float17'. Did you mean" in errors
    config.write_text("eval_strategy: no\n")  # which YAML reads as false
    assert parse(*argv, "--config", str(config))[0].config.eval_strategy == "no"


@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.prog)
def test_help_shows_each_option_once_and_the_common_ones_first(parser):
    text = parser.format_help().partition("\nA recipe is")[0]
    entries = re.findall(r"^  (--\w.*)", text, re.MULTILINE)
    names = [name for entry in entries for name in re.findall(r"--[\w-]+", entry)]
    assert len(names) == len(set(names)) and not any("-" in name[2:] for name in names)
    titles = re.findall(r"^(\S.*):$", text, re.MULTILINE)
    assert titles[0] == "common options" and titles[-1] == "options of every command"
    assert ("options of TRL and transformers" in titles) == parser.prog.startswith("spec-kd train")
    if "options of TRL and transformers" in titles:
        assert titles.index("options of TRL and transformers") == len(titles) - 2
    shown = {action.dest for actions in parser.group_options().values() for action in actions}
    assert {field.name for kind in parser.dataclass_types for field in fields(kind) if field.init} == shown
    first = text[text.index("common options:") : text.index(f"\n\n{titles[1]}:")]
    required = {action.dest for actions in parser.group_options().values() for action in actions if action.required}
    assert all(f"--{name}" in first for name in required)


def test_merged_keys_are_no_duplicates(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("base: &base {a: 1, b: 2}\nother: {<<: *base, b: 3}\n")
    assert read_yaml(path)["other"] == {"a": 1, "b": 3}


def test_a_parser_takes_no_abbreviations():
    with pytest.raises(ValueError, match="Did you mean --recipe"):
        Parser("run", "", {"run": RunArguments}).parse(["--recip", "a"])


def test_the_error_holds_no_secret(call, monkeypatch):
    def fail(*_, **__):
        raise ValueError("no such model (token=hf_abcdefghijklmnop) at https://me:secret-word@host/v1")

    monkeypatch.setattr("spec_kd.cli.respond.run", fail)
    status, _, errors = call("respond", "--prompts", "p", "--output_dir", "o")
    assert status == 2 and "hf_abc" not in errors and "secret-word" not in errors and "no such model" in errors
