"""Do two models mean the same token by the same id, and do their heads agree on how many ids there are?

A tokenizer has *real* ids `0 .. n - 1`; a head may have more rows than that, because checkpoints pad them to a multiple
of something (Qwen2.5-0.5B has 151,936 rows, the 7B 152,064, both for the same 151,665 ids). Those rows are padding and
are left out on both sides everywhere in this package.
"""

import hashlib
import json
from typing import cast

import torch
from accelerate.utils import is_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from spec_kd.heads import count_rows, unwrap_peft

NUM_DIFFERENCES_SHOWN = 5
PADDING_BIAS = -1e4  # finite in float16, and exp() of it is 0 in every dtype
# Same ids do not mean same merges, normalizer or pre-tokenizer: these texts reach the usual places where they differ.
PROBE_TEXTS = (
    "Hello world, it's 12345.67 o'clock!  Two  spaces\tand a tab.",
    "def f(x):\n    return {'key': [x ** 2, None]}  # comment\n\n\treturn\r\n",
    "Ünïcödé: naïve café, ﬁ ligature, ½, Ⅷ, e\u0301 (combining), \u00a0non-breaking",
    "汉字和標點。日本語のテキスト、한국어 문장, العربية, हिन्दी, ไทย",
    "🙂👩‍👩‍👧🏽 ∑∫√ ≤ → $x_i^{2}$ <b>html</b> https://example.org/a?b=c&d=%20",
    "ALLCAPS camelCase snake_case internationalisation antidisestablishmentarianism",  # stored hashes depend on it
)

ProcessingClass = PreTrainedTokenizerBase | ProcessorMixin


class VocabularyMismatchError(ValueError):
    """Draft and target do not share a vocabulary, or a model's head does not hold all of its ids."""


def get_tokenizer(processing_class: ProcessingClass) -> PreTrainedTokenizerBase:
    """The tokenizer itself, also where it sits inside a processor."""
    return processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class


def count_real_ids(processing_class: ProcessingClass) -> int:
    """Highest id of the tokenizer plus one, added tokens included.

    Not `len(tokenizer)` (which misses holes between ids) and not `config.vocab_size` (which counts padding).
    """
    return max(get_tokenizer(processing_class).get_vocab().values()) + 1


def fingerprint_tokenizer(processing_class: ProcessingClass) -> str:
    """A short hash over all tokens with their ids and the encoding of the probe texts: equal ids for equal text."""
    tokenizer = get_tokenizer(processing_class)
    encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in PROBE_TEXTS]
    content = json.dumps([list(_get_ids(tokenizer).items()), encoded])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def check_same_tokenizer(
    draft_processing_class: ProcessingClass,
    target_processing_class: ProcessingClass,
    names: tuple[str, str] = ("draft", "target"),
) -> None:
    """Checks that both sides give the same ids to the same text.

    Compares all tokens with their ids, then the encoding of a few probe texts (without special tokens: which of those
    are added is a matter of serving, see [`describe_served_differences`]).

    Args:
        draft_processing_class, target_processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`): To compare.
        names (`tuple[str, str]`, *optional*, defaults to `("draft", "target")`): What they are called in the error.

    Raises:
        `VocabularyMismatchError`: Says what differs.
    """
    draft, target = get_tokenizer(draft_processing_class), get_tokenizer(target_processing_class)
    if draft is target:
        return
    differences = compare_tokens(draft, target, names) or _compare_encodings(draft, target, names)
    if differences:
        raise VocabularyMismatchError(
            f"{names[0][:1].upper()}{names[0][1:]} and {names[1]} do not share a tokenizer, so their distributions "
            f"cannot be compared id by id: {'; '.join(differences)}. Choose a draft of the target's family, or train "
            "on the target's text with `BlackBoxSFTTrainer`, which needs no common vocabulary (most servers, however, "
            "want one for a draft model)."
        )


def _get_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    return dict(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))


