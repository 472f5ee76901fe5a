"""Tiny models, tokenizers and datasets, made here: no test needs the network."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads cost tiny models more than they give
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from tiny import build_llama, build_tokenizer

# What imports leave is a million objects. Collections during the imports, and the one that `Trainer.train` begins with,
# would walk all of them.
gc.disable()


def pytest_addoption(parser):
    group = parser.getgroup("campaign", "tables of situations (tests/campaign)")
    group.addoption(
        "--campaign",
        choices=("sample", "full"),
        default="sample",
        help="Cells to run: the cheapest of each row and 30 others (the default), or all.",
    )
    group.addoption("--campaign-record", metavar="FILE", help="File that gets one JSON line per cell.")


NUM_THREADS = torch.get_num_threads()


@pytest.fixture(autouse=True)
def keep_threads():
    """Fails a test that leaves PyTorch with other threads than it found: more slow down all tests that follow."""
    yield
    left = torch.get_num_threads()
    torch.set_num_threads(NUM_THREADS)
    assert left == NUM_THREADS, f"This test sets {left} threads for the tests that follow."


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def draft():
    return build_llama(seed=0, hidden_size=32)


@pytest.fixture
def target():
    return build_llama(seed=1, hidden_size=48, layers=3)


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
