"""What is checked of models and prompts before anything is written or read, here and in `evaluation/`."""

from collections.abc import Sequence

from transformers import PreTrainedModel

from spec_kd.heads import check_is_causal_lm, count_rows, unwrap_peft
from spec_kd.vocabulary import check_head_covers


def find_causal_lm(model: PreTrainedModel, role: str) -> PreTrainedModel:
    """The transformers model itself, adapters active; raises `ValueError` for prompt-learning adapters."""
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError(
            f"The {role} has a prompt-learning adapter: its virtual tokens exist in no server. Use LoRA instead."
        )
    check_is_causal_lm(model, role)
    return unwrap_peft(model)


def resolve_vocab_size(vocab_size: int | None, draft: PreTrainedModel, target: PreTrainedModel | None) -> int:
    """`vocab_size`, or the rows that both heads have; raises `VocabularyMismatchError` if a head has fewer."""
    models = {"draft": draft} | ({} if target is None else {"target": target})
    if vocab_size is None:
        return min(count_rows(model.get_output_embeddings()) for model in models.values())
    for role, model in models.items():
        check_head_covers(model, vocab_size, role)
    return vocab_size


def check_prompts(prompt_ids: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Raises `ValueError` if there is no prompt, or one that is empty or has an id that is not shared."""
    if not prompt_ids:
        raise ValueError("There are no prompts. Pass the ids of at least one.")
    for i, ids in enumerate(prompt_ids):
        if not ids:
            raise ValueError(f"Prompt {i} has no tokens: the target needs at least one to start from.")
        if max(ids) >= vocab_size:
            raise ValueError(
                f"Prompt {i} contains id {max(ids)}, but draft and target share only ids below {vocab_size}. It is of "
                "another tokenizer, or `vocab_size` is too small."
            )
