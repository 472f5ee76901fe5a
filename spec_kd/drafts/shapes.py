"""The shape of a draft: the widths that a donor can give it, and a plain Llama that has them."""

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from spec_kd.drafts.importance import find_layers
from spec_kd.drafts.options import WIDTHS, DraftShapeOptions
from spec_kd.drafts.slicing import check_can_be_sliced, count_widths
from spec_kd.open_types import Arguments
from spec_kd.vocabulary import align_vocabulary, count_real_ids


def resolve_widths(model: PreTrainedModel, options: DraftShapeOptions) -> tuple[bool, dict[str, int]]:
    """Whether sample text is needed to make a draft of this shape, and its widths.

    Args:
        model (`PreTrainedModel`): The donor; its weights are not read.
        options (`DraftShapeOptions`): The shape.

    Raises:
        ValueError: The donor cannot give this shape.
    """
    if options.fresh_layers:
        widths = _choose_fresh_widths(model, options)
        return widths["hidden_size"] != model.config.get_text_config().hidden_size, widths
    return _check_cut(model, options)


def choose_tying(config: PretrainedConfig, options: DraftShapeOptions, widths: dict[str, int]) -> bool:
    """Whether embedding and head of a draft are one matrix."""
    if options.tie_word_embeddings is not None:
        return options.tie_word_embeddings
    return bool(config.tie_word_embeddings) and widths["hidden_size"] == config.hidden_size


def build_llama(
    config: PretrainedConfig, widths: Arguments, num_layers: int, is_tied: bool, seed: int
) -> PreTrainedModel:
    """A Llama with random weights, and with the vocabulary rows and the positions of a donor with this config."""
    built = AutoConfig.for_model(
        "llama",
        **widths,
        vocab_size=config.vocab_size,
        num_hidden_layers=num_layers,
        rope_parameters={"rope_type": "default", "rope_theta": _find_rope_theta(config)},
        tie_word_embeddings=is_tied,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(built, dtype=torch.float32)


def build_untrained(
    model: PreTrainedModel, options: DraftShapeOptions, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """A plain Llama with the shape of the draft that [`~spec_kd.init_draft`] makes of a donor, and random weights.

    Args:
        model (`PreTrainedModel`): The target, as the donor; its weights are not read.
        options (`DraftShapeOptions`): The shape.
        tokenizer (`PreTrainedTokenizerBase`): The target's.

    Raises:
        ValueError: The donor cannot give this shape.
    """
    config, (_, widths) = model.config.get_text_config(), resolve_widths(model, options)
    num_layers = len(options.layers) if options.layers is not None else options.num_hidden_layers
    heads = {} if options.fresh_layers else {"head_dim": getattr(config, "head_dim", None)}
    is_tied = choose_tying(config, options, widths)
    draft = build_llama(config, widths | heads, num_layers or config.num_hidden_layers, is_tied, options.seed)
    fit_to_target(draft, config, tokenizer)
    return draft


def fit_to_target(draft: PreTrainedModel, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Gives a draft the target's vocabulary rows, context length and special ids, in place.

    Args:
        draft (`PreTrainedModel`): The draft.
        config (`PretrainedConfig`): Config of the target.
        tokenizer (`PreTrainedTokenizerBase`): Tokenizer of the target.
    """
    num_ids = count_real_ids(tokenizer)
    align_vocabulary(draft, max(config.vocab_size, num_ids), num_ids)
    own = draft.config.get_text_config()
    own.max_position_embeddings = getattr(config, "max_position_embeddings", own.max_position_embeddings)
    ids = {name: getattr(config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for name, value in ids.items():
        setattr(own, name, value)
    draft.generation_config = GenerationConfig(**ids)


def _check_cut(model: PreTrainedModel, options: DraftShapeOptions) -> tuple[bool, dict[str, int]]:
    config, num_layers = model.config.get_text_config(), len(find_layers(model))
    kept = max(options.layers, default=0) + 1 if options.layers is not None else options.num_hidden_layers or 1
    if kept > num_layers:
        raise ValueError(f"The donor has {num_layers} layers, and {options.layers or kept} are asked for.")
    widths: Arguments = {name: getattr(options, name) or getattr(config, name, None) for name in WIDTHS}
    is_sliced = any(widths[name] != getattr(config, name, None) for name in WIDTHS)
    if is_sliced:
        check_can_be_sliced(model)
        larger = [
            f"{name}={widths[name]} (donor: {old})" for name, old in count_widths(config).items() if widths[name] > old
        ]
        if larger:
            raise ValueError(
                f"A donor cannot grow: {', '.join(larger)}. Choose smaller widths, or `fresh_layers=True`."
            )
        heads, shared = widths["num_attention_heads"], widths["num_key_value_heads"]
        most = config.num_attention_heads // config.num_key_value_heads
        if heads % shared or heads // shared > most:
            raise ValueError(
                f"`num_attention_heads={heads}` and `num_key_value_heads={shared}` do not fit: a key and value head of "
                f"the donor serves {most} heads. Choose a multiple of `num_key_value_heads`, at most {most} times it."
            )
    return is_sliced or (options.num_hidden_layers or num_layers) < num_layers, widths


def _choose_fresh_widths(model: PreTrainedModel, options: DraftShapeOptions) -> dict[str, int]:
    """Widths of a draft with fresh layers: those given, else in the proportions of Llama for its hidden size."""
    config = model.config.get_text_config()
    hidden_size = options.hidden_size or config.hidden_size
    if hidden_size > config.hidden_size:
        raise ValueError(
            f"`hidden_size={hidden_size}` is larger than the donor's {config.hidden_size}, whose embeddings are "
            "projected. Choose a smaller one."
        )
    heads = options.num_attention_heads or max(1, hidden_size // 64)
    shared = options.num_key_value_heads or heads
    if hidden_size % heads or heads % shared or hidden_size // heads % 2:
        raise ValueError(
            f"`hidden_size={hidden_size}` does not split into {heads} heads of an even width, or these not into "
            f"{shared} key and value heads. Set `num_attention_heads` and `num_key_value_heads`."
        )
    return {
        "hidden_size": hidden_size,
        "intermediate_size": options.intermediate_size or 64 * max(1, round(hidden_size * 8 / 3 / 64)),
        "num_attention_heads": heads,
        "num_key_value_heads": shared,
    }


def _find_rope_theta(config: PretrainedConfig) -> float:
    parameters = getattr(config, "rope_parameters", None) or {}
    return float(parameters.get("rope_theta") or getattr(config, "rope_theta", None) or 10_000.0)
