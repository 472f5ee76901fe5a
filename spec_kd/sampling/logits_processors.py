"""Sampling as a deployment has it: temperature, top-k and top-p, in transformers' order and by its own processors."""

from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper


def build_warpers(temperature: float, top_k: int = 0, top_p: float = 1.0) -> LogitsProcessorList:
    """What turns logits `(N, V)` into those that are sampled from; nothing where the text is greedy.

    None of them looks at the text before (`input_ids` may be `None`), so they serve a whole text in one pass. Penalties
    for repetition do look, and are left out.

    Args:
        temperature (`float`): 0.0 for greedy.
        top_k (`int`, *optional*, defaults to `0`): Most likely ids to sample from; 0 for all.
        top_p (`float`, *optional*, defaults to `1.0`): Mass of the most likely ids to sample from.
    """
    warpers = LogitsProcessorList()
    if temperature == 0:
        return warpers
    if temperature != 1:
        warpers.append(TemperatureLogitsWarper(float(temperature)))
    if top_k > 0:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    return warpers
