"""Tiny models on disk, prompts to answer, and the command line called in this process."""

import itertools
import json

import pytest
import torch
from datasets import Dataset
from tiny import build_llama, build_tokenizer

from spec_kd.cli.main import main

# of every training here: small, exact and quiet
TRAINING = {
    "per_device_train_batch_size": 2,
    "max_steps": 4,
    "learning_rate": 1e-2,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "report_to": "none",
    "logging_steps": 1,
    "save_steps": 2,
    "max_length": "none",
}


WORDS = ("gene", "cell", "virus", "leaf", "root", "bone", "vein", "lung", "seed", "wing", "gill", "claw")


def build_target():
    """A target that learned to ask and to answer: what it writes as the user passes for a question."""
    tokenizer = build_tokenizer()
    texts = [
        [{"role": "user", "content": f"Is a {left} a {right}?"}, {"role": "assistant", "content": "It is."}]
        for left, right in itertools.permutations(WORDS, 2)
    ]
    rows = [torch.tensor(tokenizer.apply_chat_template(text)["input_ids"]) for text in texts]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    model = build_llama(seed=1, vocab_size=288, hidden_size=48, initializer_range=0.05)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(90):
        batch = ids[step % 8 :: 8]
        loss = model(input_ids=batch, labels=batch.masked_fill(batch == 0, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folders of a target, a draft of its family, and one with another tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    for name, model in (("target", build_target()), ("draft", build_llama(seed=0))):
        model.save_pretrained(folder / name)
        build_tokenizer().save_pretrained(folder / name)
    other = build_tokenizer()
    other.add_tokens(["<|other|>"])
    build_llama(vocab_size=262).save_pretrained(folder / "stranger")
    other.save_pretrained(folder / "stranger")
    return folder


@pytest.fixture(scope="session")
def prompts(tmp_path_factory):
    """A file of prompts."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [{"prompt": [{"role": "user", "content": f"{i} plus {i}"}]} for i in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def call(capsys):
    """Runs a command; returns its exit status, its result (the last line on stdout) and what it said on stderr."""

    def run(*argv):
        status = main([str(argument) for argument in argv])
        captured = capsys.readouterr()
        lines = captured.out.splitlines()
        assert len(lines) <= 1, captured.out
        return status, json.loads(lines[0]) if lines else None, captured.err

    return run


@pytest.fixture
def training():
    """Options of a training as a YAML file has them."""
    return dict(TRAINING)


def as_flags(options):
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


@pytest.fixture
def flags(training):
    """Options of a training as a command line has them."""
    return as_flags(training)


@pytest.fixture(scope="session")
def responses(models, prompts, tmp_path_factory):
    """What `spec-kd respond` makes of the prompts, with a signal."""
    folder = tmp_path_factory.mktemp("responses") / "out"
    argv = ["respond", "--target", models / "target", "--prompts", prompts, "--output_dir", folder]
    argv += ["--max_new_tokens", "6", "--temperature", "1.0", "--teacher_signal", "sampled_logprobs"]
    assert main([str(argument) for argument in argv]) == 0
    return folder / "responses.parquet"


@pytest.fixture
def read_rows():
    return lambda path: Dataset.from_parquet(str(path)).to_list()
