"""Commands that serve a draft, whatever the names of draft and target hold."""

import ast
import json
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from hostile import HOSTILE
from tiny import build_llama

from spec_kd.serving import SERVING_ENGINES, serving_commands

PYTHON = [name for name, engine in SERVING_ENGINES.items() if engine.command_language == "python"]
SHELL = [name for name, engine in SERVING_ENGINES.items() if engine.command_language == "bash"]


def get_option(words, name):
    return words[words.index(name) + 1]


def as_word(name):
    return f"./{name}" if name.startswith("-") else name  # else it would be an option


def test_every_engine_has_its_command():
    commands = serving_commands("me/draft", "org/target", 4)
    assert set(commands) == {"vllm", "sglang", "llama.cpp", "tensorrt-llm", "transformers", "mlx-lm", "openvino"}
    words = shlex.split(commands["mlx-lm"])
    assert words[0] == "mlx_lm.server"
    assert get_option(words, "--model") == "org/target"
    assert get_option(words, "--draft-model") == "me/draft"
    assert get_option(words, "--num-draft-tokens") == "4"
    assert "num_assistant_tokens=4" in commands["openvino"]
    words = shlex.split(commands["vllm"])
    assert words[:3] == ["vllm", "serve", "org/target"]
    assert json.loads(get_option(words, "--speculative-config")) == {
        "method": "draft_model",
        "model": "me/draft",
        "num_speculative_tokens": 4,
    }
    words = shlex.split(commands["sglang"])
    assert get_option(words, "--speculative-algorithm") == "STANDALONE"
    assert get_option(words, "--speculative-num-steps") == "4"
    assert get_option(words, "--speculative-eagle-topk") == "1"
    assert get_option(words, "--speculative-num-draft-tokens") == "5"
    with pytest.raises(ValueError, match="is 0, but must be at least 1"):
        serving_commands("me/draft", "org/target", 0)


def test_a_parallel_draft_has_the_commands_of_engines_that_take_one():
    commands = serving_commands("me/draft", "org/target", 4, is_parallel=True)
    assert set(commands) == {"vllm", "tensorrt-llm"}
    words = shlex.split(commands["vllm"])
    assert json.loads(get_option(words, "--speculative-config")) == {
        "method": "draft_model",
        "model": "me/draft",
        "num_speculative_tokens": 4,
        "parallel_drafting": True,
    }
    flags = ['"draft_sample_method": "probabilistic"']
    sampled = SERVING_ENGINES["vllm"].write_parallel_command("me/draft", "org/target", 4, flags)
    config = json.loads(get_option(shlex.split(sampled), "--speculative-config"))
    assert (config["draft_sample_method"], config["parallel_drafting"]) == ("probabilistic", True)
    calls = [node for node in ast.walk(ast.parse(commands["tensorrt-llm"])) if isinstance(node, ast.Call)]
    (made,) = (call for call in calls if call.func.id == "PARDDecodingConfig")
    assert {one.arg: one.value.value for one in made.keywords} == {"max_draft_len": 4, "speculative_model": "me/draft"}
    for engine in SERVING_ENGINES.values():
        takes_none = any(check.name == "parallel_draft" for check in engine.checks)
        assert takes_none is (engine.write_parallel_command is None)


