"""Transformers: assisted generation, `generate(assistant_model=...)`."""

from spec_kd.counting import Counting
from spec_kd.escaping import quote_python
from spec_kd.serving.engine import DraftingRule, ServingEngine
from spec_kd.serving.lookup import PROMPT_LOOKUP


def write_command(draft: str, target: str, num_draft_tokens: int) -> str:
    """Python code that generates with both models."""
    draft, target = quote_python(draft), quote_python(target)
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"tokenizer = AutoTokenizer.from_pretrained({target})\n"
        f'target = AutoModelForCausalLM.from_pretrained({target}, dtype="auto", device_map="auto")\n'
        f'draft = AutoModelForCausalLM.from_pretrained({draft}, dtype="auto", device_map="auto")\n'
        "# Read from the draft's config only; the default stops drafting at tokens it is less than 40 % sure of\n"
        f"draft.generation_config.num_assistant_tokens = {num_draft_tokens}\n"
        'draft.generation_config.num_assistant_tokens_schedule = "constant"\n'
        "draft.generation_config.assistant_confidence_threshold = 0.0\n\n"
        'inputs = tokenizer("Hello", return_tensors="pt").to(target.device)\n'
        "output = target.generate(**inputs, assistant_model=draft, do_sample=False, max_new_tokens=64)\n"
        "print(tokenizer.decode(output[0], skip_special_tokens=True))"
    )


TRANSFORMERS = ServingEngine(
    name="transformers",
    title="transformers",
    rules=(DraftingRule("stochastic"),),
    counting=Counting(),
    source="`_speculative_sampling` in transformers/generation/utils.py (5.23), after arXiv 2211.17192",
    is_observed=True,
    vocabulary="draft and target must share a tokenizer",
    length="both models are run past the draft's `max_position_embeddings` without a word",
    counters="`generate_assisted` of spec_kd counts them",
    figures={},
    default_num_draft_tokens=20,
    command_language="python",
    write_command=write_command,
    lookup=PROMPT_LOOKUP,
)
