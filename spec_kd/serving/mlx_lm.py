"""MLX-LM: `mlx_lm.server` and `mlx_lm.generate` with `--draft-model`."""

from collections.abc import Iterator, Sequence

from spec_kd.counting import Counting
from spec_kd.serving.engine import DraftingRule, ServingEngine, StructuredOutput, write_flags
from spec_kd.serving.pair import PairCheck, Problem, ServedPair
from spec_kd.serving.rules import (
    BEYOND_TRAINING,
    COMMON_CHECKS,
    NO_PARALLEL_DRAFT,
    OTHER_SPECIAL_TOKENS,
    OTHER_TEXT,
    SHARE_TOKENIZER,
    find_recurrent_draft,
    find_recurrent_target,
    find_short_window_draft,
    find_short_window_target,
    find_wide_draft,
    refuse_quantization,
)


def write_command(draft: str, target: str, num_draft_tokens: int, flags: Sequence[str] = ()) -> str:
    """The command that starts MLX-LM's server with a draft model."""
    own = write_flags({"--model": target, "--draft-model": draft, "--num-draft-tokens": num_draft_tokens})
    return " ".join(["mlx_lm.server", own, *flags])


# Of mlx_lm/utils.py: methods whose weights are converted; others do not fit the layers
QUANTIZATIONS = ("bitnet", "mxfp4", "compressed-tensors", "awq", "gptq")


def find_other_vocabulary_size(pair: ServedPair) -> Iterator[Problem]:
    """The tokenizers have another number of tokens, without added ones."""
    draft, target = (model.tokenizer.vocab_size for model in pair.models)
    if draft != target:
        yield f"The draft's tokenizer has {draft} tokens before added ones, the target's {target}.", SHARE_TOKENIZER


CHECKS = (
    *COMMON_CHECKS,
    NO_PARALLEL_DRAFT,
    PairCheck(
        find_other_vocabulary_size,
        "refuses",
        'mlx_lm.generate stops with "Draft model tokenizer does not match model tokenizer"; mlx_lm.server only warns.',
    ),
    OTHER_TEXT,
    OTHER_SPECIAL_TOKENS,
    BEYOND_TRAINING,
    # `speculative_generate_step` asks whether the target's cache can be trimmed, once and before the first token, and
    # `trim_prompt_cache` does nothing where one cannot be; issues 1914 and 1446 and pull request 1427 of mlx-lm
    PairCheck(
        find_recurrent_target, "refuses", 'MLX-LM stops with "Speculative decoding requires a trimmable prompt cache".'
    ),
    PairCheck(find_recurrent_draft, "drafts less", "The draft's cache is not trimmed, and keeps rejected tokens."),
    PairCheck(
        find_short_window_target,
        "corrupts",
        "Once a sequence is longer than the window, rejected tokens stay in the target's cache, and the text that "
        "follows is another one.",
    ),
    PairCheck(
        find_short_window_draft,
        "drafts less",
        "Once a sequence is longer than the window, rejected tokens stay in the draft's cache.",
    ),
    PairCheck(find_wide_draft, "slower", "The draft reads twice the bytes in each step."),
    PairCheck(
        refuse_quantization(QUANTIZATIONS), "refuses", "MLX-LM does not know the method, and the weights do not fit."
    ),
)

MLX_LM = ServingEngine(
    name="mlx-lm",
    title="MLX-LM",
    rules=(DraftingRule("matching"),),
    counting=Counting(reserved_tokens=0),
    source="`speculative_generate_step` in mlx_lm/generate.py of MLX-LM 0.32.0",
    is_observed=False,
    vocabulary="`vocab_size` of both tokenizers must be equal; caches must be trimmable, which hybrid models' are not",
    length="both models are run past `max_position_embeddings` without a word",
    counters="`from_draft` of each token that `stream_generate` yields; the server does not show it",
    figures={"accepted": "tokens with `from_draft`"},
    default_num_draft_tokens=3,
    command_language="bash",
    write_command=write_command,
    checks=CHECKS,
    structured_output=StructuredOutput(
        "`speculative_generate_step` in mlx_lm/generate.py of MLX-LM 0.32.0, which gives the caller's "
        "`logits_processors` to both models; the server takes no schema",
        masks_draft=True,
    ),
)