def compare_tokens(
    draft_processing_class: ProcessingClass,
    target_processing_class: ProcessingClass,
    names: tuple[str, str] = ("draft", "target"),
) -> list[str]:
    """Differences between the tokens of two tokenizers, added tokens included, and between their ids.

    Args:
        draft_processing_class, target_processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`): To compare.
        names (`tuple[str, str]`, *optional*, defaults to `("draft", "target")`): What they are called in the result.

    Returns:
        `list[str]`: One sentence per kind of difference, empty if every token has the same id in both.
    """
    draft, target = (_get_ids(get_tokenizer(one)) for one in (draft_processing_class, target_processing_class))
    differences = []
    if len(draft) != len(target) or max(draft.values()) != max(target.values()):
        differences.append(
            f"the {names[0]} has {len(draft)} tokens with ids up to {max(draft.values())}, "
            f"the {names[1]} {len(target)} with ids up to {max(target.values())}"
        )
    moved = [
        f"{t!r} is {draft[t]} in the {names[0]} and {target[t]} in the {names[1]}"
        for t in draft
        if draft[t] != target.get(t, draft[t])
    ]
    only_draft = [repr(token) for token in draft if token not in target]
    only_target = [repr(token) for token in target if token not in draft]
    for what, tokens in (
        ("other ids", moved),
        (f"only in the {names[0]}", only_draft),
        (f"only in the {names[1]}", only_target),
    ):
        if tokens:
            more = f" and {len(tokens) - NUM_DIFFERENCES_SHOWN} more" if len(tokens) > NUM_DIFFERENCES_SHOWN else ""
            differences.append(f"{what}: {', '.join(tokens[:NUM_DIFFERENCES_SHOWN])}{more}")
    return differences


def _compare_encodings(
    draft: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase, names: tuple[str, str]
) -> list[str]:
    for text in PROBE_TEXTS:
        ours = draft(text, add_special_tokens=False)["input_ids"]
        theirs = target(text, add_special_tokens=False)["input_ids"]
        if ours != theirs:
            return [
                "all tokens have the same ids, but text is cut differently (other merges, normalizer or "
                f"pre-tokenizer): {text!r} becomes {ours[:12]}... in the {names[0]} and {theirs[:12]}... in the "
                f"{names[1]}"
            ]
    return []


def check_head_covers(model: PreTrainedModel, vocab_size: int, role: str) -> None:
    """Checks that `model` has an embedding and a head row for each of `vocab_size` real ids.

    Args:
        model (`PreTrainedModel` or `PeftModel`): Draft or target.
        vocab_size (`int`): Number of real ids, see [`count_real_ids`].
        role (`str`): `"draft"` or `"target"`, for the message.

    Raises:
        `VocabularyMismatchError`: If rows are missing, or the model has no output head.
    """
    model = unwrap_peft(model)
    for what, module in (("output head", model.get_output_embeddings()), ("embedding", model.get_input_embeddings())):
        if module is None:
            raise VocabularyMismatchError(f"The {role} ({type(model).__name__}) has no {what}; a causal LM is needed.")
        rows = count_rows(module)
        if rows < vocab_size:
            raise VocabularyMismatchError(
                f"The {what} of the {role} has {rows} rows but the tokenizer has {vocab_size} real ids, so the last "
                f"{vocab_size - rows} have no row. Use the tokenizer that belongs to the model, or add the rows with "
                "`model.resize_token_embeddings(...)` and train them."
            )


def describe_served_differences(
    draft_processing_class: ProcessingClass, target_processing_class: ProcessingClass
) -> list[str]:
    """What would differ between training with the draft's processing class and serving with the target's.

    In a server the draft reads the target's ids. Where the draft ships another chat template or other special ids,
    training with them teaches a context it never sees: use the target's processing class.

    Returns:
        `list[str]`: One sentence per difference, empty if there is none.
    """
    classes = (draft_processing_class, target_processing_class)
    return compare_templates(*classes) + compare_special_tokens(*classes)


def compare_templates(draft_processing_class: ProcessingClass, target_processing_class: ProcessingClass) -> list[str]:
    """A sentence if two processing classes have different chat templates, in a list; empty if they do not."""
    templates = {str(getattr(one, "chat_template", None)) for one in (draft_processing_class, target_processing_class)}
    return ["the chat templates of draft and target differ"] if len(templates) > 1 else []


