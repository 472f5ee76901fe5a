"""The tiny models and datasets that TRL's tests name, made here by the scripts of its checkout."""

import ast
import importlib
import os
import random
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import transformers
from datasets import Dataset, DatasetDict
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, GenerationConfig, PreTrainedModel, Qwen3Config

from benchmarks.trl_suite.processors import build_processor
from benchmarks.trl_suite.tokenizers import build_tokenizer

DATA_SCRIPTS = {
    "zen": "generate_zen_dataset",
    "zen-image": "generate_zen_image_dataset",
    "zen-multi-image": "generate_zen_multi_image_dataset",
    "harmony": "generate_harmony_dataset",
    "toolcall": "generate_toolcall_dataset",
}
ORGANIZATION = "trl-internal-testing"
REVISION = "0" * 40
# tokenizers that a test names by themselves
TOKENIZERS = ("Qwen/Qwen3-4B",)


def build_datasets(checkout: Path, folder: Path) -> None:
    """Runs the checkout's scripts of datasets; what they would push to the Hub lies in `folder/name/config` after."""
    sys.path.insert(0, str(checkout / "scripts"))
    random.seed(0)
    np.random.seed(0)

    def save(dataset: Dataset | DatasetDict, repo_id: str, config_name: str = "default", **_: Any) -> None:
        splits = dataset if isinstance(dataset, DatasetDict) else DatasetDict(train=dataset)
        splits.save_to_disk(folder / repo_id.split("/")[-1] / config_name)

    try:
        with patch.object(Dataset, "push_to_hub", save), patch.object(DatasetDict, "push_to_hub", save):
            for name, script in DATA_SCRIPTS.items():
                importlib.import_module(script).main(0.1, True, f"{ORGANIZATION}/{name}")
    finally:
        sys.path.pop(0)


def read_texts(folder: Path) -> list[str]:
    """All texts of the datasets, which the tokenizers learn their merges from."""
    texts = []
    for config in sorted(folder.glob("*/*")):
        for split in DatasetDict.load_from_disk(config).values():
            columns = [name for name in split.column_names if not name.startswith("image")]
            texts += [str(value) for row in split.select_columns(columns) for value in row.values()]
    return texts


def find_models(test_file: Path) -> set[str]:
    """Names of the tiny models in the source of a test."""
    return set(re.findall(rf"{ORGANIZATION}/(tiny-[\w.-]+)", test_file.read_text(encoding="utf-8")))


