"""Gives a draft a forward that ends in the fused divergence instead of logits.

The loss has to be computed *inside* the wrapped model's forward: calling the backbone of an unwrapped model would skip
DDP's gradient synchronization and ZeRO-3's gathering silently. TRL patches `model.forward` for the same reason, and
`SFTTrainer.compute_loss` only reads named fields of the output; we patch on top of it and fill the same fields.
"""

import functools
import types
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from spec_kd._private import gather_head_parameters
from spec_kd.heads import LogitTransform, run_up_to_head
from spec_kd.losses import (
    RepeatedTargets,
    TokenLoss,
    block_linear_divergence,
    fused_linear_divergence,
    selected_linear_divergence,
)
from spec_kd.losses.selection import TokenSelection, TokenTargets
from spec_kd.open_types import Argument, Arguments
from spec_kd.parallel.layout import MaskLayout
from spec_kd.trainer.teachers.live import LiveTargets, Targets


@dataclass(frozen=True)
class DistillTargets:
    """All that the loss of a batch needs besides the draft.

    Args:
        teacher (`Targets`): The target's distribution.
        reference (`LiveTargets` or `torch.Tensor`, *optional*):
            The reference draft's distribution, or its stored scores: KL(p‖q_ref) per token, float32 `(B, T)`.
        layout (`MaskLayout`, *optional*): Where the masks of a parallel draft stand in the batch.
    """

    teacher: Targets
    reference: LiveTargets | torch.Tensor | None = None
    layout: MaskLayout | None = None


@dataclass
class DistillOutput(ModelOutput):
    """Output of a draft called with `fused_lm_head=True` and a `distill_targets`.

    `SFTTrainer.compute_loss` minimizes `-log_probs.sum() / num_tokens`, whatever `log_probs` is. Here it holds minus
    the summed divergence, so that gradient accumulation, token averaging across processes and the auxiliary loss of
    mixtures of experts stay TRL's own code.

    Args:
        log_probs (`torch.Tensor`): Minus the divergence, summed over the tokens of the loss; scalar with gradient.
        label_mask (`torch.Tensor`): Positions of the loss, bool `(B, T - 1)`.
        entropy (`torch.Tensor`): Entropy of the draft per token of the loss, `(N,)`.
        is_top1 (`torch.Tensor`): Whether the written token is the draft's most likely one, bool `(N,)`.
        alpha (`torch.Tensor`):
            sum_v min(p, q) per token of the loss, `(N,)`; of a parallel draft per scored token of the layout.
        is_kept (`torch.Tensor`): Whether the token selection kept it, bool `(N,)`.
        aux_loss (`torch.Tensor`, *optional*): Load-balancing loss of a mixture of experts.
    """

    log_probs: torch.Tensor | None = None
    label_mask: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None
    alpha: torch.Tensor | None = None
    is_kept: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None


def add_distillation_head(model: PreTrainedModel, loss: TokenLoss, vocab_size: int) -> None:
    """Patches `model.forward` so that `model(..., fused_lm_head=True, distill_targets=...)` returns a `DistillOutput`.

    Without `distill_targets` the forward does what it did before, so generation and TRL's fused head are unchanged. The
    token selection is used in training only: evaluations are over all tokens, and so comparable with each other.

    Args:
        model (`PreTrainedModel`): Draft, without its PEFT wrapper.
        loss (`TokenLoss`): What to minimize.
        vocab_size (`int`): Number of real ids.
    """
    previous_forward = model.forward
    transform = LogitTransform.from_config(model.config)

    @functools.wraps(type(model).forward)  # `generate` validates its arguments against this signature
    def forward(
        self: PreTrainedModel, *args: Argument, distill_targets: DistillTargets | None = None, **kwargs: Argument
    ) -> ModelOutput:
        if distill_targets is None:
            return previous_forward(*args, **kwargs)
        kwargs.pop("fused_lm_head", None)
        labels = kwargs.pop("labels")[:, 1:]
        # looked up at each call, since PEFT and FSDP replace it after patching
        head = cast(torch.nn.Linear, self.get_output_embeddings())
        hidden, outputs = run_up_to_head(previous_forward, head, **kwargs)
        used_loss = loss if self.training else replace(loss, selection=None)
        output = _compute_output(
            head, hidden, labels, kwargs.get("position_ids"), distill_targets, used_loss, transform, vocab_size
        )
        output.aux_loss = getattr(outputs, "aux_loss", None)
        return output

    model.forward = types.MethodType(forward, model)


