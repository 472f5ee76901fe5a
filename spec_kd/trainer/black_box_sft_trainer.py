"""Training on what the target wrote, without its distribution."""

from transformers import PreTrainedModel

from spec_kd.probes import check_fused_log_probs
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

    def _check_reading(self, model: PreTrainedModel, role: str) -> None:
        super()._check_reading(model, role)
        check_fused_log_probs(model, role)
