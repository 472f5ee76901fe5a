"""Training on what the target wrote, without its distribution."""

import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from spec_kd.open_types import Argument, JsonObject
from spec_kd.probes import check_fused_log_probs
from spec_kd.trainer.arguments import LossResult
from spec_kd.trainer.configs import BlackBoxSFTConfig
from spec_kd.trainer.draft_trainer import DraftTrainer


class BlackBoxSFTTrainer(DraftTrainer):
    """Black-box distillation: supervised fine-tuning of a draft on what the target wrote.

    This is the sequence-level distillation of Kim and Rush (2016, arXiv 1606.07947), which does not need the target's
    probabilities. The signature is that of [`~trl.SFTTrainer`], whose documentation describes the arguments that are
    not listed here. The loss is on the completion alone. Draft and target may have different tokenizers.

    Args:
        model (`str` or `PreTrainedModel`): The draft.
        args ([`BlackBoxSFTConfig`], *optional*): Configuration; an `SFTConfig` is converted.
        train_dataset (`Dataset` or `IterableDataset`):
            Responses of the target: `prompt` + `completion` (conversational or plain, with `tools` and
            `chat_template_kwargs`), or `prompt_ids` + `completion_ids`, as `spec_kd.generate_responses` returns them.

    Example:

    ```python
    from spec_kd import BlackBoxSFTTrainer, generate_responses

    responses = generate_responses("my-org/target", prompts)
    trainer = BlackBoxSFTTrainer(model="my-org/draft", train_dataset=responses)
    trainer.train()
    ```
    """

    _name = "BlackBoxSFT"
    _config_class = BlackBoxSFTConfig
    _method = "black-box (sequence-level) distillation"
    _tag_names = (*DraftTrainer._tag_names, "black-box-distillation")

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: JsonObject,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> LossResult:
        """As `SFTTrainer.compute_loss`; of a parallel draft, over all positions of its blocks."""
        layout = self._build_layout(inputs)
        if layout is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

        def forward(**kwargs: Argument) -> ModelOutput:
            if not kwargs.get("fused_lm_head"):
                return model(**kwargs)
            labels = kwargs.pop("labels")[:, 1:]  # (B, T - 1)
            is_scored = labels != -100
            kwargs = self._append_masks(kwargs, layout)
            shifted = torch.full_like(kwargs["input_ids"], -100).flatten()
            shifted[layout.slots] = labels[is_scored][layout.scored]
            outputs = model(**kwargs, shift_labels=shifted.view_as(kwargs["input_ids"]))
            log_q = outputs.log_probs.flatten()[layout.slots]  # (N,)
            weights = self._weighting.weigh(layout.blocks, log_q.detach().exp())
            is_top1 = outputs.is_top1.flatten()[layout.slots].float()
            self._log_positions("mean_token_accuracy", is_top1, layout, first=2)  # TRL logs that of the first
            # TRL sums minus `log_probs`, and its metrics are those of the tokens of the text
            outputs.log_probs, outputs.label_mask = (log_q * weights).sum(), is_scored
            for name in ("entropy", "is_top1"):
                setattr(outputs, name, getattr(outputs, name)[:, : labels.shape[1]])
            return outputs

        return super().compute_loss(forward, inputs, return_outputs, num_items_in_batch)

    def _check_reading(self, model: PreTrainedModel, role: str) -> None:
        super()._check_reading(model, role)
        check_fused_log_probs(model, role)
