"""TensorRT-LLM: a standalone draft under `DraftTargetDecodingConfig`."""

from collections.abc import Sequence

from spec_kd.counting import Counting
from spec_kd.escaping import quote_python
from spec_kd.serving.engine import DraftingRule, ServingEngine, StructuredOutput
from spec_kd.serving.pair import PairCheck
from spec_kd.serving.rules import (
    BEYOND_TRAINED_ROUND,
    BEYOND_TRAINING,
    COMMON_CHECKS,
    OTHER_SPECIAL_TOKENS,
    OTHER_TEXT,
    find_unsplittable_heads,
)


def write_command(draft: str, target: str, num_draft_tokens: int, flags: Sequence[str] = ()) -> str:
    """Python code that loads both models."""
    options = ["disable_overlap_scheduler=True"]
    return _write_code("DraftTargetDecodingConfig", draft, target, num_draft_tokens, flags, options)


def write_parallel_command(draft: str, target: str, num_draft_tokens: int, flags: Sequence[str] = ()) -> str:
    """Python code that loads both models, for a parallel draft; its mask token is `pard_token` of its config.json."""
    return _write_code("PARDDecodingConfig", draft, target, num_draft_tokens, flags)


def _write_code(
    config: str, draft: str, target: str, num_draft_tokens: int, flags: Sequence[str], options: Sequence[str] = ()
) -> str:
    given = ", ".join([f"max_draft_len={num_draft_tokens}", f"speculative_model={quote_python(draft)}", *flags])
    return (
        "from tensorrt_llm import LLM\n"
        f"from tensorrt_llm.llmapi import {config}\n\n"
        f"config = {config}({given})\n"
        f"llm = LLM({', '.join([quote_python(target), 'speculative_config=config', *options])})"
    )


CHECKS = (
    *COMMON_CHECKS,
    BEYOND_TRAINED_ROUND,
    OTHER_TEXT,
    OTHER_SPECIAL_TOKENS,
    BEYOND_TRAINING,
    PairCheck(
        find_unsplittable_heads, "refuses", "The draft is split as the target is, and an assertion about heads fails."
    ),
)

TENSORRT_LLM = ServingEngine(
    name="tensorrt-llm",
    title="TensorRT-LLM",
    rules=(DraftingRule("greedy"), DraftingRule("stochastic", "use_rejection_sampling=True")),
    counting=Counting(first_round=1),
    source="TensorRT-LLM pull request 15775, the default without `use_rejection_sampling`",
    is_observed=False,
    vocabulary="draft and target must share a tokenizer",
    length="both models are built for one `max_seq_len`",
    counters="the statistics of `LLM.get_stats`",
    figures={},
    default_num_draft_tokens=None,
    command_language="python",
    write_command=write_command,
    write_parallel_command=write_parallel_command,
    checks=CHECKS,
    structured_output=StructuredOutput(
        "`_create_draft_request` in _torch/speculative/model_drafter.py of TensorRT-LLM, which gives the draft the "
        "target's `guided_decoding_params`",
        masks_draft=True,
    ),
)
