"""Training of parallel drafts: a base class of the trainers, which appends masks to the batches of the draft.

TRL's trainer, and a live target, see the batch as it is: budgets, metrics and the number of tokens that the loss is
divided by are those of the text. The masks are appended in the call of the draft alone.
"""

from typing import cast

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from datasets import Dataset
from peft.utils.other import TrainableTokensWrapper
from transformers import PreTrainedModel
from trl import SFTTrainer

from spec_kd.data.token_columns import find_row_with_id
from spec_kd.heads import unwrap_peft
from spec_kd.losses import BlockWeighting
from spec_kd.open_types import Arguments
from spec_kd.options import refuse
from spec_kd.parallel import ParallelDrafting, find_mask_token, read_parallel_drafting, write_parallel_drafting
from spec_kd.parallel.attention import build_attention, check_masks
from spec_kd.parallel.layout import MaskLayout, build_layout
from spec_kd.trainer.configs import DraftConfig
from spec_kd.vocabulary import ProcessingClass, check_head_covers

logger = get_logger(__name__)

REPLACED = ("attention_mask", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""Inputs that say which tokens of a batch see which, in place of which the masks have their own."""


class ParallelTraining(SFTTrainer):
    """A base class of a trainer: with `num_parallel_tokens`, the draft learns to draft several tokens in one pass.

    Attributes:
        parallel ([`ParallelDrafting`], *optional*): Mask token and tokens of a pass; `None` for other drafts.
    """

    args: DraftConfig
    model: PreTrainedModel
    processing_class: ProcessingClass
    parallel: ParallelDrafting | None = None
    _weighting: BlockWeighting

    def _prepare_parallel(self) -> None:
        """Chooses the mask token, checks that draft and data fit it, and writes both into the draft's config."""
        args, model = self.args, unwrap_peft(self.model)
        known = read_parallel_drafting(model.config)
        if args.num_parallel_tokens is None:
            if known is not None:
                raise ValueError(
                    f"The draft drafts {known.num_tokens} tokens in a pass, which training without masks would undo. "
                    f"Set `num_parallel_tokens={known.num_tokens}`."
                )
            return
        is_adapter = is_peft_model(self.model)
        refuse(
            (
                self.compute_loss_func is not None or args.label_smoothing_factor or args.loss_type != "nll",
                "`num_parallel_tokens` has a loss of its own for each position. Leave out `compute_loss_func`, "
                "`label_smoothing_factor` and `loss_type`.",
            ),
            (
                self.aux_loss_enabled,
                "The load-balancing loss of a mixture of experts cannot be computed with `num_parallel_tokens`. Set "
                "`router_aux_loss_coef` of the draft's config to 0, and `output_router_logits` to False.",
            ),
            (
                is_adapter and not args.merge_adapter,
                "A saved LoRA adapter does not say that the draft drafts in parallel. Set `merge_adapter=True`.",
            ),
            (
                isinstance(model.get_output_embeddings(), TrainableTokensWrapper),
                "The loss reads the frozen head, which is tied to the embedding of `trainable_token_indices`. Leave "
                "the option out, or train all weights.",
            ),
        )
        own = None if known is None else known.mask_token_id
        mask = find_mask_token(self.processing_class, args.parallel_mask_token or own)
        check_head_covers(model, mask + 1, "draft")
        check_masks(model, mask, args.max_length)
        sets = {"training": self.train_dataset}
        sets |= self.eval_dataset if isinstance(self.eval_dataset, dict) else {"evaluation": self.eval_dataset}
        for name, dataset in sets.items():
            if isinstance(dataset, Dataset) and (row := find_row_with_id(dataset, mask)) is not None:
                self._refuse_text(mask, f"Row {row} of the {name} dataset")
        self.parallel = ParallelDrafting(mask, args.num_parallel_tokens)
        write_parallel_drafting(model.config, self.parallel)
        self._weighting = cast(BlockWeighting, args.build_weighting())
        if not any(parameter.requires_grad for parameter in model.get_input_embeddings().parameters()):
            logger.warning(
                f"The embedding of the mask token ({mask}) is frozen, so the draft learns to draft in parallel with "
                "the vector that it has. Train all weights, or, where the head is not tied to the embedding, set "
                f'`trainable_token_indices={{"embed_tokens": [{mask}]}}` in `LoraConfig`.'
            )

    def _refuse_text(self, mask: int, where: str) -> None:
        token = self.processing_class.decode([mask])
        raise ValueError(
            f"{where} has the mask token {token!r} ({mask}), which stands for tokens that are not known yet. Set "
            "`parallel_mask_token` to a token that the target never reads or writes."
        )

    def _build_layout(self, inputs: Arguments) -> MaskLayout | None:
        """Where the masks of a batch stand; `None` for a draft without masks. Evaluations always choose the same."""
        if self.parallel is None:
            return None
        ids = inputs["input_ids"]
        if (ids == self.parallel.mask_token_id).any():
            self._refuse_text(self.parallel.mask_token_id, "A batch")
        generator = None if self.model.training else torch.Generator(ids.device).manual_seed(0)
        return build_layout(
            inputs["labels"],
            self.args.parallel_shares,
            attention_mask=inputs.get("attention_mask"),
            position_ids=inputs.get("position_ids"),
            generator=generator,
        )

    def _append_masks(self, inputs: Arguments, layout: MaskLayout | None) -> Arguments:
        """Arguments of the draft's call with the masks of a layout appended, or as they are."""
        if layout is None or self.parallel is None:
            return inputs
        return {name: value for name, value in inputs.items() if name not in REPLACED} | {
            "input_ids": layout.append_masks(inputs["input_ids"], self.parallel.mask_token_id),
            "attention_mask": build_attention(layout, unwrap_peft(self.accelerator.unwrap_model(self.model))),
            "position_ids": layout.positions,
        }

    def _log_token_mean(self, name: str, values: torch.Tensor) -> None:
        """Mean over the tokens of all processes; a step without any is left out."""
        total, count = (
            self.accelerator.gather_for_metrics(value).sum()
            for value in (values.sum(), values.new_tensor(values.numel()))
        )
        if count > 0:
            self._metrics["train" if self.model.training else "eval"][name].append((total / count).item())

    def _log_positions(self, name: str, values: torch.Tensor, layout: MaskLayout, first: int = 1) -> None:
        """Means of a metric over the scored tokens of a batch: under its name for drafted token 1, `name_k` for k."""
        position = layout.blocks.position.to(values.device)
        for k in range(first, layout.blocks.num_tokens + 1):
            self._log_token_mean(f"{name}_{k}" if k > 1 else name, values[position == k - 1])
