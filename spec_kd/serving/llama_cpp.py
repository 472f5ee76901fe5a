"""llama.cpp: `llama-server` with a standalone draft under `--spec-type draft-simple`."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from spec_kd.counting import Counting
from spec_kd.escaping import quote_argument
from spec_kd.open_types import JsonObject, Record
from spec_kd.sampling.response_format import GRAMMAR, ResponseFormat
from spec_kd.serving.engine import DraftingRule, EarlyEnd, ServingEngine, StructuredOutput
from spec_kd.serving.gguf_vocabulary import read_gguf_vocabulary
from spec_kd.serving.lookup import NGRAM_SIMPLE
from spec_kd.serving.observer import DraftCounts, Observer
from spec_kd.serving.pair import Consequence, PairCheck, Problem, ServedPair
from spec_kd.serving.rules import (
    BEYOND_TRAINING,
    COMMON_CHECKS,
    NO_PARALLEL_DRAFT,
    SHARE_TOKENIZER,
    find_missing_rows,
    find_recurrent_draft,
    find_recurrent_target,
    refuse_quantization,
)


def list_draft_flags(draft: str, num_draft_tokens: int) -> list[str]:
    """The flags of `llama-server` that load a draft, a GGUF file, and draft with it."""
    # Without `--spec-type` the draft is loaded and never used
    return ["-md", draft, "--spec-type", "draft-simple", "--spec-draft-n-max", str(num_draft_tokens)]


# Shares of rounds in which drafted token k = 1, 2, ... is accepted, by chance and not by the target, one for each
# (`common_speculative_synth_rates_resolve` in common/speculative.cpp). A drafted end of the text is never accepted.
SYNTHETIC_FLAG = "--spec-synth-rates"


def write_command(draft: str, target: str, num_draft_tokens: int, flags: Sequence[str] = ()) -> str:
    """The commands that convert both models to GGUF, where they are not, and start `llama-server` with them."""
    names = ((draft, "draft.gguf"), (target, "target.gguf"))
    files = [name if name.endswith(".gguf") else output for name, output in names]
    converted = [
        f"python convert_hf_to_gguf.py {quote_argument(name)} --outfile {output}"
        for name, output in names
        if output in files
    ]
    loaded = " ".join([*list_draft_flags(quote_argument(files[0]), num_draft_tokens), *flags])
    return "\n".join([*converted, f"llama-server -m {quote_argument(files[1])} {loaded}"])


def write_synthetic_command(draft: str, target: str, acceptance_rates: Sequence[float]) -> str:
    """The same, accepting drafted tokens at these rates."""
    command = write_command(draft, target, len(acceptance_rates))
    return f"{command} {SYNTHETIC_FLAG} {write_rates(acceptance_rates)}"


def write_rates(acceptance_rates: Sequence[float]) -> str:
    """Acceptance rates as llama-server reads them."""
    return ",".join(map(str, acceptance_rates))


def build_body(body: JsonObject) -> JsonObject:
    """A request to `/completion`, which returns ids where `/v1/completions` has them in log-probabilities alone."""
    left_out = ("model", "logprobs", "return_token_ids", "return_tokens_as_token_ids", "stop_token_ids")
    return {name: value for name, value in body.items() if name not in left_out} | {"return_tokens": True}


def translate(answer: JsonObject) -> JsonObject:
    """An answer of `/completion` in OpenAI's form."""
    if "tokens" not in answer:
        return answer
    reason = "length" if answer.get("stop_type") == "limit" else "stop"
    choice = {"text": answer.get("content"), "token_ids": answer["tokens"], "finish_reason": reason}
    return {"choices": [choice], "usage": {"completion_tokens": answer.get("tokens_predicted")}, **answer}


def read_counts(answer: Record) -> DraftCounts | None:
    """`timings` of an answer, which has counts only if something was drafted; rounds are not among them."""
    timings = answer.get("timings")
    return timings and DraftCounts(timings.get("draft_n", 0), timings.get("draft_n_accepted", 0))


def read_decoding_seconds(answer: Record) -> float | None:
    """`predicted_ms`: from the end of the prompt's pass, which gives the first token, to the last token."""
    milliseconds = (answer.get("timings") or {}).get("predicted_ms")
    return milliseconds and milliseconds / 1000


