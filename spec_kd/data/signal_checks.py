"""What passed through other hands is checked: a teacher's columns are of their own ids, and hold log-probabilities.

Every row that is made here has a `teacher_checksum`: two numbers that tie the log-probabilities and the packed signal
to the ids of prompt and completion. Rows without one are checked by their numbers alone.
"""

import json
import math
from collections.abc import Sequence

import numpy as np
import xxhash

from spec_kd.data.teacher_signal import TeacherInfo
from spec_kd.open_types import Array, Record

CHECKSUM_COLUMN = "teacher_checksum"

# What two parts of one training set may not differ in: the loss would mean two things.
SHARED_FACTS = ("tokenizer", "vocab_size", "method", "num_draws", "top_k", "logprobs_mode", "logprobs_temperature")

# A log p is stored in steps of 0.001 nats, and other programs round in ways of their own.
LOG_P_TOLERANCE = 0.01
MASS_TOLERANCE = 0.01


def compute_checksum(
    prompt_ids: Sequence[int], completion_ids: Sequence[int], logprobs: Sequence[float] | None, signal: bytes | None
) -> list[int]:
    """The `teacher_checksum` of a row: of its ids with the log-probabilities, and of its ids with the packed signal.

    Args:
        prompt_ids (`Sequence[int]`), completion_ids (`Sequence[int]`): What the target read and wrote.
        logprobs (`Sequence[float]`, *optional*): `teacher_token_logprobs`, float32.
        signal (`bytes`, *optional*): `teacher_signal`.
    """
    start = xxhash.xxh3_64(np.array([len(prompt_ids), len(completion_ids)], "<i8").tobytes())
    for ids in (prompt_ids, completion_ids):
        start.update(np.asarray(ids, "<i4").tobytes())
    numbers = []
    for content in (b"" if logprobs is None else np.asarray(logprobs, "<f4").tobytes(), signal or b""):
        digest = start.copy()
        digest.update(content)
        numbers.append(digest.intdigest() >> 1)  # Arrow's int64 has a sign
    return numbers


def check_logprobs(row: Record, where: str) -> None:
    """Raises `ValueError` unless `teacher_token_logprobs` are log-probabilities, and those of this row's completion.

    Args:
        row (`Mapping`): With `completion_ids`, and `prompt_ids` and `teacher_checksum` where it has them.
        where (`str`): Names the row in the error.
    """
    values = np.asarray(row["teacher_token_logprobs"], dtype=np.float64)
    length = len(row["completion_ids"])
    if len(values) != length:
        raise ValueError(
            f"{where} has {length} completion tokens but {len(values)} entries in `teacher_token_logprobs`, which must "
            "have one per token. Make the column from these completions."
        )
    bad = np.flatnonzero(~(np.isfinite(values) & (values <= LOG_P_TOLERANCE)))
    if len(bad):
        raise ValueError(
            f"{where}: `teacher_token_logprobs` has {values[bad[0]]} at token {bad[0]}, which is no log-probability of "
            "a token that was written. Make the column anew with `score_completions`, or remove the row."
        )
    _check_tie(row, 0, where)


def check_sparse(row: Record, slots: Array, per_token: Array, info: TeacherInfo, where: str) -> None:
    """Raises `ValueError` unless an unpacked signal holds distributions, and those of this row's completion.

    Args:
        row (`Mapping`): As for [`check_logprobs`], with `teacher_signal`.
        slots (`np.ndarray`), per_token (`np.ndarray`): What `unpack_sparse` returned.
        info (`TeacherInfo`): Of the row.
        where (`str`): Names the row in the error.
    """
    _check_tie(row, 1, where)
    token = np.repeat(np.arange(len(per_token)), per_token)
    if len(slots) and slots["id"].max() >= info.vocab_size:
        at = token[slots["id"].argmax()]
        raise ValueError(
            f"{where}: the teacher signal has the id {slots['id'].max()} at token {at}, beyond the {info.vocab_size} "
            "ids of its vocabulary: it is damaged. Make it anew with `score_completions`."
        )
    if not info.sparse_method.has_log_p:
        return
    mass = np.bincount(token, np.exp(slots["log_p"].astype(np.float64)), minlength=len(per_token))
    pairs = token * np.int64(info.vocab_size) + slots["id"]
    if (mass > 1 + MASS_TOLERANCE).any() or len(np.unique(pairs)) < len(pairs):
        at = int(mass.argmax())
        raise ValueError(
            f"{where}: the ids kept at token {at} have a probability of {mass[at]:.4g} together, or one is there "
            "twice: this is no distribution. Make the signal anew with `score_completions`."
        )
    logprobs = row.get("teacher_token_logprobs")
    if row.get(CHECKSUM_COLUMN) is None and logprobs is not None and len(logprobs) == len(per_token):
        _check_agreement(row, slots, token, np.asarray(logprobs, np.float64), where)


