"""vLLM: a standalone draft under `"method": "draft_model"`."""

import json
import shlex
from collections.abc import Iterator, Sequence

from spec_kd.counting import Counting
from spec_kd.escaping import quote_argument
from spec_kd.open_types import JsonObject, Record
from spec_kd.sampling.response_format import GRAMMAR, ResponseFormat
from spec_kd.serving.engine import DraftingRule, ServingEngine, StructuredOutput
from spec_kd.serving.lookup import VLLM_NGRAM
from spec_kd.serving.observer import DraftCounts, Observer
from spec_kd.serving.pair import PairCheck, Problem, ServedPair
from spec_kd.serving.rules import (
    BEYOND_TRAINED_ROUND,
    COMMON_CHECKS,
    OTHER_SPECIAL_TOKENS,
    OTHER_TEXT,
    describe_length,
    find_multimodal_rope,
    find_other_precision,
    find_recurrent_draft,
    find_sampling_defaults,
    find_unequal_rows,
    find_unsplittable_heads,
    refuse_defaults,
)


def write_command(draft: str, target: str, num_draft_tokens: int, flags: Sequence[str] = ()) -> str:
    """The command that starts `vllm serve` with a draft model."""
    options = {"method": "draft_model", "model": draft, "num_speculative_tokens": num_draft_tokens}
    options |= json.loads(f"{{{', '.join(flags)}}}")
    return f"vllm serve {quote_argument(target)} --speculative-config {shlex.quote(json.dumps(options))}"


def write_parallel_command(draft: str, target: str, num_draft_tokens: int, flags: Sequence[str] = ()) -> str:
    """The command for a parallel draft; vLLM reads its mask token as `pard_token` of its config.json."""
    return write_command(draft, target, num_draft_tokens, ['"parallel_drafting": true', *flags])


def write_synthetic_command(draft: str, target: str, acceptance_rates: Sequence[float]) -> str:
    """The same, accepting drafted tokens at these rates; vLLM on a CPU refuses it (an assert of its sampler)."""
    # `_resolve_synthetic_acceptance_rates` in config/speculative.py: shares of rounds, one for each drafted token
    rates = list(acceptance_rates)
    flags = ['"rejection_sample_method": "synthetic"', f'"synthetic_acceptance_rates": {json.dumps(rates)}']
    return write_command(draft, target, len(rates), flags)


# vllm/config/speculative.py: a path that has one of these is taken for a draft of that method, whatever `"method"` says
METHOD_NAMES = ("eagle-", "eagle3", "dflash", "dspark")


def find_misread_name(pair: ServedPair) -> Iterator[Problem]:
    """The draft's name looks like that of another method."""
    for name in METHOD_NAMES:
        if name in pair.draft.name.lower():
            yield f"The draft's path has `{name}` in it.", "Give its folder another name."


def find_short_draft(pair: ServedPair) -> Iterator[Problem]:
    """The draft reads fewer tokens than a sequence and the tokens drafted after it may have."""
    needed = pair.served_length
    if needed is not None:
        whole = pair.target.max_length or needed + (pair.num_assistant_tokens or 0)
        needed = min(needed + (pair.num_assistant_tokens or 0), whole)
    yield from describe_length(pair, needed)


def find_min_p(pair: ServedPair) -> Iterator[Problem]:
    """The target's defaults of generation set `min_p`."""
    if value := pair.target.read_default("min_p"):
        yield (
            f"`generation_config.json` of the target sets `min_p` to {value:g}.",
            "Start vLLM with `--generation-config vllm`, or take `min_p` out of the file.",
        )


CHECKS = (
    *COMMON_CHECKS,
    BEYOND_TRAINED_ROUND,
    PairCheck(
        find_unequal_rows,
        "refuses",
        'vLLM stops with "Target and draft model should have the same vocabulary size".',
    ),
    OTHER_TEXT,
    OTHER_SPECIAL_TOKENS,
    PairCheck(
        find_short_draft,
        "drafts less",
        "vLLM drafts nothing for the whole batch while one sequence plus the drafted tokens is longer than that.",
    ),
    # `validate_same_kv_cache_group` in v1/spec_decode/llm_base_proposer.py; pull request 50146 lists what is missing
    PairCheck(
        find_recurrent_draft,
        "refuses",
        'vLLM stops with "All drafting layers should belong to the same kv cache group", or keeps the state of '
        "rejected tokens.",
    ),
    PairCheck(
        find_multimodal_rope,
        "refuses",
        'vLLM stops with "Speculative Decoding with draft models or parallel drafting does not support M-RoPE yet".',
    ),
    PairCheck(
        find_unsplittable_heads,
        "refuses",
        "The draft's tensor parallelism is the target's, and vLLM stops with \"must be divisible by tensor parallel "
        'size".',
    ),
    PairCheck(find_other_precision, "drafts less", "vLLM converts the draft to the target's data type."),
    PairCheck(
        find_misread_name, "refuses", "vLLM loads the draft as one of that method, and finds none of its weights."
    ),
    # `SamplingParams._validate_spec_decode`; defaults of requests come from the target's generation_config.json
    PairCheck(
        find_min_p,
        "refuses",
        'Each request fails: "The min_p and logit_bias sampling parameters are not yet supported with speculative '
        'decoding".',
    ),
    PairCheck(
        refuse_defaults("repetition_penalty", "presence_penalty", "frequency_penalty"),
        "drafts less",
        "vLLM penalizes the target's logits by default, and not the draft's.",
    ),
    PairCheck(
        find_sampling_defaults,
        "drafts less",
        "vLLM samples like that by default, and then accepts the draft's most likely token with the target's "
        "probability for it.",
    ),
)


