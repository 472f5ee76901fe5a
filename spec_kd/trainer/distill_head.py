"""Gives a draft a forward that ends in the fused divergence instead of logits.

The loss has to be computed *inside* the wrapped model's forward: calling the backbone of an unwrapped model would skip
DDP's gradient synchronisation and ZeRO-3's gathering without a word. TRL patches `model.forward` for the same reason,
and `SFTTrainer.compute_loss` only reads named fields of what comes back; we patch on top and fill the same fields.
"""

import functools
import types
from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from spec_kd._private import gather_head_parameters
from spec_kd.heads import LogitTransform, run_backbone
from spec_kd.losses import Divergence, fused_linear_divergence
from spec_kd.trainer.teacher import TeacherSignal


@dataclass
class DistillOutput(ModelOutput):
    """Output of a draft called with `fused_lm_head=True` and a `teacher_signal`.

    `SFTTrainer.compute_loss` minimises `-log_probs.sum() / num_tokens`, whatever `log_probs` is. Here it holds minus
    the summed divergence, so that gradient accumulation, token averaging across processes and the auxiliary loss of
    mixtures of experts stay TRL's own code.

    Args:
        log_probs (`torch.Tensor`): Minus the divergence, summed over the tokens of the loss; scalar with gradient.
        label_mask (`torch.Tensor`): Positions of the loss, bool `(B, T - 1)`.
        entropy (`torch.Tensor`): Entropy of the draft per token of the loss, `(N,)`.
        is_top1 (`torch.Tensor`): Whether the written token is the draft's most likely one, bool `(N,)`.
        alpha (`torch.Tensor`): sum_v min(p, q) per token of the loss, `(N,)`.
        aux_loss (`torch.Tensor`, *optional*): Load-balancing loss of a mixture of experts.
    """

    log_probs: torch.Tensor | None = None
    label_mask: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None
    alpha: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None


def check_trainable_head(model: PreTrainedModel) -> None:
    """Raises `ValueError` unless gradients can go through the head of `model`: a matrix of floating-point numbers."""
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if weight is None or not weight.is_floating_point():
        kind = "no weight" if weight is None else f"weights of dtype {weight.dtype}"
        raise ValueError(
            f"The draft's head ({type(head).__name__}) has {kind}, so the divergence cannot be trained through it. "
            "Load the draft with its head in full precision (bitsandbytes does so by default)."
        )


def add_distillation_head(model: PreTrainedModel, divergence: Divergence, temperature: float, vocab_size: int) -> None:
    """Patches `model.forward` so that `model(..., fused_lm_head=True, teacher_signal=...)` returns a `DistillOutput`.

    Without a `teacher_signal` the forward is the one it was, so generation and TRL's fused head are unchanged.

    Args:
        model (`PreTrainedModel`): Draft, without its PEFT wrapper.
        divergence (`Divergence`): What to minimise.
        temperature (`float`): Loss temperature.
        vocab_size (`int`): Number of real ids.
    """
    previous_forward = model.forward
    transform = LogitTransform.from_config(model.config)

    @functools.wraps(type(model).forward)  # `generate` validates its arguments against this signature
    def forward(self, *args, teacher_signal: TeacherSignal | None = None, **kwargs):
        if teacher_signal is None:
            return previous_forward(*args, **kwargs)
        kwargs.pop("fused_lm_head", None)
        labels = kwargs.pop("labels")[:, 1:]
        hidden, outputs = run_backbone(previous_forward, self.base_model, **kwargs)
        head = self.get_output_embeddings()  # looked up at each call: PEFT and FSDP replace it after patching
        weight, bias = head.weight, head.bias
        if isinstance(weight, DTensor):  # FSDP2 shards parameters as DTensors
            weight, bias = weight.full_tensor(), None if bias is None else bias.full_tensor()
        mask = labels != -100  # (B, T - 1)
        hidden = hidden[:, :-1][mask]  # (N, H)
        with (
            gather_head_parameters(weight, bias),
            gather_head_parameters(*teacher_signal.head.module.parameters()),
        ):
            result = fused_linear_divergence(
                hidden.to(weight.device),
                weight,
                teacher_signal.select(mask.to(weight.device)),
                labels[mask].to(weight.device),
                divergence=divergence,
                bias=bias,
                temperature=temperature,
                logit_scale=transform.scale,
                softcap=transform.softcap,
                vocab_size=vocab_size,
            )
        return DistillOutput(
            log_probs=-result.loss,
            label_mask=mask,
            entropy=result.entropy,
            is_top1=result.is_top1,
            alpha=result.alpha,
            aux_loss=getattr(outputs, "aux_loss", None),
        )

    model.forward = types.MethodType(forward, model)
