"""SGLang: a standalone draft under `--speculative-algorithm STANDALONE`."""

from collections.abc import Sequence

from spec_kd.counting import Counting
from spec_kd.escaping import quote_argument
from spec_kd.open_types import JsonObject, Record
from spec_kd.sampling.response_format import GRAMMAR, ResponseFormat
from spec_kd.serving.engine import DraftingRule, ServingEngine, StructuredOutput
from spec_kd.serving.observer import DraftCounts, Observer, find_first
from spec_kd.serving.pair import PairCheck
from spec_kd.serving.rules import (
    COMMON_CHECKS,
    NO_PARALLEL_DRAFT,
    OTHER_SPECIAL_TOKENS,
    find_different_tokens,
    find_recurrent_draft,
    find_sampling_defaults,
    find_short_draft,
    find_unequal_rows,
    find_unsplittable_heads,
    refuse_defaults,
)


def write_command(draft: str, target: str, num_draft_tokens: int, flags: Sequence[str] = ()) -> str:
    """The command that starts SGLang with a draft model."""
    # A chain of drafted tokens: top-k 1, and the token that starts the round counts as one more
    return (
        f"python -m sglang.launch_server --model-path {quote_argument(target)} --speculative-algorithm STANDALONE "
        f"--speculative-draft-model-path {quote_argument(draft)} --speculative-num-steps {num_draft_tokens} "
        + " ".join(["--speculative-eagle-topk 1", f"--speculative-num-draft-tokens {num_draft_tokens + 1}", *flags])
    )


CHECKS = (
    *COMMON_CHECKS,
    NO_PARALLEL_DRAFT,
    # `_validate_vocab_compatibility` in speculative/standalone_worker_v2.py
    PairCheck(
        find_unequal_rows,
        "refuses",
        'SGLang stops with "STANDALONE speculative decoding requires the draft model to share the same vocabulary".',
    ),
    PairCheck(
        find_different_tokens, "refuses", 'SGLang stops with "the two tokenizers have different token-to-id mappings".'
    ),
    OTHER_SPECIAL_TOKENS,
    # `_derive_context_length` in configs/model_config.py: the draft gets the target's context length
    PairCheck(
        find_short_draft,
        "refuses",
        'SGLang stops with "Target model\'s context_length is greater than the derived context_length", unless '
        "`--context-length` is smaller.",
    ),
    # `commit_mamba_states_after_verify` is called for the target alone
    PairCheck(
        find_recurrent_draft, "drafts less", "SGLang rolls back the target's recurrent state, and not the draft's."
    ),
    PairCheck(
        find_unsplittable_heads, "refuses", "The draft is split as the target is, and SGLang stops where it cannot be."
    ),
    PairCheck(
        refuse_defaults("repetition_penalty"),
        "drafts less",
        "SGLang penalizes the target's logits by default, and not the draft's.",
    ),
    PairCheck(
        find_sampling_defaults,
        "drafts less",
        "SGLang samples like that by default, and then accepts the draft's most likely token with the target's "
        "probability for it.",
    ),
)

SAMPLING_FIELDS = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "stop_token_ids", "json_schema", "ebnf",
)  # fmt: skip


def build_body(body: JsonObject) -> JsonObject:
    """A request to `/generate`, whose answers have `meta_info`, which those of `/v1/completions` do not have."""
    sampling = {name: body[name] for name in SAMPLING_FIELDS if name in body}
    seed = {"sampling_seed": body["seed"]} if "seed" in body else {}
    return {"input_ids": body["prompt"], "sampling_params": {**sampling, **seed, "max_new_tokens": body["max_tokens"]}}


def translate(answer: JsonObject) -> JsonObject:
    """An answer of `/generate` in OpenAI's form."""
    if "output_ids" not in answer or "meta_info" not in answer:
        return answer
    end = answer["meta_info"].get("finish_reason") or {}
    choice = {
        "text": answer.get("text"),
        "token_ids": answer["output_ids"],
        "finish_reason": end.get("type"),
        "matched_stop": end.get("matched"),
    }
    return {"choices": [choice], **answer}


def read_counts(answer: Record) -> DraftCounts | None:
    """`meta_info` of an answer, whose counts are named differently from version to version."""
    info = answer.get("meta_info") or {}
    drafted = find_first(info, "spec_num_proposed_drafts", "spec_proposed_drafts", "spec_draft_token_num")
    accepted = find_first(info, "spec_num_correct_drafts", "spec_accepted_drafts", "spec_accept_token_num")
    if drafted is None or accepted is None:
        return None
    if histogram := find_first(info, "spec_correct_drafts_histogram", "spec_accept_histogram"):
        return DraftCounts.of_histogram(drafted, accepted, histogram)
    return DraftCounts(drafted, accepted, info.get("spec_verify_ct"))


def write_format(wanted: ResponseFormat) -> JsonObject:
    """`ebnf` or `json_schema` of the sampling parameters, both as text."""
    return {"ebnf" if wanted.kind == GRAMMAR else "json_schema": wanted.text}


OBSERVER = Observer(
    owner="sglang",
    counters={"rounds": "sglang:spec_verify_calls_total"},  # tokens are only told as averages of an interval
    read_counts=read_counts,
    write_format=write_format,
    metrics_hint="with `--enable-metrics`",
    drafting_hint="Was it started without `--speculative-algorithm STANDALONE`?",
    path="/generate",
    build_body=build_body,
    translate=translate,
)

SGLANG = ServingEngine(
    name="sglang",
    title="SGLang",
    rules=(DraftingRule("greedy"),),
    counting=Counting(first_round=1, reserved_tokens=None, counts_drafted_past_end=True),
    source="SGLang 0.5.23, STANDALONE with top-k 1; issue 10308 of sgl-project/sglang",
    is_observed=False,
    vocabulary="`vocab_size` and `get_vocab()` of draft and target must be equal",
    length="the draft is loaded with the target's context length, which its `max_position_embeddings` must allow",
    counters="`meta_info.spec_*` of each response",
    figures={
        "drafting_rounds": "spec_verify_ct",
        "drafted": "spec_draft_token_num",
        "accepted": "spec_accept_token_num",
    },
    default_num_draft_tokens=3,
    command_language="bash",
    write_command=write_command,
    checks=CHECKS,
    structured_output=StructuredOutput("`generate_token_bitmask` in srt/speculative/spec_utils.py of SGLang 0.5.23"),
    observer=OBSERVER,
)