def read_counts(answer: Record) -> DraftCounts | None:
    """`metrics.speculative_decoding` of an answer."""
    counts = (answer.get("metrics") or {}).get("speculative_decoding")
    return counts and DraftCounts.of_histogram(
        counts["num_draft_tokens"], counts["num_accepted_draft_tokens"], counts["acceptance_histogram"]
    )


def read_decoding_seconds(answer: Record) -> float | None:
    """`metrics.generation_time_ms`, with `--enable-per-request-metrics`."""
    milliseconds = (answer.get("metrics") or {}).get("generation_time_ms")
    return milliseconds and milliseconds / 1000


def write_format(wanted: ResponseFormat) -> JsonObject:
    """`structured_outputs` of `/v1/completions`."""
    given = {"grammar": wanted.text} if wanted.kind == GRAMMAR else {"json": json.loads(wanted.text)}
    return {"structured_outputs": given}


OBSERVER = Observer(
    owner="vllm",
    counters={
        "drafted": "vllm:spec_decode_num_draft_tokens_total",
        "accepted": "vllm:spec_decode_num_accepted_tokens_total",
        "rounds": "vllm:spec_decode_num_drafts_total",
        "accepted_by_position": "vllm:spec_decode_num_accepted_tokens_per_pos_total",
    },
    read_counts=read_counts,
    write_format=write_format,
    metrics_hint="with `--per-request-spec-decode-metrics detailed`, and without `--disable-log-stats`",
    drafting_hint="Was it started without `--speculative-config`?",
    read_decoding_seconds=read_decoding_seconds,
)

VLLM = ServingEngine(
    name="vllm",
    title="vLLM",
    rules=(DraftingRule("greedy"), DraftingRule("stochastic", '"draft_sample_method": "probabilistic"', 0)),
    counting=Counting(
        first_round=1, reserved_tokens=None, counts_drafted_past_end=True, end="passed", cuts_refused=True
    ),
    source='vLLM 0.32, `draft_sample_method="greedy"`, the default',
    is_observed=True,
    vocabulary="`config.vocab_size` of draft and target must be equal; tokenizers are not compared",
    length="nothing is drafted for a batch in which one text and its draft would pass the draft's `max_model_len`",
    counters="`vllm:spec_decode_num_draft_tokens` and `vllm:spec_decode_num_accepted_tokens` under `/metrics`",
    figures={
        "mean_acceptance_length": "Mean acceptance length",
        "acceptance_rate": "Avg Draft acceptance rate",
        "acceptance_rate_per_position": "Per-position acceptance rate",
        "drafting_rounds": "vllm:spec_decode_num_drafts",
        "drafted": "vllm:spec_decode_num_draft_tokens",
        "accepted": "vllm:spec_decode_num_accepted_tokens",
        "accepted_by_position": "vllm:spec_decode_num_accepted_tokens_per_pos",
    },
    default_num_draft_tokens=None,
    command_language="bash",
    write_command=write_command,
    write_parallel_command=write_parallel_command,
    write_synthetic_command=write_synthetic_command,
    lookup=VLLM_NGRAM,
    checks=CHECKS,
    structured_output=StructuredOutput(
        "`StructuredOutputManager.grammar_bitmask` and `update_draft_token_ids_in_output` of the scheduler, vLLM 0.32"
    ),
    observer=OBSERVER,
    # Of the V2 runner, vllm/v1/worker/gpu; the V1 runner takes a sampled draft for a greedy one then
    block_flags='"rejection_sample_method": "block"',
    batch_size_flags='"num_speculative_tokens_per_batch_size": {ranges}',
)
