"""Responses that say little of what a draft does in use: looping completions, and prompts without the chat template."""

from collections.abc import Sequence

import numpy as np

from spec_kd.end_of_turn import find_template_marks
from spec_kd.evaluation.looping import find_loop
from spec_kd.open_types import Array
from spec_kd.vocabulary import ProcessingClass, get_tokenizer

LOOPING, UNTEMPLATED, EITHER = "looping", "untemplated", "looping_or_untemplated"


def find_kinds(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    processing_class: ProcessingClass | None = None,
) -> dict[str, Array]:
    """Which of P responses are of a kind that metrics are also given without.

    A completion is looping if [`find_loop`] finds a loop in it. A prompt is untemplated if the tokenizer has a chat
    template, and the prompt has none of what the template writes around every message. A third kind is a response that
    is one or the other, if there are both.

    Args:
        prompts (`Sequence[Sequence[int]]`): Ids of each prompt.
        completions (`Sequence[Sequence[int]]`): Ids of each completion, which the target wrote without a draft.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*):
            The target's. Without it, or without a chat template, nothing is said of the prompts.

    Returns:
        `dict[str, np.ndarray]`: Bool `(P,)` by `"looping"`, `"untemplated"` and `"looping_or_untemplated"`.
    """
    kinds = {LOOPING: np.array([find_loop(ids) is not None for ids in completions], dtype=bool)}
    if processing_class is not None and (marks := find_template_marks(processing_class)):
        decode = get_tokenizer(processing_class).decode
        texts = (str(decode(list(ids), skip_special_tokens=False)) for ids in prompts)
        kinds[UNTEMPLATED] = np.array([not any(mark in text for mark in marks) for text in texts], dtype=bool)
        if all(mask.any() for mask in kinds.values()):
            kinds[EITHER] = kinds[LOOPING] | kinds[UNTEMPLATED]
    return kinds
