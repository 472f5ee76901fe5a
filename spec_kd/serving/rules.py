"""What can be wrong with a draft and its target, whichever engine serves them.

The record of an engine says which of these conditions it has, and what it does with a pair that does not meet one.
"""

from collections.abc import Callable, Iterator, Sequence

from spec_kd.serving.pair import PairCheck, Problem, ServedModel, ServedPair

SHARE_TOKENIZER = (
    "Train the draft with the target's tokenizer, and save that beside it: `export_draft(processing_class=...)`."
)
DENSE_DRAFT = "Choose a draft whose layers are all attention."


def to_sentence(text: str) -> str:
    """A text with a capital letter and a full stop."""
    return f"{text[:1].upper()}{text[1:]}."


def find_adapter_draft(pair: ServedPair) -> Iterator[Problem]:
    """The draft is a LoRA adapter."""
    if pair.draft.is_adapter:
        yield (
            "The draft is a LoRA adapter on a base model.",
            "Merge it with `export_draft(draft, output_dir)`, or train with `merge_adapter=True`.",
        )


def find_encoder_decoder(pair: ServedPair) -> Iterator[Problem]:
    """A model has an encoder."""
    for model in pair.models:
        if getattr(model.config, "is_encoder_decoder", False):
            yield f"The {model.role} is an encoder-decoder model.", "Use a decoder-only model."


def find_unequal_rows(pair: ServedPair) -> Iterator[Problem]:
    """Draft and target have another number of vocabulary rows."""
    draft, target = pair.draft.rows, pair.target.rows
    if draft != target:
        yield (
            f"The draft has {draft} vocabulary rows (`config.vocab_size`), the target {target}.",
            f"Export the draft with `export_draft(..., target_vocab_size={target})`, or train it with "
            "`align_vocabulary=True`.",
        )


def find_missing_rows(pair: ServedPair) -> Iterator[Problem]:
    """A model has fewer vocabulary rows than its tokenizer has ids."""
    for model in pair.models:
        if model.rows < (ids := max(model.tokens.values()) + 1):
            yield (
                f"The {model.role} has {model.rows} vocabulary rows for the {ids} ids of its tokenizer.",
                "Use the tokenizer that belongs to the model, or add rows with `model.resize_token_embeddings(...)` "
                "and train them.",
            )


def find_different_tokens(pair: ServedPair) -> Iterator[Problem]:
    """A token has another id, or is missing."""
    from spec_kd.vocabulary import compare_tokens

    if differences := compare_tokens(pair.draft.tokenizer, pair.target.tokenizer):
        yield f"The tokens of draft and target differ: {'; '.join(differences)}.", SHARE_TOKENIZER


def find_different_special_tokens(pair: ServedPair) -> Iterator[Problem]:
    """The BOS, EOS or pad token differs, or which of them are added to text."""
    from spec_kd.vocabulary import compare_special_tokens

    for difference in compare_special_tokens(pair.draft.tokenizer, pair.target.tokenizer):
        yield to_sentence(difference), SHARE_TOKENIZER


def find_different_template(pair: ServedPair) -> Iterator[Problem]:
    """The chat template differs."""
    from spec_kd.vocabulary import compare_templates

    for difference in compare_templates(pair.draft.processing_class, pair.target.processing_class):
        yield to_sentence(difference), SHARE_TOKENIZER


def describe_length(pair: ServedPair, needed: int | None) -> Iterator[Problem]:
    """What is wrong with a draft that reads fewer than `needed` tokens; nothing if it reads as many."""
    length = pair.draft.max_length
    if length is not None and needed is not None and length < needed:
        yield (
            f"The draft reads {length} tokens (`max_position_embeddings`), a sequence may need {needed}.",
            f"Train the draft on sequences of {needed} tokens and set `max_position_embeddings` in its config.json to "
            f"{needed}, or serve no sequence of more than {length} tokens.",
        )


