"""Every private function of another library that we lean on, imported here and nowhere else.

`tests/test_private.py` fails loudly when one of them moves.
"""

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

from torch import nn
from torch._C._autograd import _get_current_graph_task_keep_graph as is_graph_retained
from torch.distributed.fsdp import FSDPModule
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.integrations import deepspeed as hf_deepspeed
from trl.trainer.utils import create_model_from_path, disable_dropout_in_model, get_config_model_id
from trl.trainer.utils import maybe_gather_lm_head_ctx as gather_head_parameters

if TYPE_CHECKING:
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

__all__ = [
    "create_model_from_path",
    "disable_dropout_in_model",
    "gather_head_parameters",
    "get_attention_implementation",
    "get_config_model_id",
    "is_graph_retained",
    "is_stateful",
    "list_fsdp_groups",
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


def list_fsdp_groups(model: nn.Module) -> "list[FSDPParamGroup]":
    """The groups of parameters that FSDP2 gathers together; `model` is their root, also if no pass has been made."""
    cast(FSDPModule, model)._get_fsdp_state()._lazy_init()
    states = [module._get_fsdp_state() for module in model.modules() if isinstance(module, FSDPModule)]
    groups = [state._fsdp_param_group for state in dict.fromkeys(states)]  # modules of a group share its state
    return [group for group in groups if group is not None]


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
