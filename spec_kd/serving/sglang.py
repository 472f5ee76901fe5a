"""SGLang: a standalone draft under `--speculative-algorithm STANDALONE`."""

from spec_kd.counting import Counting
from spec_kd.escaping import quote_argument
from spec_kd.serving.engine import DraftingRule, ServingEngine
from spec_kd.serving.pair import PairCheck
from spec_kd.serving.rules import (
    COMMON_CHECKS,
    OTHER_SPECIAL_TOKENS,
    find_different_tokens,
    find_recurrent_draft,
    find_sampling_defaults,
    find_short_draft,
    find_unequal_rows,
    find_unsplittable_heads,
    refuse_defaults,
)


def write_command(draft: str, target: str, num_draft_tokens: int) -> str:
    """The command that starts SGLang with a draft model."""
    # A chain of drafted tokens: top-k 1, and the token that starts the round counts as one more
    return (
        f"python -m sglang.launch_server --model-path {quote_argument(target)} --speculative-algorithm STANDALONE "
        f"--speculative-draft-model-path {quote_argument(draft)} --speculative-num-steps {num_draft_tokens} "
        f"--speculative-eagle-topk 1 --speculative-num-draft-tokens {num_draft_tokens + 1}"
    )


CHECKS = (
    *COMMON_CHECKS,
    # `_validate_vocab_compatibility` in speculative/standalone_worker_v2.py
    PairCheck(
        find_unequal_rows,
        "refuses",
        'SGLang stops with "STANDALONE speculative decoding requires the draft model to share the same vocabulary".',
    ),
    PairCheck(
        find_different_tokens, "refuses", 'SGLang stops with "the two tokenizers have different token-to-id mappings".'
    ),
    OTHER_SPECIAL_TOKENS,
    # `_derive_context_length` in configs/model_config.py: the draft gets the target's context length
    PairCheck(
        find_short_draft,
        "refuses",
        'SGLang stops with "Target model\'s context_length is greater than the derived context_length", unless '
        "`--context-length` is smaller.",
    ),
    # `commit_mamba_states_after_verify` is called for the target alone
    PairCheck(
        find_recurrent_draft, "drafts less", "SGLang rolls back the target's recurrent state, and not the draft's."
    ),
    PairCheck(
        find_unsplittable_heads, "refuses", "The draft is split as the target is, and SGLang stops where it cannot be."
    ),
    PairCheck(
        refuse_defaults("repetition_penalty"),
        "drafts less",
        "SGLang penalizes the target's logits by default, and not the draft's.",
    ),
    PairCheck(
        find_sampling_defaults,
        "drafts less",
        "SGLang samples like that by default, and then accepts the draft's most likely token with the target's "
        "probability for it.",
    ),
)

SGLANG = ServingEngine(
    name="sglang",
    title="SGLang",
    rules=(DraftingRule("greedy"),),
    counting=Counting(first_round=1, reserved_tokens=None, counts_drafted_past_end=True),
    source="SGLang 0.5.23, STANDALONE with top-k 1; issue 10308 of sgl-project/sglang",
    is_observed=False,
    vocabulary="`vocab_size` and `get_vocab()` of draft and target must be equal",
    length="the draft is loaded with the target's context length, which its `max_position_embeddings` must allow",
    counters="`meta_info.spec_*` of each response",
    figures={
        "drafting_rounds": "spec_verify_ct",
        "drafted": "spec_draft_token_num",
        "accepted": "spec_accept_token_num",
    },
    default_num_draft_tokens=3,
    command_language="bash",
    write_command=write_command,
    checks=CHECKS,
)