class ModelFactory:
    """Runs the checkout's scripts of tiny models, with stand-ins for what they load from the Hub.

    Args:
        checkout (`Path`): Of TRL.
        cache (`Path`): A folder in the layout of the Hub's cache, which `HF_HUB_CACHE` names when the tests run.
        texts (`list[str]`): For the tokenizers.
    """

    def __init__(self, checkout: Path, cache: Path, texts: list[str]):
        self.scripts, self.cache, self.texts = checkout / "scripts" / "generate_tiny_models", cache, texts
        sys.path.insert(0, str(checkout / "scripts"))
        self._common = importlib.import_module("generate_tiny_models._common")

    def build_all(self, names: set[str]) -> dict[str, str]:
        """Makes the models of these names; returns those that could not be made, with the reason."""
        failures = {}
        for name in TOKENIZERS:
            self._save(name, build_tokenizer(name, self.texts))
        for script in sorted(self.scripts.glob("for_c*/*.py")):
            name = self._find_name(script)
            if name not in names or self._folder(f"{ORGANIZATION}/{name}").exists():
                continue
            try:
                self._run(script)
            except Exception as error:  # one class that cannot be made must not cost the others
                failures[name] = f"{type(error).__name__}: {error}"
        return failures

    def _find_name(self, script: Path) -> str | None:
        """The name that a script pushes its model under."""
        tree = ast.parse(script.read_text(encoding="utf-8"))
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        pushes = [call for call in calls if getattr(call.func, "id", None) == "push_to_hub"]
        classes = re.findall(r"model = (\w+)\(", script.read_text(encoding="utf-8"))
        if not pushes or not classes:
            return None
        prefix, *suffix = [a.value for a in pushes[0].args[3:] if isinstance(a, ast.Constant)] or [None]
        return "-".join(part for part in (prefix, classes[0], *suffix) if part)

    def _run(self, script: Path) -> None:
        source = script.read_text(encoding="utf-8")
        # numbers of the published tokenizers
        source = re.sub(r"vocab_size=\d+", "vocab_size=len(tokenizer.vocab)", source)
        source = re.sub(r"\n\s*(?:bos|eos|pad)_token_id=[^\n]*,(?=\n)", "", source)
        module = ModuleType(f"generate_tiny_models.{script.parent.name}.{script.stem}")
        module.__package__, module.__file__ = f"generate_tiny_models.{script.parent.name}", str(script)
        torch.manual_seed(0)
        with self._stand_ins():
            exec(compile(source, str(script), "exec"), vars(module))

    @contextmanager
    def _stand_ins(self) -> Iterator[None]:
        def push(model: PreTrainedModel, processor: Any, generation_config: Any, *parts: str, **_: Any) -> None:
            prefix, *suffix = [*parts, None][:2] if parts else [None]
            name = "-".join(part for part in (prefix, type(model).__name__, *suffix) if part)
            self._save(f"{ORGANIZATION}/{name}", processor, model, generation_config)

        def ignore(*_: Any, **__: Any) -> None:
            pass

        def find_tokenizer(model_id: str, **_: Any) -> Any:
            return build_tokenizer(model_id, self.texts)

        def find_processor(model_id: str, **_: Any) -> Any:
            return build_processor(model_id, self.texts)[0]

        def find_config(model_id: str, **parts: Any) -> Any:
            return build_processor(model_id, self.texts)[1](**parts)

        with ExitStack() as stack:
            for name in ("check_transformers_version", "check_dtype_pattern", "print_config_diff", "smoke_test"):
                stack.enter_context(patch.object(self._common, name, ignore))
            stack.enter_context(patch.object(self._common, "push_to_hub", push))
            for auto_class, build in ((AutoTokenizer, find_tokenizer), (AutoProcessor, find_processor)):
                stack.enter_context(patch.object(auto_class, "from_pretrained", build))
            stack.enter_context(patch.object(AutoConfig, "from_pretrained", find_config))
            stack.enter_context(patch.object(GenerationConfig, "from_pretrained", lambda *_, **__: GenerationConfig()))
            yield

    def _folder(self, repo_id: str) -> Path:
        return self.cache / f"models--{repo_id.replace('/', '--')}"

    def _save(self, repo_id: str, processor: Any, model: PreTrainedModel | None = None, generation: Any = None) -> None:
        snapshot = self._folder(repo_id) / "snapshots" / REVISION
        snapshot.mkdir(parents=True, exist_ok=True)
        tokenizer = getattr(processor, "tokenizer", processor)
        if model is not None:
            model.config.get_text_config().eos_token_id = tokenizer.eos_token_id
            model.generation_config = generation or GenerationConfig()
            model.generation_config.eos_token_id = tokenizer.eos_token_id
            model.generation_config.pad_token_id = tokenizer.pad_token_id
            model.save_pretrained(snapshot)
        else:
            Qwen3Config().save_pretrained(snapshot)  # what says which class a tokenizer has
        processor.save_pretrained(snapshot)
        refs = self._folder(repo_id) / "refs"
        refs.mkdir(exist_ok=True)
        (refs / "main").write_text(REVISION)


def build_stand_ins(checkout: Path, work: Path, test_files: list[Path]) -> dict[str, str]:
    """Makes what is not there yet of the datasets (`work/data`) and models (`work/hub`) that the tests name.

    Returns:
        `dict[str, str]`: Models that could not be made, with the reason.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.logging.set_verbosity_error()
    data = work / "data"
    if not data.exists():
        build_datasets(checkout, data)
    names = set().union(*(find_models(file) for file in test_files))
    return ModelFactory(checkout, work / "hub", read_texts(data)).build_all(names)