# Not compiled by `torch_compile`: its chunks follow the number of tokens, its tiles are compiled on a GPU anyway, and
# Dynamo cannot make the sparse targets of a stored signal.
@torch.compiler.disable
def _compute_output(
    head: torch.nn.Linear,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    position_ids: torch.Tensor | None,
    distilled: DistillTargets,
    loss: TokenLoss,
    transform: LogitTransform,
    vocab_size: int,
) -> DistillOutput:
    """The loss of a batch from the draft's hidden states `(B, T, H)` and the labels after them, `(B, T - 1)`."""
    weight, bias = cast(torch.nn.Parameter, head.weight), cast(torch.nn.Parameter, getattr(head, "bias", None))
    if isinstance(weight, DTensor):
        raise ValueError(
            "The draft's head is sharded while its loss is computed. Let accelerate shard the draft (FSDP2), and not "
            "`fully_shard` or `tp_plan` before the trainer gets it."
        )
    mask, layout = labels != -100, distilled.layout  # (B, T - 1)
    hidden = hidden[:, :-1][mask] if layout is None else hidden.flatten(0, 1)[layout.slots]
    hidden, mask_there = hidden.to(weight.device), mask.to(weight.device)  # (N, H)
    tokens = labels[mask].to(weight.device)  # (N,)
    frozen = list(distilled.teacher.head_parameters)
    if isinstance(distilled.reference, LiveTargets):
        frozen += distilled.reference.head_parameters
    with gather_head_parameters(weight, bias), gather_head_parameters(*frozen):
        targets = distilled.teacher.select(mask_there)
        options = {
            "bias": bias,
            "logit_scale": transform.scale,
            "softcap": transform.softcap,
            "vocab_size": vocab_size,
        }
        if layout is not None:
            return _compute_blocks(hidden, weight, targets, tokens, mask, distilled, loss, layout, options)
        result, is_kept = selected_linear_divergence(
            hidden,
            weight,
            targets,
            tokens,
            loss,
            sequence=_number_sequences(labels, position_ids)[mask].to(weight.device),
            reference=_compute_reference(distilled.reference, mask_there, targets, tokens, loss),
            **options,
        )
    return DistillOutput(
        log_probs=-result.loss,
        label_mask=mask,
        entropy=result.entropy,
        is_top1=result.is_top1,
        alpha=result.alpha,
        is_kept=is_kept,
    )


def _compute_blocks(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: TokenTargets,
    tokens: torch.Tensor,
    mask: torch.Tensor,
    distilled: DistillTargets,
    loss: TokenLoss,
    layout: MaskLayout,
    options: Arguments,
) -> DistillOutput:
    """The loss of a parallel draft: TRL's metrics are of the first drafted tokens, which are the tokens of the loss."""
    scored, confidence = layout.scored.to(weight.device), None
    if loss.weighting is not None and loss.weighting.score == "confidence":
        log_p = distilled.teacher.compute_token_log_p(mask.to(weight.device), tokens, loss.temperature)
        confidence = log_p.exp()[scored]
    result = block_linear_divergence(
        hidden, weight, RepeatedTargets(targets, scored), tokens[scored], loss, layout.blocks, confidence=confidence,
        **options,
    )  # fmt: skip
    is_first = layout.blocks.position == 0
    return DistillOutput(
        log_probs=-result.loss,
        label_mask=mask,
        entropy=result.entropy[is_first],
        is_top1=result.is_top1[is_first],
        alpha=result.alpha,
        is_kept=torch.ones_like(tokens, dtype=torch.bool),
    )


def _number_sequences(labels: torch.Tensor, position_ids: torch.Tensor | None) -> torch.Tensor:
    """Which sequence each position predicts for, `(B, T - 1)`: a row, or what starts at position 0 in a packed one."""
    if position_ids is None:
        return torch.arange(len(labels), device=labels.device)[:, None].expand_as(labels)
    is_start = position_ids == 0  # (B, T)
    return is_start.flatten().cumsum(0).view_as(position_ids)[:, 1:].to(labels.device)


@torch.no_grad()
def _compute_reference(
    reference: LiveTargets | torch.Tensor | None,
    mask: torch.Tensor,
    targets: TokenTargets,
    tokens: torch.Tensor,
    loss: TokenLoss,
) -> torch.Tensor | None:
    """KL(p‖q_ref) per token of the loss, `(N,)`, from a live reference draft or from its column."""
    selection: TokenSelection | None = loss.selection
    if selection is None or not selection.needs_reference:
        return None
    if not isinstance(reference, LiveTargets):
        return None if reference is None else reference[:, 1:].to(mask.device)[mask]
    head = reference.head
    module = cast(torch.nn.Linear, head.module)
    return fused_linear_divergence(
        reference.hidden[:, :-1].to(mask.device)[mask],
        module.weight.to(mask.device),
        targets,
        tokens,
        divergence=selection.score,
        bias=None if (bias := getattr(module, "bias", None)) is None else bias.to(mask.device),
        temperature=loss.temperature,
        logit_scale=head.transform.scale,
        softcap=head.transform.softcap,
        vocab_size=head.vocab_size,
    ).divergence
