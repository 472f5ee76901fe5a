"""Models, configs and tokenizers from a path or a Hub id: a whole model, an adapter on its base, quantized weights.

Every entry point that takes a name comes here, so that a name means the same everywhere.
"""

import os
from typing import cast

import transformers
from peft import PeftConfig, PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.utils import find_adapter_config_file

from spec_kd._private import create_model_from_path, get_config_model_id
from spec_kd.files import finish_replacement
from spec_kd.open_types import Argument, Arguments

HUB_OPTIONS = ("revision", "trust_remote_code", "token", "cache_dir", "subfolder", "local_files_only")
# What says where a file lies; of an adapter that is said by its own config for the base.
PLACE_OPTIONS = ("revision", "subfolder")

Name = str | os.PathLike[str]


def get_hub_options(init_kwargs: Arguments | None) -> Arguments:
    """The part of a model's init arguments that also says which config and tokenizer belong to it.

    `trust_remote_code` is always among them: without it, transformers would ask at the terminal.
    """
    named = {name: value for name, value in (init_kwargs or {}).items() if name in HUB_OPTIONS}
    return {"trust_remote_code": False, **named}


def find_adapter(name: Name, init_kwargs: Arguments | None = None) -> PeftConfig | None:
    """The adapter's config where `name` is an adapter, also if a `config.json` lies beside it; else `None`.

    Args:
        name (`str` or `os.PathLike`): A folder or a Hub id.
        init_kwargs (`dict`, *optional*): Arguments of `from_pretrained`.

    Raises:
        ValueError: If the adapter does not say which base model it belongs to.
    """
    options = {key: value for key, value in get_hub_options(init_kwargs).items() if key != "trust_remote_code"}
    if find_adapter_config_file(os.fspath(name), **options) is None:
        return None
    config = PeftConfig.from_pretrained(os.fspath(name), **options)
    if not config.base_model_name_or_path:
        raise ValueError(
            f"The adapter `{name}` does not name its base model. Set `base_model_name_or_path` in its "
            "adapter_config.json."
        )
    return config


def load_model(name: Name, *, is_trainable: bool = False, **init_kwargs: Argument) -> PreTrainedModel | PeftModel:
    """The model of a path or Hub id, loaded by TRL's own loader; of an adapter, base and adapter as a `PeftModel`.

    Args:
        name (`str` or `os.PathLike`): A folder or a Hub id.
        is_trainable (`bool`, *optional*, defaults to `False`): Whether the weights of an adapter are to be trained.
        init_kwargs: Arguments of `from_pretrained`; `dtype` defaults to float32, as in TRL.

    Raises:
        ValueError: For an adapter without a base model.
        OSError: If there is no such model, or the base model of the adapter is not found.
    """
    name = os.fspath(name)
    finish_replacement(name)
    adapter = find_adapter(name, init_kwargs)
    if adapter is None:
        options = {"trust_remote_code": False, **init_kwargs}
        return create_model_from_path(name, architecture=_find_class(name, options), **options)
    base_name, base_kwargs = _get_base(adapter, init_kwargs)
    try:
        base = load_model(base_name, **base_kwargs)
    except OSError as error:
        raise OSError(f"`{name}` is an adapter on `{base_name}`, which cannot be loaded: {error}") from error
    options = {key: value for key, value in get_hub_options(init_kwargs).items() if key != "trust_remote_code"}
    return PeftModel.from_pretrained(base, name, is_trainable=is_trainable, **options)


def load_config(model: Name | PreTrainedModel, init_kwargs: Arguments | None = None) -> PretrainedConfig:
    """The config of a model, or of what its name stands for (of an adapter: its base model's)."""
    if not isinstance(model, str | os.PathLike):
        return model.config
    adapter = find_adapter(model, init_kwargs)
    if adapter is not None:
        return load_config(*_get_base(adapter, init_kwargs))
    return AutoConfig.from_pretrained(os.fspath(model), **get_hub_options(init_kwargs))


def get_name(model: Name | PreTrainedModel) -> str:
    """The folder or Hub id of a model or of its name; empty for a model that was not loaded from one."""
    return os.fspath(model) if isinstance(model, str | os.PathLike) else get_config_model_id(model.config)


def load_tokenizer(name: Name, init_kwargs: Arguments | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer saved with a model; of an adapter without one, its base model's.

    Raises:
        OSError, ValueError: If there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(os.fspath(name), **get_hub_options(init_kwargs))
    except (OSError, ValueError):
        adapter = find_adapter(name, init_kwargs)
        if adapter is None:
            raise
    return load_tokenizer(*_get_base(adapter, init_kwargs))


def find_tokenizer(
    model: Name | PreTrainedModel, init_kwargs: Arguments | None = None
) -> PreTrainedTokenizerBase | None:
    """The tokenizer saved with a model (a path, a Hub id, or a model that knows where it came from), or `None`."""
    name = get_name(model)
    if not name:
        return None
    try:
        return load_tokenizer(name, init_kwargs)
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise  # there is one, and the error says how to get it
        return None


def find_processing_class(
    model: Name | PreTrainedModel, init_kwargs: Arguments | None = None
) -> PreTrainedTokenizerBase | ProcessorMixin | None:
    """The processor saved with a multimodal model, else as [`find_tokenizer`]."""
    name = get_name(model)
    if not name:
        return None
    try:
        config = load_config(model, init_kwargs)
        if config.get_text_config() is not config:
            return AutoProcessor.from_pretrained(os.fspath(name), **get_hub_options(init_kwargs))
    except (ImportError, OSError, ValueError):
        pass
    return find_tokenizer(model, init_kwargs)


def choose_processing_class(
    draft: PreTrainedTokenizerBase | ProcessorMixin | None, target: PreTrainedTokenizerBase | ProcessorMixin | None
) -> PreTrainedTokenizerBase | ProcessorMixin | None:
    """The target's, which the draft reads when it serves; a processor only for a draft that has one too."""
    if isinstance(draft, ProcessorMixin):
        return target if isinstance(target, ProcessorMixin) else draft
    return draft if target is None else getattr(target, "tokenizer", target)


def _get_base(adapter: PeftConfig, init_kwargs: Arguments | None) -> tuple[str, Arguments]:
    """The name of an adapter's base model, which [`find_adapter`] has checked, and the arguments to load it with."""
    options = {key: value for key, value in (init_kwargs or {}).items() if key not in PLACE_OPTIONS}
    options |= {"revision": adapter.revision} if adapter.revision else {}
    return cast(str, adapter.base_model_name_or_path), options


def _find_class(name: str, init_kwargs: Arguments) -> Argument:
    """The class that the config names; `None` leaves the choice for code of a repository to TRL."""
    names = load_config(name, init_kwargs).architectures
    return getattr(transformers, names[0], None) if names else AutoModelForCausalLM
