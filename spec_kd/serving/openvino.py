"""OpenVINO GenAI: `LLMPipeline` with a `draft_model`."""

from spec_kd.counting import Counting
from spec_kd.escaping import quote_python
from spec_kd.serving.engine import DraftingRule, ServingEngine


def write_command(draft: str, target: str, num_draft_tokens: int) -> str:
    """Python code that converts both models and generates with them."""
    exports = "".join(
        f'subprocess.run(["optimum-cli", "export", "openvino", "--model", {quote_python(name)}, '
        f'"--task", "text-generation-with-past", "{folder}"], check=True)\n'
        for name, folder in ((target, "target_openvino"), (draft, "draft_openvino"))
    )
    return (
        "import subprocess\n\n"
        "import openvino_genai\n\n"
        f"{exports}\n"
        'draft = openvino_genai.draft_model("draft_openvino", "CPU")\n'
        'pipeline = openvino_genai.LLMPipeline("target_openvino", "CPU", draft_model=draft)\n'
        f'print(pipeline.generate("Hello", max_new_tokens=64, num_assistant_tokens={num_draft_tokens}))'
    )


OPENVINO = ServingEngine(
    name="openvino",
    title="OpenVINO GenAI",
    rules=(DraftingRule("greedy"),),
    counting=Counting(first_round=1),
    source=(
        "src/cpp/src/speculative_decoding/continuous_batching/fast_draft_strategy.cpp of OpenVINO GenAI (August 2026); "
        "its rule for sampled text is not the papers' and is not modeled: compare greedy decoding"
    ),
    is_observed=False,
    vocabulary="a test sentence must give both tokenizers as many ids; equal bos, eos and pad ids",
    length="both models are run past `max_position_embeddings` without a word",
    counters="`extended_perf_metrics.get_num_accepted_tokens()` of each result",
    figures={"accepted": "get_num_accepted_tokens()"},
    default_num_draft_tokens=5,
    command_language="python",
    write_command=write_command,
)
