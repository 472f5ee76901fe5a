"""What replay and assisted generation do with the two models before they use them."""

from torch import nn
from transformers import PreTrainedModel

from spec_kd.heads import unwrap_peft
from spec_kd.vocabulary import check_head_covers, count_rows


def find_causal_lm(model: nn.Module, role: str) -> PreTrainedModel:
    """The transformers model itself, adapters active; raises `ValueError` for prompt-learning adapters."""
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError(
            f"The {role} has a prompt-learning adapter: its virtual tokens exist in no server. Use LoRA instead."
        )
    return unwrap_peft(model)


def resolve_vocab_size(vocab_size: int | None, draft: PreTrainedModel, target: PreTrainedModel | None) -> int:
    """`vocab_size`, or the rows that both heads have; raises `VocabularyMismatchError` if a head has fewer."""
    models = {"draft": draft} | ({} if target is None else {"target": target})
    if vocab_size is None:
        return min(count_rows(model.get_output_embeddings()) for model in models.values())
    for role, model in models.items():
        check_head_covers(model, vocab_size, role)
    return vocab_size
