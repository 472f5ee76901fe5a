"""Rows that replay reads: prompt and completion ids, and the format that the completion was held to, all checked."""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from datasets import Dataset
from transformers import PreTrainedModel

from spec_kd.evaluation.options import ReplayOptions
from spec_kd.open_types import JsonValue, Record
from spec_kd.sampling.generation import find_special_ids
from spec_kd.sampling.response_format import ResponseFormat
from spec_kd.sampling.token_masks import TokenMasks
from spec_kd.vocabulary import ProcessingClass

ResponseRows = Iterable[Mapping[str, Sequence[int]]]


class Response(NamedTuple):
    """A completion with what was read before it.

    Args:
        prompt (`list[int]`): Ids of the prompt.
        completion (`list[int]`): Ids that follow it.
        row (`Mapping[str, Any]`): The whole row.
        format (`ResponseFormat`, *optional*): What the server held the completion to; `None` for free text.
        written (`list[int]`): Last ids of the prompt that are part of that format.
    """

    prompt: list[int]
    completion: list[int]
    row: Record = MappingProxyType({})
    format: ResponseFormat | None = None
    written: Sequence[int] = ()

    @property
    def text(self) -> list[int]:
        """Ids of prompt and completion."""
        return self.prompt + self.completion


def read_responses(responses: ResponseRows, options: ReplayOptions, vocab_size: int) -> list[Response]:
    """Prompt and completion ids, each with its row and its format.

    Raises:
        ValueError: A row is unusable (names it), or there are none.
    """
    read = []
    for i, row in enumerate(responses):
        missing = [name for name in ("prompt_ids", "completion_ids") if name not in row]
        if missing:
            raise ValueError(
                f"The responses have no {' and no '.join(missing)}, only {sorted(row)}. "
                "`spec_kd.generate_responses` returns what is needed."
            )
        wanted = read_format(row.get("response_format"), i)
        one = Response(list(row["prompt_ids"]), list(row["completion_ids"]), row, wanted or options.response_format)
        for name, ids in (("prompt", one.prompt), ("completion", one.completion)):
            if not ids:
                raise ValueError(f"The {name} of row {i} has no tokens. Remove the row.")
            if max(ids) >= vocab_size:
                raise ValueError(
                    f"Row {i} contains id {max(ids)}, but draft and target share only ids below {vocab_size}. It is of "
                    "another tokenizer, or `vocab_size` is too small."
                )
        if options.max_new_tokens is not None and len(one.completion) > options.max_new_tokens:
            raise ValueError(
                f"The completion of row {i} has {len(one.completion)} tokens, more than "
                f"`max_new_tokens={options.max_new_tokens}`. Pass the limit that the target wrote it under."
            )
        read.append(one)
    if not read:
        raise ValueError("There are no responses to replay. Pass at least one of the target.")
    return read


def list_formats(dataset: Dataset, default: ResponseFormat | None) -> list[ResponseFormat | None]:
    """What the completion of each row is held to, by its `response_format`, else `default`; empty if all are free.

    Raises:
        ValueError: A `response_format` names no format.
    """
    column = dataset["response_format"] if "response_format" in dataset.column_names else [None] * len(dataset)
    formats = [read_format(value, i) or default for i, value in enumerate(column)]
    return formats if any(formats) else []


def read_format(value: JsonValue, row: int) -> ResponseFormat | None:
    """What the `response_format` of a row says; raises `ValueError` that names the row."""
    return ResponseFormat.of_request(value, f"`response_format` of row {row}")


def make_masks(
    responses: Sequence[Response],
    options: ReplayOptions,
    model: PreTrainedModel,
    processing_class: ProcessingClass | None,
    vocab_size: int,
) -> TokenMasks | None:
    """The masks of formats that the responses were held to; `None` if all of them are free text.

    Args:
        responses (`Sequence[Response]`): The responses.
        options (`ReplayOptions`): The serving engine and the sampling.
        model (`PreTrainedModel`): The target, or without it the draft, whose EOS ids end a completion.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*): The target's.
        vocab_size (`int`): Number of real ids.

    Raises:
        ValueError: The tokenizer is missing, a completion does not have its format, or what the engine does is not
            known.
        ImportError: XGrammar is missing.
    """
    if not any(one.format for one in responses):
        return None
    options.check_structured_output()
    if processing_class is None:
        raise ValueError("A JSON schema or a grammar is one of texts. Pass `processing_class`, the target's tokenizer.")
    masks = TokenMasks(processing_class, vocab_size, find_special_ids(model, processing_class)[0])
    for i, one in enumerate(responses):
        if one.format is not None:
            masks.check(one.format, one.completion, f"row {i}")
    return masks