def check_same_teacher(infos: Sequence[TeacherInfo]) -> None:
    """Raises `ValueError` unless one loss can mean all of these: one target, one kind of signal."""
    for info in infos[1:]:
        different = [name for name in SHARED_FACTS if getattr(info, name) != getattr(infos[0], name)]
        if different:
            listed = "; ".join(f"{name}: {getattr(infos[0], name)} and {getattr(info, name)}" for name in different)
            raise ValueError(f"The dataset mixes teacher signals of two kinds ({listed}). Train on one of them.")
        one, other = _identify_target(infos[0]), _identify_target(info)
        has_same_name = info.target_name is not None and info.target_name == infos[0].target_name
        if one != other and not (has_same_name and info.engine != infos[0].engine):
            names = [
                f"{i.target_name or 'a model without a name'} ({_identify_target(i)[:12]})" for i in (infos[0], info)
            ]
            raise ValueError(
                f"The dataset has the signals of two targets, {names[0]} and {names[1]}: a draft can follow only one. "
                "Keep the rows of one `teacher_info`."
            )


def _identify_target(info: TeacherInfo) -> str:
    """The hash of the weights, or the model's name where an engine has no more."""
    try:
        return str(json.loads(info.target)["model"])
    except (ValueError, KeyError, TypeError):
        return info.target


def _check_tie(row: Record, part: int, where: str) -> None:
    expected = row.get(CHECKSUM_COLUMN)
    if expected is None or row.get("prompt_ids") is None:
        return
    column = ("teacher_token_logprobs", "teacher_signal")[part]
    values = (row.get("teacher_token_logprobs"), row.get("teacher_signal"))
    if compute_checksum(row["prompt_ids"], row["completion_ids"], *values)[part] != expected[part]:
        raise ValueError(
            f"{where}: `{column}` does not belong to its `prompt_ids` and `completion_ids`, by its "
            f"`{CHECKSUM_COLUMN}`: rows were shifted, or one of them was changed. Go back to the set as it was made, "
            "or make the signal anew with `score_completions`."
        )


def _check_agreement(row: Record, slots: Array, token: Array, logprobs: Array, where: str) -> None:
    """Without a checksum: where the written token is among the ids kept, both columns must say the same of it."""
    written = np.asarray(row["completion_ids"], np.int64)
    is_written = slots["id"] == written[token]
    kept, said = slots["log_p"][is_written].astype(np.float64), logprobs[token[is_written]]
    apart = np.abs(np.maximum(kept, -64.0) - np.maximum(said, -64.0))
    if (apart > LOG_P_TOLERANCE).any():
        at = int(token[is_written][apart.argmax()])
        raise ValueError(
            f"{where}: of the token written at {at}, `teacher_signal` and `teacher_token_logprobs` have two different "
            f"log-probabilities ({kept[apart.argmax()]:.3f} and {said[apart.argmax()]:.3f}): rows were shifted, or one "
            "column was changed. Make the signal anew with `score_completions`."
        )


def is_reference_score(value: float) -> bool:
    """Whether a number can be a KL divergence, up to rounding."""
    return math.isfinite(value) and value >= -LOG_P_TOLERANCE
