"""SGLang: a standalone draft under `--speculative-algorithm STANDALONE`."""

from spec_kd.counting import Counting
from spec_kd.escaping import quote_argument
from spec_kd.serving.engine import DraftingRule, ServingEngine


def write_command(draft: str, target: str, num_draft_tokens: int) -> str:
    """The command that starts SGLang with a draft model."""
    # A chain of drafted tokens: top-k 1, and the token that starts the round counts as one more
    return (
        f"python -m sglang.launch_server --model-path {quote_argument(target)} --speculative-algorithm STANDALONE "
        f"--speculative-draft-model-path {quote_argument(draft)} --speculative-num-steps {num_draft_tokens} "
        f"--speculative-eagle-topk 1 --speculative-num-draft-tokens {num_draft_tokens + 1}"
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
)
