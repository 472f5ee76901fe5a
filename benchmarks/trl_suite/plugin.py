"""A pytest plugin that runs a test file of TRL with local stand-ins and with another trainer class.

Environment: `TRL_SUITE_TRAINER`, one of `SWAPS`; `TRL_SUITE_WORK`, the folder of the stand-ins; `TRL_SUITE_OUTCOMES`, a
JSON file that is written.
"""

import ast
import copy
import importlib
import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
import trl  # before the tests are collected, whose own folder has a `trl` of another version
from accelerate.utils import is_peft_model
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from transformers import AutoConfig, PreTrainedModel

from spec_kd import (
    BlackBoxSFTConfig,
    BlackBoxSFTTrainer,
    OnlineGKDTrainer,
    WhiteBoxDistillConfig,
    WhiteBoxDistillTrainer,
)

WORK = Path(os.environ["TRL_SUITE_WORK"])
OUTCOMES: dict[str, dict[str, str]] = {}


@dataclass
class _BlackBoxConfig(BlackBoxSFTConfig):
    assume_target_completions: bool = True


@dataclass
class _WhiteBoxConfig(WhiteBoxDistillConfig):
    assume_target_completions: bool = True


class _BlackBox(BlackBoxSFTTrainer):
    _config_class = _BlackBoxConfig


class _WhiteBox(WhiteBoxDistillTrainer):
    """With a target made on the spot, where a test of SFT has none."""

    _config_class = _WhiteBoxConfig

    def __init__(self, model, *args, **kwargs):
        kwargs.setdefault("teacher_model", build_target(model, kwargs.get("args", args[0] if args else None)))
        super().__init__(model, *args, **kwargs)


SWAPS: dict[str, dict[str, Any]] = {
    "TRL": {},
    "BlackBoxSFTTrainer": {"SFTTrainer": _BlackBox, "SFTConfig": _BlackBoxConfig},
    "WhiteBoxDistillTrainer": {"SFTTrainer": _WhiteBox, "SFTConfig": _WhiteBoxConfig},
    # with TRL's own configurations, which are taken over with their values
    "OnlineGKDTrainer": {"GKDTrainer": OnlineGKDTrainer, "DistillationTrainer": OnlineGKDTrainer},
}


def build_target(model: Any, args: Any) -> PreTrainedModel | str:
    """Another random model of the draft's class, with rows to spare, as large targets have."""
    try:
        trusts = getattr(args, "trust_remote_code", False)
        config = model if isinstance(model, str) else (model.get_base_model() if is_peft_model(model) else model).config
        if isinstance(config, str):
            config = AutoConfig.from_pretrained(config, trust_remote_code=trusts)
        config = copy.deepcopy(config)
        text = config.get_text_config()
        text.vocab_size += 128
        config.name_or_path = ""  # its tokenizer is the one that the test trains with
        torch.manual_seed(1)
        name = config.architectures[0]
        if hasattr(transformers, name):
            return getattr(transformers, name)._from_config(config, dtype=torch.float32)
        return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=trusts, dtype=torch.float32)
    except (OSError, ValueError):
        return model  # what the test gives is wrong: the trainer is to say so


def load_stand_in(path: str, name: str = "default", *, split: str | None = None, streaming: bool = False, **_: Any):
    """`datasets.load_dataset` of what was made for the tests."""
    folder = WORK / "data" / path.split("/")[-1] / name
    if not folder.exists():
        pytest.skip(f"{path} ({name}) has no stand-in")
    splits = DatasetDict.load_from_disk(folder)
    if split is None:
        return IterableDatasetDict({k: v.to_iterable_dataset() for k, v in splits.items()}) if streaming else splits
    base, _, part = split.partition("[")
    rows: Dataset | IterableDataset = splits[base]
    if part:
        start, _, stop = part.rstrip("]").partition(":")
        rows = rows.select(range(*slice(int(start or 0), int(stop) if stop else None).indices(len(rows))))
    return rows.to_iterable_dataset() if streaming else rows


def add_missing_names(test_file: Path) -> None:
    """Puts a name that skips where the tests import one that the installed TRL does not have."""
    for node in ast.walk(ast.parse(test_file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("trl"):
            continue
        try:
            module = importlib.import_module(node.module)
        except ImportError:
            module = sys.modules[node.module] = ModuleType(node.module)
        for alias in node.names:
            if not hasattr(module, alias.name):
                setattr(module, alias.name, _make_missing(alias.name))


def _make_missing(name: str) -> Any:
    if re.fullmatch(r"is_\w+_available", name):
        return lambda *_, **__: False

    def missing(*_: Any, **__: Any) -> None:
        pytest.skip(f"trl {trl.__version__} has no `{name}`")

    return missing


@pytest.fixture
def lazy_shared_datadir(request: pytest.FixtureRequest) -> Path:
    """The folder `data` beside the tests, as the plugin pytest-datadir gives it."""
    return request.path.parent / "data"


def pytest_collect_file(file_path: Path, parent: Any) -> None:
    if file_path.name.startswith("test_"):
        for path in (file_path, *(parent / "testing_utils.py" for parent in file_path.parents)):
            if path.exists():
                add_missing_names(path)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for module in {item.module for item in items}:
        swaps = SWAPS[os.environ["TRL_SUITE_TRAINER"]]
        for name, value in {**swaps, "load_dataset": load_stand_in}.items():
            if hasattr(module, name):
                setattr(module, name, value)


@pytest.hookimpl(hookwrapper=True, tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = (yield).get_result()
    name = item.nodeid.split("::", 1)[1]
    if report.when == "call" or report.outcome != "passed":
        reason = ""
        if call.excinfo is not None:
            reason = f"{call.excinfo.typename}: {call.excinfo.value}".split("\n")[0]
        OUTCOMES[name] = {"outcome": report.outcome, "reason": reason}
        # after every test, so that a run that is stopped has not been for nothing
        Path(os.environ["TRL_SUITE_OUTCOMES"]).write_text(json.dumps(OUTCOMES, indent=1), encoding="utf-8")
