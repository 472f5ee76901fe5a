"""What makes a draft a parallel one: its mask token and the tokens that it drafts in a pass, in its configuration."""

import json
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from jinja2 import TemplateError
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from spec_kd.options import check_int
from spec_kd.vocabulary import ProcessingClass, get_tokenizer

MASK_KEY, NUM_TOKENS_KEY = "pard_token", "num_parallel_tokens"
OTHER_MASK_KEY = "mask_token_id"
"""A key that vLLM reads before `pard_token` (`_init_parallel_drafting_params`)."""
RESERVED_NAME = re.compile(r"[<\[]\W*(reserved|unused|placeholder|control|extra|dummy)", re.IGNORECASE)
"""Names of tokens that tokenizers keep for later: `<|reserved_special_token_0|>`, `<unused7>`, `[control_9]`."""


@dataclass(frozen=True)
class ParallelDrafting:
    """How a parallel draft is asked for tokens.

    The input of a pass is the text x_1 .. x_n and `num_tokens - 1` masks at positions n, n + 1, ..., all with the same
    id. Logits at x_n give the first drafted token, those at the masks the others (PARD, arXiv 2504.18583).

    Args:
        mask_token_id (`int`): Id whose embedding stands for a token that is not known yet.
        num_tokens (`int`): Tokens that one pass drafts, at least 2.

    Raises:
        ValueError: For other numbers.
    """

    mask_token_id: int
    num_tokens: int

    def __post_init__(self) -> None:
        check_int("mask_token_id", self.mask_token_id, minimum=0)
        check_int(NUM_TOKENS_KEY, self.num_tokens, minimum=2)


def read_parallel_drafting(config: PreTrainedConfig) -> ParallelDrafting | None:
    """How the draft of a configuration drafts in parallel; `None` for an autoregressive draft.

    Args:
        config (`PreTrainedConfig`): The draft's configuration, whose keys are `pard_token` and `num_parallel_tokens`.

    Raises:
        ValueError: If it has one key without the other, values that cannot be, or a `mask_token_id` that differs.
    """
    mask, num_tokens = (getattr(config, key, None) for key in (MASK_KEY, NUM_TOKENS_KEY))
    if mask is None and num_tokens is None:
        return None
    if mask is None or num_tokens is None:
        missing, given = (MASK_KEY, NUM_TOKENS_KEY) if mask is None else (NUM_TOKENS_KEY, MASK_KEY)
        meaning = "the id of its mask token" if mask is None else "the number of tokens that it was trained to draft"
        raise ValueError(
            f"The draft's config.json has `{given}` ({mask if num_tokens is None else num_tokens}) and no `{missing}`, "
            f"so it is not known how it drafts. Set `{missing}` to {meaning}."
        )
    parallel = ParallelDrafting(mask, num_tokens)
    other, rows = getattr(config, OTHER_MASK_KEY, None), getattr(config.get_text_config(), "vocab_size", None)
    if other is not None and other != mask:
        raise ValueError(
            f"The draft's config.json has `{OTHER_MASK_KEY}` {other} beside `{MASK_KEY}` {mask}, and vLLM reads the "
            f"first. Remove `{OTHER_MASK_KEY}`."
        )
    if rows is not None and mask >= rows:
        raise ValueError(
            f"`{MASK_KEY}` {mask} of the draft's config.json has no embedding: the draft has {rows} rows. Name an id "
            "below that."
        )
    return parallel


def is_parallel_draft(folder: str | os.PathLike[str]) -> bool:
    """Whether the `config.json` of a folder says that a parallel draft is in it; `False` without one."""
    path = Path(folder, "config.json")
    return path.is_file() and NUM_TOKENS_KEY in json.loads(path.read_text(encoding="utf-8"))


def write_parallel_drafting(config: PreTrainedConfig, parallel: ParallelDrafting) -> None:
    """Writes the keys that `read_parallel_drafting`, vLLM and TensorRT-LLM read, in place.

    Args:
        config (`PreTrainedConfig`): The draft's configuration.
        parallel ([`ParallelDrafting`]): How it drafts.

    Raises:
        ValueError: As [`read_parallel_drafting`].
    """
    setattr(config, MASK_KEY, parallel.mask_token_id)
    setattr(config, NUM_TOKENS_KEY, parallel.num_tokens)
    read_parallel_drafting(config)


def find_mask_token(processing_class: ProcessingClass, mask_token: str | int | None = None) -> int:
    """The id that stands for tokens not known yet: one that the tokenizer has and the target never writes.

    Args:
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`): The target's tokenizer.
        mask_token (`str` or `int`, *optional*):
            A token of the tokenizer, or its id. By default the tokenizer's mask token; else a token with a name such as
            `<|reserved_special_token_0|>` or `<unused0>`; else a special token that neither ends nor pads texts and
            that the chat template does not write; else its unknown token. Of several, the one with the highest id.

    Returns:
        `int`.

    Raises:
        ValueError: If the token is not there, ends or pads texts or is written by the chat template, or if none is left
            to choose.
    """
    tokenizer = get_tokenizer(processing_class)
    ids, used = tokenizer.get_vocab(), _find_used(tokenizer)
    if mask_token is not None:
        chosen = ids.get(mask_token) if isinstance(mask_token, str) else mask_token
        if chosen is None or chosen not in ids.values():
            raise ValueError(
                f"`mask_token={mask_token!r}` is no token of the tokenizer. Name one that the target never writes, or "
                "none to have one chosen."
            )
        if chosen in used:
            raise ValueError(
                f"`mask_token={mask_token!r}` stands in texts: it ends or pads them, or the chat template writes it. "
                "Name a token that the target never reads or writes, or none to have one chosen."
            )
        return chosen
    special = (index for index, token in tokenizer.added_tokens_decoder.items() if token.special)
    unknown = tokenizer.unk_token_id
    for candidates in (
        [tokenizer.mask_token_id],
        (index for token, index in ids.items() if RESERVED_NAME.match(token)),
        (index for index in special if index != unknown),
        [unknown],
    ):
        if free := {index for index in candidates if index is not None} - used:
            return max(free)
    raise ValueError(
        f"Each of the {len(ids)} tokens can stand in a text, so none can be the mask token. Name an ordinary token "
        "that the target never writes as `mask_token`, or add one to the tokenizers and a row to both models "
        "(`tokenizer.add_special_tokens`, `model.resize_token_embeddings`)."
    )


def _find_used(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of tokens that end, begin or pad texts, or that the chat template writes."""
    named = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    template = tokenizer.chat_template or ""
    texts = list(template.values()) if isinstance(template, dict) else [template]
    for roles in (("user", "assistant"), ("system", "user", "assistant")) if template else ():
        with suppress(TemplateError):  # of a template that knows no system message, or wants tools
            messages = [{"role": role, "content": "a"} for role in roles]
            texts.append(str(tokenizer.apply_chat_template(messages, tokenize=False)))
    added = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}
    return {index for index in named if index is not None} | {
        index for token, index in added.items() if any(token in text for text in texts)
    }