def find_short_draft(pair: ServedPair) -> Iterator[Problem]:
    """The draft reads fewer tokens than a sequence may have."""
    yield from describe_length(pair, pair.served_length)


def find_recurrent_draft(pair: ServedPair) -> Iterator[Problem]:
    """A layer of the draft keeps a state that cannot be cut back."""
    if pair.draft.is_recurrent:
        yield _describe_recurrence(pair.draft), DENSE_DRAFT


def find_recurrent_target(pair: ServedPair) -> Iterator[Problem]:
    """A layer of the target keeps a state that cannot be cut back."""
    if pair.target.is_recurrent:
        yield _describe_recurrence(pair.target), "Serve this target without a draft model in this engine."


def _describe_recurrence(model: ServedModel) -> str:
    kinds = ", ".join(sorted(model.layer_types)) or model.config.model_type
    return f"The {model.role} has recurrent layers ({kinds}), whose state a rejected token stays in."


def find_short_window_draft(pair: ServedPair) -> Iterator[Problem]:
    """Layers of the draft see fewer tokens than a sequence may have."""
    yield from _describe_window(pair, pair.draft)


def find_short_window_target(pair: ServedPair) -> Iterator[Problem]:
    """Layers of the target see fewer tokens than a sequence may have."""
    yield from _describe_window(pair, pair.target)


def _describe_window(pair: ServedPair, model: ServedModel) -> Iterator[Problem]:
    if model.window is not None and (pair.served_length is None or model.window < pair.served_length):
        yield (
            f"Layers of the {model.role} see a sliding window of {model.window} tokens.",
            f"Serve no sequence of more than {model.window} tokens, or serve it in another engine.",
        )


def find_multimodal_rope(pair: ServedPair) -> Iterator[Problem]:
    """The draft has rotary positions of several axes."""
    if "mrope_section" in pair.draft.rope:
        yield (
            "The draft has M-RoPE (`mrope_section`), the positions of a vision model.",
            "Choose a text-only draft. With text alone its positions are those of plain RoPE.",
        )


def find_unsplittable_heads(pair: ServedPair) -> Iterator[Problem]:
    """A size of a model is not divisible by the number of cards."""
    size = pair.tensor_parallel_size
    for model in pair.models:
        heads, kv_heads = model.read("num_attention_heads"), model.read("num_key_value_heads")
        inner = model.read("intermediate_size")
        counts = (
            (heads, "attention heads", heads is not None and heads % size),
            (kv_heads, "key-value heads", kv_heads and kv_heads % size and size % kv_heads),
            (inner, "hidden units in its MLP", isinstance(inner, int) and inner % size),
        )
        if wrong := [f"{count} {name}" for count, name, is_wrong in counts if is_wrong]:
            yield (
                f"The {model.role} has {', '.join(wrong)}, which {size} cards cannot share.",
                f"Choose a draft whose sizes are divisible by {size}, or a smaller `tensor_parallel_size`.",
            )


def find_other_precision(pair: ServedPair) -> Iterator[Problem]:
    """The draft is stored in another data type than the target."""
    draft, target = pair.draft.dtype, pair.target.dtype
    if draft and target and draft != target:
        yield (
            f"The draft is stored in {draft}, the target in {target}.",
            f"Save the draft in {target} (`draft.to(torch.{target})`), and measure its acceptance in that.",
        )


def find_wide_draft(pair: ServedPair) -> Iterator[Problem]:
    """The draft is stored in float32 and the target in a type of half the size."""
    if pair.draft.dtype == "float32" and pair.target.dtype in ("bfloat16", "float16"):
        yield from find_other_precision(pair)


def find_parallel_draft(pair: ServedPair) -> Iterator[Problem]:
    """The draft drafts several tokens in one pass."""
    if pair.draft.parallel is not None:
        yield (
            f"The draft drafts {pair.draft.parallel.num_tokens} tokens in one pass.",
            "Serve it with an engine that takes parallel drafts, or use an autoregressive draft.",
        )


