"""Every bad input gives one clear sentence, before any model reads, writes or learns a token."""

import json
import re
import shutil
from dataclasses import dataclass

import pytest
import yaml
from bad_inputs import COMMANDS, PYTHON, RECIPES, World
from campaign_table import Table
from datasets import Dataset
from tiny import build_llama, build_tokenizer
from transformers import LlamaForCausalLM

from spec_kd.cli.main import main

TABLE = Table(
    "bad_inputs",
    {
        **{f"python: {name}": row for name, row in PYTHON.items()},
        **{f"command: {name}": row for name, row in COMMANDS.items()},
        **{f"recipe: {name}": row for name, row in RECIPES.items()},
    },
    columns=("refused",),
)
LONGEST = 700  # characters of a message


@dataclass(frozen=True)
class Place(World):
    """A world with files on disk."""

    @property
    def prompts(self) -> Dataset:
        return Dataset.from_dict({"prompt": ["a"]})

    @property
    def names(self) -> dict[str, str]:
        """Paths by the names that command lines and recipes have for them."""
        names = {"folder": self.folder, "out": self.folder / "out", "model": self.folder / "model"}
        names |= {"truncated": self.folder / "truncated", "log": self.folder / "log.jsonl"}
        names |= {"empty": self.folder / "empty.jsonl", "broken": self.folder / "broken.jsonl"}
        return {name: str(path) for name, path in {**names, "corrupt": self.folder / "corrupt.parquet"}.items()}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    build_llama().save_pretrained(folder / "model")
    build_tokenizer().save_pretrained(folder / "model")
    shutil.copytree(folder / "model", folder / "truncated")
    weights = folder / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    rows = [{"prompt": text, "completion": "b"} for text in "abcdef"]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "empty.jsonl").write_bytes(b"")
    (folder / "broken.jsonl").write_bytes(b'{"prompt": "a"\n{"pro')
    (folder / "corrupt.parquet").write_bytes(b"PAR1" + bytes(50) + b"PAR1")
    return folder


@pytest.fixture(scope="module")
def model():
    return build_llama()


@pytest.fixture
def world(files, model, tokenizer, monkeypatch, tmp_path):
    """The world; nothing in it may run a model."""

    def run(*args, **kwargs):
        raise AssertionError("a model ran before the input was refused")

    monkeypatch.setattr(LlamaForCausalLM, "forward", run)
    monkeypatch.chdir(tmp_path)
    rows = Dataset.from_dict({"prompt_ids": [[5]], "completion_ids": [[6, 1]]})
    return Place(files, model, tokenizer, rows)


def test_a_bad_input_is_refused(cell, outcome, world, tmp_path, capsys):
    kind = cell.row.partition(":")[0]
    bad, expected = TABLE[cell]
    if kind == "python":
        with pytest.raises((ValueError, TypeError, OSError)) as caught:
            bad(world)
        message = str(caught.value)
    else:
        argv = bad.format(**world.names).split() if kind == "command" else check(bad, world, tmp_path)
        assert main(argv) == 2
        captured = capsys.readouterr()
        said = [line for line in captured.err.splitlines() if line.startswith("spec-kd ")]
        assert captured.out == "" and "Traceback" not in captured.err and len(said) == 1
        message = said[0]
        assert captured.err.rstrip().endswith(message), captured.err  # one line, and nothing after it
    assert expected in message, message
    assert len(message) < LONGEST and "\n" not in message, message
    outcome.note(re.sub(re.escape(str(world.folder)), "...", message))


def check(changes, world, tmp_path):
    """The command that checks a recipe with these changes."""
    recipe = {
        "target": world.names["model"],
        "draft": world.names["model"],
        "output_dir": world.names["out"],
        "prompts": {"historical": {"paths": world.names["log"], "test_fraction": 0.3}},
        "respond": {"temperature": 1.0, "max_new_tokens": 4, "teacher_signal": "sampled_logprobs"},
        "train": {"method": "white_box", "max_steps": 1, "use_cpu": True, "report_to": "none"},
        "evaluate": {"costs": "none"},
    }
    for path, value in changes.items():
        *sections, name = path.split(".") if isinstance(path, str) else [path]
        section = recipe
        for key in sections:
            section = section[key]
        section[name] = value.format(**world.names) if isinstance(value, str) else value
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return ["run", str(tmp_path / "recipe.yaml"), "--only_check"]


def test_the_recipe_that_is_changed_is_right(world, tmp_path, capsys):
    assert main(check({}, world, tmp_path)) == 0
    assert json.loads(capsys.readouterr().out)["is_valid"]
