"""Models whose parameters the processes of a run share (ZeRO-3, FSDP2): how a frozen one is shared, and made whole."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import fsdp2_prepare_model
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from trl.models import prepare_deepspeed, unwrap_model_for_generation

from spec_kd._private import list_fsdp_groups
from spec_kd.open_types import Argument, Arguments
from spec_kd.options import refuse

SPREADING = ("auto", "balanced", "balanced_low_0", "sequential")
"""Values of `device_map` that may use several devices."""


def check_fsdp(accelerator: Accelerator) -> None:
    """Raises `ValueError` for FSDP1; makes FSDP2 return losses in their own dtype.

    With bfloat16 or float16, accelerate rounds what a model returns to that dtype, and thereby the loss: a sum over
    thousands of tokens would keep three digits.

    Args:
        accelerator (`Accelerator`): That of the run, before a model is prepared.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        return
    if plugin.fsdp_version != 2:
        raise ValueError(
            "This run shards its models by FSDP1, which our losses do not support. Set `fsdp_version: 2` in the config "
            "of `accelerate launch`, or `fsdp_config={'version': 2}`."
        )
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)


def check_placement(model: PreTrainedModel | None, init_kwargs: Arguments, is_distributed: bool) -> None:
    """Raises `ValueError` for a teacher that is spread over devices in a way that this run cannot use.

    Args:
        model (`PreTrainedModel`, *optional*): The teacher, if it is loaded already.
        init_kwargs (`dict`): What it will be loaded with.
        is_distributed (`bool`): Whether several processes train.
    """
    placed = init_kwargs.get("device_map") or getattr(model, "hf_device_map", None) or {}
    is_spread = len(set(placed.values())) > 1 if isinstance(placed, dict) else placed in SPREADING
    is_sharded = model is not None and any(isinstance(parameter, DTensor) for parameter in model.parameters())
    refuse(
        (
            is_sharded or init_kwargs.get("tp_plan") is not None,
            "The teacher is sharded by `tp_plan` or `fully_shard`, whose processes need the same batch, while each "
            "process of a training has its own. Load it whole: FSDP2 and ZeRO-3 shard it.",
        ),
        (
            is_distributed and is_spread,
            f"`device_map` ({placed!s:.80}) spreads the teacher over devices, which several processes cannot share. "
            "Drop it, and train with FSDP2 or ZeRO-3, which shard the teacher; or train in one process.",
        ),
    )


def prepare_frozen(model: PreTrainedModel, accelerator: Accelerator) -> PreTrainedModel:
    """A frozen model on its device; sharded layer by layer in a run with ZeRO-3 or FSDP2.

    Args:
        model (`PreTrainedModel`): The model, in eval mode.
        accelerator (`Accelerator`): That of the run.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return prepare_deepspeed(model, accelerator)
    if accelerator.distributed_type != DistributedType.FSDP:
        return accelerator.prepare_model(model, evaluation_mode=True)
    # TRL's `prepare_fsdp` makes one group of the whole model, which each forward pass would gather at once.
    state, plugin = accelerator.state, accelerator.state.fsdp_plugin
    state.fsdp_plugin = copy.copy(plugin)
    state.fsdp_plugin.transformer_cls_names_to_wrap = None  # those of the draft, which may have another architecture
    try:
        return fsdp2_prepare_model(accelerator, model)
    finally:
        state.fsdp_plugin = plugin


@contextmanager
def whole_model(model: nn.Module, accelerator: Accelerator, **options: Argument) -> Iterator[PreTrainedModel]:
    """A prepared model with all its parameters, unwrapped and without gradient checkpointing, to generate with.

    All processes enter and leave together. Inside, each may call it as often as it likes.

    Args:
        model (`torch.nn.Module`): A prepared model.
        accelerator (`Accelerator`): What prepared it.
        options: Further arguments of [`~trl.models.unwrap_model_for_generation`].
    """
    with unwrap_model_for_generation(model, accelerator, **options) as unwrapped:
        if not isinstance(model, FSDPModule):  # it is its own wrapper
            yield unwrapped
            return
        groups = list_fsdp_groups(model)
        resharded = [group.post_forward_mesh_info for group in groups]
        with torch.no_grad():
            for group in groups:
                group.post_forward_mesh_info = None  # no pass shards them again
                group.unshard()
                group.wait_for_unshard()
        try:
            yield unwrapped
        finally:
            for group, info in zip(groups, resharded, strict=True):
                group.post_forward_mesh_info = info
                group.reshard()
