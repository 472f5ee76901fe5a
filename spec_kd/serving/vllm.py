"""vLLM: a standalone draft under `"method": "draft_model"`."""

import json
import shlex

from spec_kd.counting import Counting
from spec_kd.escaping import quote_argument
from spec_kd.serving.engine import DraftingRule, ServingEngine
from spec_kd.serving.lookup import VLLM_NGRAM


def write_command(draft: str, target: str, num_draft_tokens: int) -> str:
    """The command that starts `vllm serve` with a draft model."""
    options = {"method": "draft_model", "model": draft, "num_speculative_tokens": num_draft_tokens}
    return f"vllm serve {quote_argument(target)} --speculative-config {shlex.quote(json.dumps(options))}"


VLLM = ServingEngine(
    name="vllm",
    title="vLLM",
    rules=(DraftingRule("greedy"), DraftingRule("stochastic", '"draft_sample_method": "probabilistic"', 0)),
    counting=Counting(first_round=1, reserved_tokens=None, counts_drafted_past_end=True, end="passed"),
    source='vLLM 0.32, `draft_sample_method="greedy"`, the default',
    is_observed=False,
    vocabulary="`config.vocab_size` of draft and target must be equal; tokenizers are not compared",
    length="nothing is drafted for a batch in which one text and its draft would pass the draft's `max_model_len`",
    counters="`vllm:spec_decode_num_draft_tokens` and `vllm:spec_decode_num_accepted_tokens` under `/metrics`",
    figures={
        "mean_acceptance_length": "Mean acceptance length",
        "acceptance_rate": "Avg Draft acceptance rate",
        "acceptance_rate_per_position": "Per-position acceptance rate",
        "drafting_rounds": "vllm:spec_decode_num_drafts",
        "drafted": "vllm:spec_decode_num_draft_tokens",
        "accepted": "vllm:spec_decode_num_accepted_tokens",
        "accepted_by_position": "vllm:spec_decode_num_accepted_tokens_per_pos",
    },
    default_num_draft_tokens=None,
    command_language="bash",
    write_command=write_command,
    lookup=VLLM_NGRAM,
)
