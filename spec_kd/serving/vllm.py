"""vLLM: a standalone draft under `"method": "draft_model"`."""

import json
import shlex

from spec_kd.escaping import quote_argument
from spec_kd.serving.engine import ServingEngine


def write_command(draft: str, target: str, num_draft_tokens: int) -> str:
    """The command that starts `vllm serve` with a draft model."""
    options = {"method": "draft_model", "model": draft, "num_speculative_tokens": num_draft_tokens}
    return f"vllm serve {quote_argument(target)} --speculative-config {shlex.quote(json.dumps(options))}"


VLLM = ServingEngine(
    name="vllm",
    draft_sampling="greedy",
    rule="the draft proposes its most likely token, which is accepted with the target's probability for it",
    source='vLLM 0.32, `draft_sample_method="greedy"`, the default',
    vocabulary="`config.vocab_size` of draft and target must be equal; tokenizers are not compared",
    counters="`vllm:spec_decode_num_draft_tokens` and `vllm:spec_decode_num_accepted_tokens` under `/metrics`",
    default_num_draft_tokens=None,
    command_language="bash",
    write_command=write_command,
)
