"""MLX-LM: `mlx_lm.server` and `mlx_lm.generate` with `--draft-model`."""

from spec_kd.counting import Counting
from spec_kd.serving.engine import DraftingRule, ServingEngine, write_flags


def write_command(draft: str, target: str, num_draft_tokens: int) -> str:
    """The command that starts MLX-LM's server with a draft model."""
    flags = write_flags({"--model": target, "--draft-model": draft, "--num-draft-tokens": num_draft_tokens})
    return f"mlx_lm.server {flags}"


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
)