def compare_special_tokens(
    draft_processing_class: ProcessingClass, target_processing_class: ProcessingClass
) -> list[str]:
    """Differences between the BOS, EOS and pad tokens of two tokenizers, and between those that they add to text.

    Returns:
        `list[str]`: One sentence per difference, empty if there is none.
    """
    draft, target = get_tokenizer(draft_processing_class), get_tokenizer(target_processing_class)
    differences = []
    for name in ("bos", "eos", "pad"):
        ours, theirs = getattr(draft, f"{name}_token"), getattr(target, f"{name}_token")
        if ours != theirs:
            differences.append(f"the {name.upper()} token is {ours!r} in the draft and {theirs!r} in the target")
    if (
        draft("a")["input_ids"] != target("a")["input_ids"]
        and draft("a", add_special_tokens=False)["input_ids"] == target("a", add_special_tokens=False)["input_ids"]
    ):
        differences.append("draft and target add different special tokens around plain text")
    return differences


def check_alignable(model: PreTrainedModel) -> None:
    """Raises `ValueError` for a model whose embedding has other rows than its head, which no config could tell.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The draft.
    """
    model = unwrap_peft(model)
    embedding, head = count_rows(model.get_input_embeddings()), count_rows(model.get_output_embeddings())
    if embedding != head:
        raise ValueError(
            f"{type(model).__name__} has {embedding} rows in its embedding and {head} in its head, so its vocabulary "
            "cannot be aligned with the target's. Save it without `align_vocabulary` (`target_vocab_size`)."
        )


def align_vocabulary(model: PreTrainedModel, target_rows: int, real_vocab_size: int) -> None:
    """Gives `model` as many embedding and head rows as the target has, in place.

    vLLM, SGLang and `generate(assistant_model=...)` compare `config.vocab_size` of the pair. Rows of real ids do
    not change by a bit, so neither does the distribution over them. Every row beyond the real ids, new
    or old (a padded row keeps whatever it was initialized with, since training leaves it out), becomes the mean of the
    real rows: its logit is the mean of the real logits, so by Jensen's inequality its probability is at most that of
    the average token, 1 / `real_vocab_size`. Where the head has a bias, that of padded rows is -1e4 and their
    probability 0.

    Parameters are replaced, so an optimizer that already holds them would not see it: align a copy, or after training.

    Args:
        model (`PreTrainedModel`): Tied or untied, with or without a head bias. Not a `PeftModel`, nor partitioned.
        target_rows (`int`): Rows of the target's head (`target.config.vocab_size`).
        real_vocab_size (`int`): Number of real ids, see [`count_real_ids`].

    Raises:
        `VocabularyMismatchError`: If `target_rows` or the model's own rows are fewer than `real_vocab_size`.
        `ValueError`: If embedding and head have unequal rows.
        `TypeError`: If the model is a `PeftModel`, or its rows are quantized or partitioned.
    """
    if is_peft_model(model):
        raise TypeError("A `PeftModel` cannot be resized safely: merge it first (`spec_kd.export_draft` does both).")
    if target_rows < real_vocab_size:
        raise VocabularyMismatchError(
            f"Cannot cut the vocabulary to {target_rows} rows: the tokenizer has {real_vocab_size} real ids, and "
            "cutting would remove tokens that are in use."
        )
    check_head_covers(model, real_vocab_size, role="draft")
    check_alignable(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    for module in (embedding, head):
        if hasattr(module.weight, "ds_shape") or not module.weight.is_floating_point():
            raise TypeError(
                f"The rows of {type(module).__name__} are partitioned or quantized and cannot be aligned in place. "
                "Save the model, load it again in full precision on one process, then align it."
            )
    if not count_rows(embedding) == count_rows(head) == target_rows:
        # resizing draws initial values, and saving in mid-training must not change the dropout that follows
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            model.resize_token_embeddings(target_rows, mean_resizing=False)
    _fill_padding_rows(model, real_vocab_size)
    model.config.get_text_config().vocab_size = target_rows


@torch.no_grad()
def _fill_padding_rows(model: PreTrainedModel, real_vocab_size: int) -> None:
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight = cast(torch.Tensor, module.weight)
        if weight.shape[0] > real_vocab_size:
            weight[real_vocab_size:] = weight[:real_vocab_size].mean(dim=0, dtype=torch.float32).to(weight.dtype)
        if getattr(module, "bias", None) is not None:
            cast(torch.Tensor, module.bias)[real_vocab_size:] = PADDING_BIAS
