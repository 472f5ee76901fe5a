"""Transformers: assisted generation, `generate(assistant_model=...)`."""

from collections.abc import Iterator, Sequence

from spec_kd.counting import Counting
from spec_kd.escaping import quote_python
from spec_kd.serving.engine import DraftingRule, EarlyEnd, ServingEngine, StructuredOutput
from spec_kd.serving.lookup import PROMPT_LOOKUP
from spec_kd.serving.pair import PairCheck, Problem, ServedPair
from spec_kd.serving.rules import (
    BEYOND_TRAINING,
    DENSE_DRAFT,
    NO_PARALLEL_DRAFT,
    OTHER_SPECIAL_TOKENS,
    OTHER_TEMPLATE,
    OTHER_TEXT,
    find_unequal_rows,
    find_wide_draft,
)


def write_command(draft: str, target: str, num_draft_tokens: int, flags: Sequence[str] = ()) -> str:
    """Python code that generates with both models."""
    draft, target = quote_python(draft), quote_python(target)
    options = {
        "num_assistant_tokens": str(num_draft_tokens),
        "num_assistant_tokens_schedule": '"constant"',
        "assistant_confidence_threshold": "0.0",
    } | dict(flag.split("=", 1) for flag in flags)
    settings = "\n".join(f"draft.generation_config.{name} = {value}" for name, value in options.items())
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"tokenizer = AutoTokenizer.from_pretrained({target})\n"
        f'target = AutoModelForCausalLM.from_pretrained({target}, dtype="auto", device_map="auto")\n'
        f'draft = AutoModelForCausalLM.from_pretrained({draft}, dtype="auto", device_map="auto")\n'
        "# Read from the draft's config only; the default stops drafting at tokens it is less than 40 % sure of\n"
        f"{settings}\n\n"
        'inputs = tokenizer("Hello", return_tensors="pt").to(target.device)\n'
        "output = target.generate(**inputs, assistant_model=draft, do_sample=False, max_new_tokens=64)\n"
        "print(tokenizer.decode(output[0], skip_special_tokens=True))"
    )


def find_stateful_target(pair: ServedPair) -> Iterator[Problem]:
    """The target's class is stateful."""
    if pair.target.is_stateful:
        yield f"`{pair.target.config.model_type}` targets are stateful.", "Serve the target without a draft model."


def find_attention_free_draft(pair: ServedPair) -> Iterator[Problem]:
    """No layer of the draft is attention."""
    if pair.draft.is_recurrent and pair.draft.read("num_attention_heads") is None:
        yield "The draft has no attention layer.", DENSE_DRAFT


def find_early_end(pair: ServedPair) -> Iterator[Problem]:
    """The draft's own defaults end a round early, or set another number of drafted tokens."""
    wanted = {
        "assistant_confidence_threshold": 0.0,
        "num_assistant_tokens_schedule": "constant",
        "num_assistant_tokens": pair.num_assistant_tokens,
    }
    for name, value in wanted.items():
        default = pair.draft.read_default(name)
        if None not in (default, value) and default != value:
            yield (
                f"`generation_config.json` of the draft sets `{name}` to {default}.",
                f"Set `draft.generation_config.{name} = {value!r}`.",
            )


CHECKS = (
    OTHER_TEMPLATE,
    NO_PARALLEL_DRAFT,
    # `_validate_generation_mode` in generation/utils.py
    PairCheck(
        find_unequal_rows, "refuses", '`generate` stops with "The main and assistant models have different tokenizers".'
    ),
    OTHER_TEXT,
    OTHER_SPECIAL_TOKENS,
    BEYOND_TRAINING,
    PairCheck(
        find_stateful_target,
        "refuses",
        '`generate` stops with "assisted generation is not supported with stateful models".',
    ),
    PairCheck(
        find_attention_free_draft,
        "refuses",
        '`generate` stops with "`get_seq_length` can only be called on Attention layers".',
    ),
    PairCheck(find_wide_draft, "slower", "The draft reads twice the bytes in each step."),
    PairCheck(find_early_end, "drafts less", "`generate` reads these from the draft, and stops drafting accordingly."),
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
    checks=CHECKS,
    # Only processors that read nothing but the ids will do: others lose count of rejected tokens
    structured_output=StructuredOutput(
        "`AssistedCandidateGenerator` in transformers/generation/candidate_generator.py (5.23), which gives the draft "
        "the target's logits processors, such as that of `prefix_allowed_tokens_fn`",
        masks_draft=True,
    ),
    # `ConfidenceCriteria` and `AssistedCandidateGenerator.update_candidate_strategy`
    early_end=EarlyEnd(
        "assistant_confidence_threshold={threshold}",
        keeps_token=True,
        is_of_token=True,
        note="With scikit-learn installed, `generate` moves the threshold from round to round.",
    ),
)
