"""Responses that are stored with the target's log-probabilities, which an evaluation needs in place of the target."""

from collections.abc import Mapping, Sequence

import numpy as np
from datasets import Dataset

from spec_kd.data.prompt_rendering import Prompts
from spec_kd.data.signal_checks import check_logprobs, read_signal
from spec_kd.data.teacher_signal import TeacherInfo, pad_tokens, to_tensors
from spec_kd.losses import SparseTensors
from spec_kd.open_types import Record


def check_stored_logprobs(responses: Sequence[Record], temperature: float) -> None:
    """Raises `ValueError` unless every response has log-probabilities of the distribution it was sampled from."""
    for i, row in enumerate(responses):
        if row.get("teacher_token_logprobs") is None or "teacher_info" not in row:
            raise ValueError(
                f"Replay at temperature {temperature} needs the target's probabilities, but row {i} has none. Pass "
                "`target`, or responses made with a `teacher_signal`."
            )
        info = TeacherInfo.from_json(row["teacher_info"])
        if not info.sampling_temperature == info.logprobs_temperature == temperature:
            raise ValueError(
                f"Row {i} was sampled at temperature {info.sampling_temperature} and its log-probabilities are "
                f"{info.logprobs_mode}, at temperature {info.logprobs_temperature}; exact replay at {temperature} "
                "needs both at it. Pass `target`, or make the responses with processed log-probabilities."
            )
        check_logprobs(row, f"Row {i}")


def read_stored_sparse(responses: Sequence[Record]) -> SparseTensors | None:
    """What is stored of the target's distributions with log-probabilities, for the tokens of all responses in a row.

    Returns:
        `SparseTensors` of N tokens; `None` if a response has no log-probabilities but the tokens' own, or the methods
        of the responses differ.
    """
    infos = [TeacherInfo.from_json(row["teacher_info"]) for row in responses]
    method = infos[0].sparse_method
    has_signal = all(row.get("teacher_signal") is not None for row in responses)
    if not (has_signal and method.has_log_p and all(info.sparse_method == method for info in infos)):
        return None
    unpacked = [read_signal(row, info, f"Row {i}") for i, (row, info) in enumerate(zip(responses, infos, strict=True))]
    tensors = to_tensors(pad_tokens(*(np.concatenate(parts) for parts in zip(*unpacked, strict=True))))  # (N, K)
    return method.build_tensors(tensors["id"], tensors["log_p"], tensors["weight"])


def split_by_temperature(responses: Prompts) -> dict[float, Dataset]:
    """Stored responses by the temperature they were sampled at; empty for anything else.

    Responses of which the temperature is not known are left out, since they cannot be replayed.
    """
    if not isinstance(responses, Dataset) or not {"completion_ids", "teacher_info"} <= set(responses.column_names):
        return {}
    rows: dict[float, list[int]] = {}
    for i, text in enumerate(responses["teacher_info"]):
        temperature = TeacherInfo.from_json(text).sampling_temperature
        if temperature is not None:
            rows.setdefault(temperature, []).append(i)
    return {temperature: responses.select(rows[temperature]) for temperature in sorted(rows)}


def find_max_new_tokens(responses: Mapping[float, Dataset]) -> int | None:
    """The limit that stored responses were written under; `None` if it is unknown.

    Raises:
        ValueError: If they were written under different limits.
    """
    infos = {text for rows in responses.values() for text in rows.unique("teacher_info")}
    limits = {info.max_new_tokens for info in map(TeacherInfo.from_json, infos) if info.max_new_tokens is not None}
    if len(limits) > 1:
        raise ValueError(
            f"The responses were written under different limits ({sorted(limits)} new tokens), but replay needs one. "
            "Pass `max_new_tokens`, or evaluate them apart."
        )
    return limits.pop() if limits else None
