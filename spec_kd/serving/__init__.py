"""Engines that serve a draft: how they draft and accept, what they ask of a draft, and their commands."""

from spec_kd.options import check_choice, check_int
from spec_kd.serving.engine import DraftingRule, ServingEngine
from spec_kd.serving.llama_cpp import LLAMA_CPP
from spec_kd.serving.mlx_lm import MLX_LM
from spec_kd.serving.openvino import OPENVINO
from spec_kd.serving.sglang import SGLANG
from spec_kd.serving.tensorrt_llm import TENSORRT_LLM
from spec_kd.serving.transformers import TRANSFORMERS
from spec_kd.serving.vllm import VLLM

__all__ = [
    "SERVING_ENGINES",
    "SERVING_ENGINE_HELP",
    "DraftingRule",
    "ServingEngine",
    "find_serving_engine",
    "serving_commands",
]

SERVING_ENGINES: dict[str, ServingEngine] = {
    engine.name: engine for engine in (TRANSFORMERS, VLLM, SGLANG, LLAMA_CPP, TENSORRT_LLM, MLX_LM, OPENVINO)
}
THRESHOLD_HELP = (
    "Probability below which a draft ends, as the engine was told (`--spec-draft-p-min` of llama.cpp). By default 0.0: "
    "drafts end nowhere."
)
SERVING_ENGINE_HELP = (
    "Engine that will serve the draft, which decides how the draft is sampled and what is counted: "
    f"{', '.join(SERVING_ENGINES)}."
)


def find_serving_engine(name: str) -> ServingEngine:
    """The engine of that name; raises `ValueError` that lists them."""
    check_choice("serving_engine", name, SERVING_ENGINES)
    return SERVING_ENGINES[name]


def serving_commands(
    draft_path: str, target_name: str, num_assistant_tokens: int = 5, *, is_parallel: bool = False
) -> dict[str, str]:
    """Commands and snippets that serve `target_name` with the draft.

    They are written after the documentation of each engine. The draft must have as many vocabulary rows as the target,
    see [`export_draft`]. Names are quoted, so that no text in them is run by a shell or by Python.

    Args:
        draft_path (`str`): Folder or Hub id of the draft.
        target_name (`str`): Folder or Hub id of the target.
        num_assistant_tokens (`int`, *optional*, defaults to `5`): Tokens drafted in a round.
        is_parallel (`bool`, *optional*, defaults to `False`):
            Whether the draft drafts all of them in one pass. Engines that take no such draft are left out.

    Returns:
        `dict[str, str]`: Engine to command (vLLM, SGLang, llama.cpp, MLX-LM: shell; others: Python).

    Raises:
        `ValueError`: `num_assistant_tokens` below 1, or a name that holds a null character, which no command takes.
    """
    check_int("num_assistant_tokens", num_assistant_tokens)
    for name, value in (("draft_path", draft_path), ("target_name", target_name)):
        if "\0" in value:
            raise ValueError(f"`{name}={value!r}` holds a null character, which no command takes.")
    return {
        name: write(draft_path, target_name, num_assistant_tokens)
        for name, engine in SERVING_ENGINES.items()
        if (write := engine.find_writer(is_parallel)) is not None
    }