def find_longer_round(pair: ServedPair) -> Iterator[Problem]:
    """A round has more tokens than a parallel draft was trained to draft in a pass."""
    parallel, wanted = pair.draft.parallel, pair.num_assistant_tokens
    if parallel is not None and wanted is not None and wanted > parallel.num_tokens:
        yield (
            f"The draft was trained to draft {parallel.num_tokens} tokens in a pass, and {wanted} are asked for.",
            f"Draft {parallel.num_tokens} tokens, or measure the acceptance of those beyond.",
        )


def refuse_quantization(known: Sequence[str]) -> Callable[[ServedPair], Iterator[Problem]]:
    """A condition: weights are quantized with none but these methods."""

    def find_unreadable_weights(pair: ServedPair) -> Iterator[Problem]:
        """Weights are quantized by a method that the engine does not read."""
        for model in pair.models:
            if model.quantization is not None and model.quantization not in known:
                yield (
                    f"The weights of the {model.role} are quantized with `{model.quantization}`.",
                    f"Save the {model.role} in bfloat16, and let the engine quantize it.",
                )

    return find_unreadable_weights


def refuse_defaults(*names: str) -> Callable[[ServedPair], Iterator[Problem]]:
    """A condition: the target's defaults of generation do not penalize tokens by any of these options."""

    def find_target_penalty(pair: ServedPair) -> Iterator[Problem]:
        """The target's defaults of generation penalize tokens."""
        for name in names:
            value = pair.target.read_default(name)
            if value not in (None, float(name == "repetition_penalty")):
                yield (
                    f"`generation_config.json` of the target sets `{name}` to {value:g}.",
                    f"Send `{name}` with each request, or measure acceptance with it.",
                )

    return find_target_penalty


def find_sampling_defaults(pair: ServedPair) -> Iterator[Problem]:
    """The target's defaults of generation sample."""
    temperature = pair.target.read_default("temperature")
    if pair.target.read_default("do_sample") and temperature:
        names = ("temperature", "top_k", "top_p")
        given = {name: value for name in names if (value := pair.target.read_default(name)) is not None}
        yield (
            "`generation_config.json` of the target samples: "
            + ", ".join(f"{name} {value:g}" for name, value in given.items())
            + ".",
            f"Measure acceptance as it is served (`evaluate_draft(temperatures=[{temperature:g}])`), or send "
            "temperature 0.",
        )


# What an engine does that reads nothing but the draft's weights and ids.
OTHER_TEXT = PairCheck(
    find_different_tokens,
    "drafts less",
    "The tokenizers are not compared: what the draft proposes for such an id stands for another text in the target, "
    "which then rejects it.",
)
OTHER_TEMPLATE = PairCheck(
    find_different_template,
    "drafts less",
    "Requests are rendered with the target's template, which a draft that was trained with its own has never seen.",
)
OTHER_SPECIAL_TOKENS = PairCheck(
    find_different_special_tokens,
    "drafts less",
    "The target's tokens are used, so the draft proposes another end of a text, or reads another beginning.",
)
NO_ADAPTER = PairCheck(find_adapter_draft, "refuses", "The engine loads whole models as drafts, and no adapters.")
DECODER_ONLY = PairCheck(find_encoder_decoder, "refuses", "The engine drafts for decoder-only models alone.")
BEYOND_TRAINING = PairCheck(
    find_short_draft,
    "drafts less",
    "The engine goes on drafting beyond that, at positions that the draft was not trained on.",
)
NO_PARALLEL_DRAFT = PairCheck(
    find_parallel_draft,
    "drafts one by one",
    "The engine has no parallel drafting: it runs the draft once for each token, as an autoregressive one.",
)
BEYOND_TRAINED_ROUND = PairCheck(
    find_longer_round, "drafts less", "The draft goes on with masks at places that it was not trained on."
)
COMMON_CHECKS = (NO_ADAPTER, DECODER_ONLY, OTHER_TEMPLATE)
"""Conditions of every engine that takes a decoder-only draft as it is stored."""
