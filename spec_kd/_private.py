"""Every private function of another library that we lean on, imported here and nowhere else.

`tests/test_private.py` fails loudly when one of them moves.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch._C._autograd import _get_current_graph_task_keep_graph as is_graph_retained
from transformers.integrations import deepspeed as hf_deepspeed
from trl.trainer.utils import create_model_from_path, get_config_model_id
from trl.trainer.utils import maybe_gather_lm_head_ctx as gather_head_parameters

__all__ = [
    "create_model_from_path",
    "gather_head_parameters",
    "get_config_model_id",
    "is_graph_retained",
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