def write_format(wanted: ResponseFormat) -> JsonObject:
    """`json_schema` or `grammar` of `/completion`."""
    return {wanted.kind: wanted.text if wanted.kind == GRAMMAR else json.loads(wanted.text)}


def read_format(answer: Record) -> ResponseFormat | None:
    """`generation_settings.grammar`, which llama-server makes of a JSON schema by rules of its own."""
    grammar = (answer.get("generation_settings") or {}).get("grammar")
    return ResponseFormat(GRAMMAR, grammar) if grammar else None


OBSERVER = Observer(
    owner="llamacpp",
    counters={
        "drafted": "llamacpp:spec_decode_num_draft_tokens_total",
        "accepted": "llamacpp:spec_decode_num_accepted_tokens_total",
        "rounds": "llamacpp:spec_decode_num_drafts_total",
        "accepted_by_position": "llamacpp:spec_decode_num_accepted_tokens_per_pos_total",
    },
    read_counts=read_counts,
    write_format=write_format,
    metrics_hint="with `--metrics`",
    drafting_hint="Was llama-server started with `-md`, but without `--spec-type draft-simple`?",
    path="/completion",
    build_body=build_body,
    translate=translate,
    read_decoding_seconds=read_decoding_seconds,
    read_format=read_format,
)

COUNTING = Counting(first_round=1, counts_drafted_past_end=True, end="if_last")

# Of common/speculative.cpp: a larger difference of sizes is refused, and ids below the second are not compared
MAX_ROW_DIFFERENCE, FIRST_COMPARED_ID = 128, 5
# Of conversion/base.py: methods that the converter can undo
QUANTIZATIONS = ("bitnet", "fp8", "gptq", "compressed-tensors", "modelopt", "mxfp4")


def find_other_tokenizer_type(pair: ServedPair) -> Iterator[Problem]:
    """The tokenizers are of different types."""
    draft, target = (read_gguf_vocabulary(model).kind for model in pair.models)
    if draft != target:
        yield f"The draft's tokenizer is of the type {draft}, the target's of {target}.", SHARE_TOKENIZER


def find_other_added_token(pair: ServedPair) -> Iterator[Problem]:
    """Another BOS or EOS token is added to text."""
    draft, target = (read_gguf_vocabulary(model) for model in pair.models)
    for name in ("bos", "eos"):
        ours, theirs = getattr(draft, name), getattr(target, name)
        if ours != theirs:
            added = [f"adds id {one}" if one is not None else "adds none" for one in (ours, theirs)]
            yield f"The draft {added[0]} as {name.upper()} to text, the target {added[1]}.", SHARE_TOKENIZER


def find_distant_rows(pair: ServedPair) -> Iterator[Problem]:
    """The numbers of vocabulary rows differ by more than llama.cpp allows."""
    draft, target = pair.draft.rows, pair.target.rows
    if abs(draft - target) > MAX_ROW_DIFFERENCE:
        yield (
            f"The draft has {draft} vocabulary rows, the target {target}: more than {MAX_ROW_DIFFERENCE} apart.",
            f"Export the draft with `export_draft(..., target_vocab_size={target})`.",
        )


def find_surplus_rows(pair: ServedPair) -> Iterator[Problem]:
    """The draft has rows for ids that the target does not have, though not too many."""
    draft, target = pair.draft.rows, pair.target.rows
    if target < draft <= target + MAX_ROW_DIFFERENCE:
        yield (
            f"The draft has {draft} vocabulary rows, the target only {target}.",
            f"Export the draft with `export_draft(..., target_vocab_size={target})`.",
        )


def find_unpadded_rows(pair: ServedPair) -> Iterator[Problem]:
    """A model has more rows than ids, and a tokenizer whose ids are not padded."""
    for model in pair.models:
        folder, ids = Path(model.name), max(model.tokens.values()) + 1
        is_alone = folder.is_dir() and not (folder / "tokenizer.model").exists()
        if is_alone and model.rows > ids and read_gguf_vocabulary(model).kind == "SentencePiece":
            yield (
                f"The {model.role} has {model.rows} vocabulary rows, and a SentencePiece tokenizer of {ids} ids "
                "without `tokenizer.model`.",
                f"Copy `tokenizer.model` of the original model into `{folder.name}`.",
            )


