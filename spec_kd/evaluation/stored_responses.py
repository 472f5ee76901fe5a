"""Texts that come with what the target thought of them: all that an evaluation needs, without the target."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset

from spec_kd.data.signal_checks import check_logprobs, read_signal
from spec_kd.data.teacher_signal import TeacherInfo, pad_tokens, to_tensors
from spec_kd.losses import SparseTensors
from spec_kd.open_types import Record


def check_stored_logprobs(texts: Sequence[Record], temperature: float) -> None:
    """Raises `ValueError` unless every text has log-probabilities of the distribution it was sampled from."""
    for i, row in enumerate(texts):
        if row.get("teacher_token_logprobs") is None or "teacher_info" not in row:
            raise ValueError(
                f"Text sampled at temperature {temperature} needs the target's probabilities, and row {i} has none of "
                "its own. Pass `target`, or responses made with a `teacher_signal`."
            )
        info = TeacherInfo.from_json(row["teacher_info"])
        if not info.sampling_temperature == info.logprobs_temperature == temperature:
            raise ValueError(
                f"Row {i} was sampled at temperature {info.sampling_temperature} and its log-probabilities are "
                f"{info.logprobs_mode}, at temperature {info.logprobs_temperature}; exact replay at {temperature} "
                "needs both at it. Pass `target`, or make the responses with processed log-probabilities."
            )
        check_logprobs(row, f"Row {i}")


def read_stored_sparse(texts: Sequence[Record]) -> SparseTensors | None:
    """What was kept of the target's distribution with its log-probabilities, for the tokens of all texts in a row.

    Returns:
        `SparseTensors` of N tokens; `None` where a text has no log-probabilities but the tokens' own, or the texts were
        made by different methods.
    """
    infos = [TeacherInfo.from_json(row["teacher_info"]) for row in texts]
    method = infos[0].sparse_method
    has_signal = all(row.get("teacher_signal") is not None for row in texts)
    if not (has_signal and method.has_log_p and all(info.sparse_method == method for info in infos)):
        return None
    unpacked = [read_signal(row, info, f"Row {i}") for i, (row, info) in enumerate(zip(texts, infos, strict=True))]
    tensors = to_tensors(pad_tokens(*(np.concatenate(parts) for parts in zip(*unpacked, strict=True))))  # (N, K)
    return method.build_tensors(tensors["id"], tensors["log_p"], tensors["weight"])


def split_by_temperature(texts: Any) -> dict[float, Dataset]:
    """A distilled set by the temperature its texts were sampled at; nothing for anything else.

    Texts whose sampling is not known are left out: they cannot be replayed.
    """
    if not isinstance(texts, Dataset) or not {"completion_ids", "teacher_info"} <= set(texts.column_names):
        return {}
    rows: dict[float, list[int]] = {}
    for i, text in enumerate(texts["teacher_info"]):
        temperature = TeacherInfo.from_json(text).sampling_temperature
        if temperature is not None:
            rows.setdefault(temperature, []).append(i)
    return {temperature: texts.select(rows[temperature]) for temperature in sorted(rows)}


def find_max_new_tokens(texts: Mapping[float, Dataset]) -> int | None:
    """The limit that stored texts were written under, where they say so and agree.

    Raises:
        ValueError: If they were written under different limits.
    """
    found = {TeacherInfo.from_json(t).max_new_tokens for part in texts.values() for t in part.unique("teacher_info")}
    found -= {None}
    if len(found) > 1:
        raise ValueError(
            f"The texts were written under different limits ({sorted(found)} new tokens), and replay needs one. Pass "
            "`max_new_tokens`, or evaluate them apart."
        )
    return found.pop() if found else None
