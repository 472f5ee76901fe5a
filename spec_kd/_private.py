"""Every private function of another library that we lean on, imported here and nowhere else.

`tests/test_private.py` fails loudly when one of them moves.
"""

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager

from torch._C._autograd import _get_current_graph_task_keep_graph as is_graph_retained
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.integrations import deepspeed as hf_deepspeed
from trl.trainer.utils import create_model_from_path, disable_dropout_in_model, get_config_model_id
from trl.trainer.utils import maybe_gather_lm_head_ctx as gather_head_parameters

__all__ = [
    "create_model_from_path",
    "disable_dropout_in_model",
    "gather_head_parameters",
    "get_attention_implementation",
    "get_config_model_id",
    "is_graph_retained",
    "is_stateful",
    "list_loading_options",
    "suspend_zero3_init",
]


@contextmanager
def suspend_zero3_init() -> Iterator[None]:
    """Lets one process load a model whole while ZeRO-3 is on; without it `from_pretrained` waits for the others."""
    reference = hf_deepspeed._hf_deepspeed_config_weak_ref
    config = reference() if reference is not None else None
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            hf_deepspeed.set_hf_deepspeed_config(config)


def list_loading_options() -> set[str]:
    """Names that `from_pretrained` takes from its keyword arguments, as its source has them; it lists them nowhere."""
    names: set[str] = set()
    for function in (AutoModelForCausalLM.from_pretrained, PreTrainedModel.from_pretrained):
        source = inspect.getsource(function)
        names |= set(inspect.signature(function).parameters)
        names |= set(re.findall(r"""kwargs\.(?:pop|get)\(\s*["'](\w+)["']""", source))
        names |= set(re.findall(r"""["'](\w+)["'] in kwargs""", source))
    return {name for name in names if not name.startswith("_")} - {"kwargs", "model_args"}


def get_attention_implementation(config: PreTrainedConfig) -> str | None:
    """Name of the attention that a model was loaded with: `"sdpa"`, `"eager"`, `"flex_attention"` and others."""
    return config._attn_implementation


def is_stateful(config: PreTrainedConfig) -> bool:
    """Whether the causal model of a configuration has a state that `generate` cannot cut back to fewer tokens."""
    try:
        kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config.get_text_config())]
        return getattr(kind, "_is_stateful")  # noqa: B009  # the mapping has types of pairs as well
    except KeyError:  # code of a repository, or no causal model
        return False