def find_lone_recurrent_draft(pair: ServedPair) -> Iterator[Problem]:
    """The draft keeps a state that cannot be cut back, and the target does not."""
    if not pair.target.is_recurrent:
        yield from find_recurrent_draft(pair)


def find_other_token_text(pair: ServedPair) -> Iterator[Problem]:
    """An id stands for another text."""
    draft, target = (read_gguf_vocabulary(model).texts for model in pair.models)
    pairs = list(zip(draft, target, strict=False))[FIRST_COMPARED_ID:]
    different = [number for number, (ours, theirs) in enumerate(pairs, FIRST_COMPARED_ID) if ours != theirs]
    if different:
        number = different[0]
        yield (
            f"Ids stand for other text ({len(different)} of them), such as {number}: {draft[number]!r} in the draft "
            f"and {target[number]!r} in the target.",
            SHARE_TOKENIZER,
        )


DOES_NOT_DRAFT: tuple[Consequence, str] = (
    "does not draft",
    'llama-server logs "the target and draft vocabs are not compatible" and serves the target alone.',
)
CHECKS = (
    *COMMON_CHECKS,
    NO_PARALLEL_DRAFT,
    *(
        PairCheck(find, *DOES_NOT_DRAFT)
        for find in (find_other_tokenizer_type, find_other_added_token, find_distant_rows, find_other_token_text)
    ),
    PairCheck(
        find_surplus_rows,
        "refuses",
        'llama-server starts, and aborts with "failed to add token" as soon as the draft proposes such an id: '
        "training leaves their rows as they were.",
    ),
    # `LlamaHfVocab` in gguf-py/gguf/vocab.py, which reads such a tokenizer.json, writes no rows beyond the ids
    PairCheck(
        find_unpadded_rows,
        "refuses",
        "llama-server stops with \"tensor 'token_embd.weight' has wrong shape\".",
    ),
    PairCheck(find_missing_rows, "refuses", "`convert_hf_to_gguf.py` stops at an assertion."),
    PairCheck(
        refuse_quantization(QUANTIZATIONS),
        "refuses",
        '`convert_hf_to_gguf.py` stops with "Quant method is not yet supported".',
    ),
    BEYOND_TRAINING,
    # tools/server/server-context.cpp: such states have no partial removal, so the server works with checkpoints, but
    # only if the target has such a state
    PairCheck(
        find_lone_recurrent_draft,
        "refuses",
        'llama-server starts, and aborts with "failed to remove sequence" at the first rejected token.',
    ),
    PairCheck(
        find_recurrent_target,
        "slower",
        "Each round with a rejected token takes a second pass of the target, from a saved copy of its state.",
    ),
)

LLAMA_CPP = ServingEngine(
    name="llama.cpp",
    title="llama.cpp",
    rules=(
        DraftingRule("greedy"),
        # Rejection sampling does not look for the end of the text
        DraftingRule("stochastic", "--spec-draft-sampling probabilistic", 10, replace(COUNTING, end="passed")),
    ),
    counting=COUNTING,
    source=(
        "`common_sampler_sample_and_accept_n` in common/sampling.cpp of llama.cpp (October 2026), with "
        "`--spec-draft-p-min` 0, the default"
    ),
    is_observed=True,
    vocabulary=(
        "the same type of tokenizer, bos and eos; sizes that differ by at most 128; the same token texts from id 5 on"
    ),
    length="no draft reaches the end of the context, which is the smaller one of target and draft",
    counters="`timings.draft_n` and `timings.draft_n_accepted` of each response of `/completion`",
    figures={
        "mean_acceptance_length": "mean len",
        "acceptance_rate": "draft acceptance",
        "acceptance_rate_per_position": "acceptance rate per pos",
        "drafted": "draft_n",
        "accepted": "draft_n_accepted",
    },
    default_num_draft_tokens=3,
    command_language="bash",
    write_command=write_command,
    write_synthetic_command=write_synthetic_command,
    lookup=NGRAM_SIMPLE,
    checks=CHECKS,
    structured_output=StructuredOutput(
        "`common_sampler_sample` and the two functions after it in common/sampling.cpp of llama.cpp (October 2026)",
        samples_unmasked=True,
    ),
    observer=OBSERVER,
    # `common_speculative_impl_draft_simple` in common/speculative.cpp
    early_end=EarlyEnd("--spec-draft-p-min {threshold}", keeps_token=False, is_of_token=False, top_k=10),
)
