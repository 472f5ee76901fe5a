"""Checks of models and trainings without weights: configurations, headers of files, modules, installed packages."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import cast

import torch
from peft import get_peft_model
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, Trainer
from transformers.integrations import get_available_reporting_integrations
from trl import ModelConfig, get_peft_config, get_quantization_config

from spec_kd._private import list_loading_options
from spec_kd.cli.paths import check_exists
from spec_kd.loading import find_adapter, load_config
from spec_kd.open_types import Arguments, Record
from spec_kd.options import suggest
from spec_kd.trainer.configs import DraftConfig

DTYPES = ("auto", "bfloat16", "float16", "float32")
ENGINE_PACKAGES = {"vllm": "vllm", "server": "openai"}


@contextmanager
def naming_model(role: str, name: str) -> Iterator[None]:
    """Adds the name and the role of a model to the errors of a block; those of the Hub and of file formats lack them.

    Args:
        role (`str`): What the model is, such as `"target"`.
        name (`str`): Its folder or Hub name.

    Raises:
        ValueError: The model cannot be loaded; the message has the cause.
        OSError: The model's files do not exist or cannot be reached.
    """
    try:
        yield
    except (OSError, ValueError, ImportError, TypeError, KeyError, AttributeError, SafetensorError) as error:
        text = " ".join(str(error).split())
        if name in text and isinstance(error, (OSError, ValueError, ImportError)):
            raise (OSError if isinstance(error, OSError) else ValueError)(f"{role}: {text}") from error
        raise ValueError(f"the {role} `{name}` cannot be loaded: {text or type(error).__name__}") from error


def check_model(role: str, name: str, options: Record | None = None) -> PreTrainedConfig:
    """Checks a model's configuration and, in a folder, the headers of its weight files.

    Args:
        role (`str`): What the model is, for messages.
        name (`str`): Its folder or Hub name; an adapter's folder stands for its base model.
        options (`Mapping`, *optional*): Arguments that it will be loaded with, such as `revision`.

    Returns:
        `PreTrainedConfig`: Its configuration.

    Raises:
        ValueError: Files are cut off or missing, the configuration cannot be read, or the `dtype` is unknown; names
            the model.
        FileNotFoundError: The folder does not exist.
    """
    check_exists(role, name)
    options = dict(options or {})
    for option in ("dtype", "torch_dtype"):
        check_dtype(option, options.get(option))
    with naming_model(role, name):
        adapter = find_adapter(name, options)
        config = load_config(name, options)
    for place in (name, None if adapter is None else adapter.base_model_name_or_path):
        if place is not None and Path(place).is_dir():
            check_weight_files(role, Path(place))
    return config


def check_weight_files(role: str, folder: Path) -> None:
    """Raises `ValueError` for a folder without weights, with a shard missing, or with a file that was cut off."""
    files = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("."))
    if not files and not any(folder.glob("*.bin")) and not any(folder.glob("*.gguf")):
        raise ValueError(f"the {role} `{folder}` has no weights: no file there ends in .safetensors or .bin.")
    for path in files:
        try:
            with safe_open(path, "pt"):
                pass  # compares the length of the file with what its header says
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"the weights `{path}` of the {role} are damaged ({error}). Copy or download the file again."
            ) from error
    for index in sorted(folder.glob("*.safetensors.index.json")):
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"`{index}` of the {role} is damaged. Copy or download the file again.") from error
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise ValueError(
                f"the {role} `{folder}` lacks {', '.join(missing)}, which `{index.name}` lists. Copy or download them."
            )


def check_dtype(name: str, value: object) -> None:
    """Raises `ValueError` for text that names no dtype of PyTorch; `"auto"` and `None` are fine."""
    dtype = getattr(torch, value, None) if isinstance(value, str) else value
    if value not in (None, "auto") and not isinstance(dtype, torch.dtype):
        raise ValueError(f"`{name}` is {value!r}, which is no dtype.{suggest(str(value), DTYPES)}")


def check_engine_package(engine: str) -> None:
    """Raises `ImportError` for an engine whose package is not installed."""
    package = ENGINE_PACKAGES.get(engine)
    if package is not None and find_spec(package) is None:
        raise ImportError(f"`engine={engine}` needs the package `{package}`, which is not installed: pip install it.")


def check_loading_options(name: str, options: Record) -> None:
    """Raises `ValueError` for arguments that `from_pretrained` does not know and that are no setting of the model."""
    if options.get("trust_remote_code") or not options:
        return  # the model's own code may take any argument
    with naming_model("target", name):
        _, unused = AutoConfig.from_pretrained(name, return_unused_kwargs=True, **options)
    known = list_loading_options()
    if unknown := [option for option in unused if option in options and option not in known]:
        raise ValueError(
            f"`engine_kwargs` has `{unknown[0]}`, which `from_pretrained` does not know.{suggest(unknown[0], known)}"
        )


def build_without_weights(config: PreTrainedConfig, options: Record) -> PreTrainedModel | None:
    """Builds the modules of a model on the meta device; `None` for a model that is not a plain language model."""
    kept = {name: options[name] for name in ("attn_implementation", "trust_remote_code") if options.get(name)}
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, **kept)
    except ImportError:
        raise
    except Exception:  # only its trainer can build a model of another kind
        return None


def check_training(config: DraftConfig, draft: ModelConfig) -> None:
    """Checks what a training needs besides weights and rows: draft, adapter, optimizer, packages, trackers.

    Raises:
        ValueError: A dtype is unknown, the draft does not have the LoRA modules, or a tracker is not installed; names
            the option.
        ImportError: A package is not installed.
        OSError: The draft does not exist.
    """
    name = cast(str, draft.model_name_or_path)
    options = {"revision": draft.model_revision, "attn_implementation": draft.attn_implementation, "dtype": draft.dtype}
    options |= cast(Arguments, config.model_init_kwargs or {})
    model_config = check_model("draft", name, {**options, "trust_remote_code": config.trust_remote_code})
    with naming_model("draft", name):
        model = build_without_weights(model_config, options)
    get_quantization_config(draft)
    peft_config = get_peft_config(draft)
    if peft_config is not None and model is not None:
        wanted = getattr(peft_config, "modules_to_save", None) or []
        unknown = [part for part in wanted if not any(key.endswith(part) for key, _ in model.named_modules())]
        if unknown:
            raise ValueError(f"`lora_modules_to_save` names {unknown}, but the draft has no such module.")
        try:
            model = get_peft_model(model, peft_config)
        except ValueError as error:
            raise ValueError(f"the LoRA options do not fit the draft: {error}") from error
    if model is not None:
        Trainer.get_optimizer_cls_and_kwargs(config, model)  # raises for a package that is not installed
    available = get_available_reporting_integrations()
    if missing := [tracker for tracker in cast(list[str], config.report_to) if tracker not in available]:
        raise ValueError(f"`report_to` names {missing[0]!r}, which is not installed.{suggest(missing[0], available)}")
    if getattr(config, "use_vllm", False):
        check_engine_package("vllm")