def test_llama_cpp_is_told_to_draft():
    lines = serving_commands("me/draft", "org/target", 4)["llama.cpp"].splitlines()
    draft, target, serve = map(shlex.split, lines)
    for convert, name, flag in ((draft, "me/draft", "-md"), (target, "org/target", "-m")):
        assert convert[:3] == ["python", "convert_hf_to_gguf.py", name]
        assert get_option(convert, "--outfile") == get_option(serve, flag)
    assert get_option(serve, "--spec-type") == "draft-simple"
    assert get_option(serve, "--spec-draft-n-max") == "4"
    assert "--draft-max" not in serve  # removed: the server aborts


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_one_word_of_a_shell_and_one_literal_of_python(name):
    commands = serving_commands(name, f"{name}2", 4)
    words = {engine: shlex.split(commands[engine]) for engine in SHELL}
    assert words["vllm"][:3] == ["vllm", "serve", as_word(f"{name}2")] and len(words["vllm"]) == 5
    assert json.loads(words["vllm"][4])["model"] == name
    assert get_option(words["sglang"], "--model-path") == as_word(f"{name}2") and len(words["sglang"]) == 15
    assert get_option(words["sglang"], "--speculative-draft-model-path") == as_word(name)
    assert words["llama.cpp"][2] == as_word(name) and words["llama.cpp"][7] == as_word(f"{name}2")
    assert len(words["llama.cpp"]) == 19
    for engine in PYTHON:
        tree = ast.parse(commands[engine])
        strings = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
        assert name in strings and f"{name}2" in strings
        plain = ast.parse(serving_commands("draft", "target", 4)[engine])
        assert [type(node) for node in ast.walk(tree)] == [type(node) for node in ast.walk(plain)]


def test_a_real_shell_runs_nothing_of_the_names(tmp_path):
    functions = "vllm() { printf '%s\\0' \"$@\"; }; python() { printf '%s\\0' \"$@\"; }; llama-server() { :; }; "
    names = [name for name in HOSTILE if "\0" not in name]
    script = functions + "\n".join(
        serving_commands(name, name)[engine] for name in names for engine in ("vllm", "sglang", "llama.cpp")
    )
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, check=True)
    assert not list(tmp_path.iterdir()) and not done.stderr
    words = done.stdout.decode().split("\0")
    for name in names:
        assert words[:2] == ["serve", as_word(name)] and json.loads(words[3])["model"] == name
        assert words[4 + 3] == words[4 + 7] == as_word(name)
        assert words[18:20] == words[22:24] == ["convert_hf_to_gguf.py", as_word(name)]
        words = words[26:]


def test_drafted_tokens_are_accepted_by_chance():
    rates = [0.75, 0.5, 0.25]
    commands = {
        name: engine.write_synthetic_command("me/draft", "org/target", rates)
        for name, engine in SERVING_ENGINES.items()
        if engine.write_synthetic_command
    }
    assert set(commands) == {"vllm", "llama.cpp"}
    plain = serving_commands("me/draft", "org/target", 3)
    assert commands["llama.cpp"] == f"{plain['llama.cpp']} --spec-synth-rates 0.75,0.5,0.25"
    before, after = (
        json.loads(get_option(shlex.split(one["vllm"]), "--speculative-config")) for one in (plain, commands)
    )
    assert after == {**before, "rejection_sample_method": "synthetic", "synthetic_acceptance_rates": rates}


def test_a_null_character_is_refused():
    with pytest.raises(ValueError, match=r"`target_name='a.x00b'` holds a null character"):
        serving_commands("draft", "a\0b")


def test_the_transformers_snippet_runs(tokenizer, tmp_path, capsys):
    for name, seed in (("draft", 0), ('the "target"', 1)):
        build_llama(seed=seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    snippet = serving_commands(str(tmp_path / "draft"), str(tmp_path / 'the "target"'), 3)["transformers"]
    snippet = snippet.replace("max_new_tokens=64", "max_new_tokens=8")
    torch.manual_seed(0)
    exec(compile(snippet, "snippet", "exec"), {})
    assert capsys.readouterr().out.splitlines()[-1].startswith("Hello")


def test_the_limits_name_the_engines_that_were_not_seen_running():
    """`is_observed` and docs/limits.md say the same."""
    text = " ".join((Path(__file__).parents[2] / "docs" / "limits.md").read_text().split())
    sentence = next(part for part in text.split(". ") if "is taken from their sources" in part)
    named = {engine.name for engine in SERVING_ENGINES.values() if engine.title in sentence}
    assert named == {engine.name for engine in SERVING_ENGINES.values() if not engine.is_observed}
