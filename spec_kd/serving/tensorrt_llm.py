"""TensorRT-LLM: a standalone draft under `DraftTargetDecodingConfig`."""

from spec_kd.escaping import quote_python
from spec_kd.serving.engine import ServingEngine


def write_command(draft: str, target: str, num_draft_tokens: int) -> str:
    """Python code that loads both models."""
    draft, target = quote_python(draft), quote_python(target)
    return (
        "from tensorrt_llm import LLM\n"
        "from tensorrt_llm.llmapi import DraftTargetDecodingConfig\n\n"
        f"config = DraftTargetDecodingConfig(max_draft_len={num_draft_tokens}, speculative_model={draft})\n"
        f"llm = LLM({target}, speculative_config=config, disable_overlap_scheduler=True)"
    )


TENSORRT_LLM = ServingEngine(
    name="tensorrt-llm",
    draft_sampling="greedy",
    rule="the draft proposes its most likely token, which is accepted if the target samples the same",
    source="TensorRT-LLM pull request 15775, the default without `use_rejection_sampling`",
    vocabulary="draft and target must share a tokenizer",
    counters="the statistics of `LLM.get_stats`",
    default_num_draft_tokens=None,
    command_language="python",
    write_command=write_command,
)
