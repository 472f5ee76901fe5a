"""Training rows whose completion is generated: read from a batch, drawn, and put together again."""

from collections.abc import Iterable, Mapping

import torch

from spec_kd.data.training_rows import IGNORED_LABEL
from spec_kd.sampling.drawing import seed_generator
from spec_kd.sampling.input_checks import check_room


def draw_rows(count: int, lmbda: float, seed: str) -> list[bool]:
    """Draws whether each of `count` examples gets a new completion: true with probability `lmbda`.

    Args:
        count (`int`): Number of examples.
        lmbda (`float`): Probability of a new completion.
        seed (`str`): The same seed draws the same examples.
    """
    return (torch.rand(count, generator=seed_generator(seed)) < lmbda).tolist()


def read_rows(batch: dict[str, torch.Tensor]) -> list[dict[str, list[int]]]:
    """The rows that a right-padded batch was made of.

    Args:
        batch (`dict[str, torch.Tensor]`): `input_ids`, `labels` and `attention_mask`, int64 `(B, T)`.
    """
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    columns = {name: batch[name].tolist() for name in ("input_ids", "labels")}
    return [{name: rows[i][:length] for name, rows in columns.items()} for i, length in enumerate(lengths)]


def find_prompt(row: dict[str, list[int]], where: str) -> list[int]:
    """Ids of a row before its completion.

    Args:
        row (`dict[str, list[int]]`): `input_ids` and `labels`, -100 on the prompt.
        where (`str`): Names the row in the error.

    Raises:
        ValueError: Unless the labels are those of a prompt without labels and a completion with them.
    """
    labels = row["labels"]
    start = next((i for i, label in enumerate(labels) if label != IGNORED_LABEL), len(labels))
    if start == 0 or start == len(labels):
        raise ValueError(
            f"{where} has {'no prompt' if start == 0 else 'no completion'}. A new completion replaces the labeled "
            "tokens at the end of a row, after at least one other token. Remove the row, or set `lmbda=0`."
        )
    if IGNORED_LABEL in labels[start:]:
        raise ValueError(
            f"{where} has tokens without a label after its first completion token (token {start}), so it is not a "
            "prompt and one completion. Make a row of each completion, or set `lmbda=0`."
        )
    return list(row["input_ids"][:start])


def join_row(prompt: list[int], completion: list[int]) -> dict[str, list[int]]:
    """A training row with the loss on the completion alone."""
    return {"input_ids": prompt + completion, "labels": [IGNORED_LABEL] * len(prompt) + completion}


def check_row_room(
    rows: Iterable[dict[str, list[int]]], limits: Mapping[str, int | None], max_new_tokens: int, name: str
) -> None:
    """Raises `ValueError` unless every row is a prompt and a completion, with room after the prompt.

    Args:
        rows (`Iterable`): Rows with `input_ids` and `labels`.
        limits (`Mapping[str, int]`): Positions of all that read or write the rows, by their roles; `None` if unlimited.
        max_new_tokens (`int`): Maximum number of tokens to be generated.
        name (`str`): Names the rows in the error.
    """
    lengths = [len(find_prompt(row, f"Row {i} of {name}")) for i, row in enumerate(rows)]
    check_room(lengths, max_new_tokens, limits, name=lambda i: f"The prompt of row {i} of {name}")
