"""OpenVINO GenAI: `LLMPipeline` with a `draft_model`."""

from collections.abc import Iterator, Sequence

from spec_kd.counting import Counting
from spec_kd.escaping import quote_python
from spec_kd.serving.engine import DraftingRule, ServingEngine
from spec_kd.serving.pair import PairCheck, Problem, ServedPair
from spec_kd.serving.rules import (
    BEYOND_TRAINING,
    COMMON_CHECKS,
    NO_PARALLEL_DRAFT,
    OTHER_TEXT,
    SHARE_TOKENIZER,
    find_different_special_tokens,
    find_recurrent_draft,
    find_recurrent_target,
)


def write_command(draft: str, target: str, num_draft_tokens: int, flags: Sequence[str] = ()) -> str:
    """Python code that converts both models and generates with them."""
    exports = "".join(
        f'subprocess.run(["optimum-cli", "export", "openvino", "--model", {quote_python(name)}, '
        f'"--task", "text-generation-with-past", "{folder}"], check=True)\n'
        for name, folder in ((target, "target_openvino"), (draft, "draft_openvino"))
    )
    options = ", ".join(["max_new_tokens=64", f"num_assistant_tokens={num_draft_tokens}", *flags])
    return (
        "import subprocess\n\n"
        "import openvino_genai\n\n"
        f"{exports}\n"
        'precision = {"INFERENCE_PRECISION_HINT": "f32"}  # in bfloat16, the default of some CPUs, 2026.4 crashes\n'
        'draft = openvino_genai.draft_model("draft_openvino", "CPU", **precision)\n'
        'pipeline = openvino_genai.LLMPipeline("target_openvino", "CPU", draft_model=draft, **precision)\n'
        f'print(pipeline.generate("Hello", {options}))'
    )


TEST_SENTENCE = "Could you please tell me something about OpenVINO.GenAI?"  # of `are_tokenizers_equal`


def find_longer_sentence(pair: ServedPair) -> Iterator[Problem]:
    """A test sentence has another number of ids."""
    draft, target = (len(model.tokenizer(TEST_SENTENCE)["input_ids"]) for model in pair.models)
    if draft != target:
        yield f"The draft's tokenizer makes {draft} ids of a test sentence, the target's {target}.", SHARE_TOKENIZER


CHECKS = (
    *COMMON_CHECKS,
    NO_PARALLEL_DRAFT,
    # `are_tokenizers_equal` compares these two
    *(
        PairCheck(find, "refuses", 'OpenVINO GenAI stops with "Tokenizers for draft and main models are different!".')
        for find in (find_longer_sentence, find_different_special_tokens)
    ),
    OTHER_TEXT,
    BEYOND_TRAINING,
    # Checkpoints of such states are taken in dflash_strategy.cpp alone; stateful/fast_draft_strategy.cpp asserts
    PairCheck(
        find_recurrent_target,
        "corrupts",
        "On CPU and GPU rejected tokens stay in the target's state, and the text that follows is another one; on NPU "
        "the pipeline does not start.",
    ),
    PairCheck(find_recurrent_draft, "drafts less", "On CPU and GPU rejected tokens stay in the draft's state."),
)

OPENVINO = ServingEngine(
    name="openvino",
    title="OpenVINO GenAI",
    rules=(DraftingRule("greedy"),),
    counting=Counting(first_round=1, counts_drafted_past_end=True, draft_ends_at_eos=True, counts_last_round=False),
    source=(
        "src/cpp/src/speculative_decoding/continuous_batching/fast_draft_strategy.cpp of OpenVINO GenAI (August 2026), "
        "and its counters on 48 prompts; "
        "its rule for sampled text is not the papers' and is not modeled: compare greedy decoding"
    ),
    is_observed=True,
    vocabulary="a test sentence must give both tokenizers as many ids; equal bos, eos and pad ids",
    length="both models are run past `max_position_embeddings` without a word",
    counters="`extended_perf_metrics.get_num_accepted_tokens()` of each result",
    figures={"accepted": "get_num_accepted_tokens()"},
    default_num_draft_tokens=5,
    command_language="python",
    write_command=write_command,
    checks=CHECKS,
)
