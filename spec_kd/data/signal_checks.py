"""Checks of teacher columns: they belong to the ids of their row, and hold log-probabilities.

Every row that this package makes has a `teacher_checksum`: two numbers that tie the log-probabilities and the packed
signal to the ids of prompt and completion. Rows without it are checked by their numbers alone.
"""

import json
from collections.abc import Sequence

import numpy as np
import xxhash

from spec_kd.data.teacher_signal import TeacherInfo, unpack_sparse
from spec_kd.open_types import Array, Record

CHECKSUM_COLUMN = "teacher_checksum"

# Two parts of a training set may not differ in these: the loss would mean two things.
SHARED_FACTS = ("tokenizer", "vocab_size", "method", "num_draws", "top_k", "logprobs_mode", "logprobs_temperature")

# Log p is stored in steps of 0.001 nats, and other programs round in other ways.
LOG_P_TOLERANCE = 0.01
MASS_TOLERANCE = 0.01


def compute_checksum(
    prompt_ids: Sequence[int], completion_ids: Sequence[int], logprobs: Sequence[float] | None, signal: bytes | None
) -> list[int]:
    """The `teacher_checksum` of a row: a hash of its ids with the log-probabilities, and one with the packed signal.

    Args:
        prompt_ids (`Sequence[int]`), completion_ids (`Sequence[int]`): Ids that the target read and wrote.
        logprobs (`Sequence[float]`, *optional*): `teacher_token_logprobs`, float32.
        signal (`bytes`, *optional*): `teacher_signal`.
    """
    lengths = np.array([len(prompt_ids), len(completion_ids)], "<i8").tobytes()
    ids = lengths + np.asarray([*prompt_ids, *completion_ids], "<i4").tobytes()
    values = b"" if logprobs is None else np.asarray(logprobs, "<f4").tobytes()
    # Arrow's int64 has a sign
    return [xxhash.xxh3_64_intdigest(ids + content) >> 1 for content in (values, signal or b"")]


def check_logprobs(row: Record, where: str) -> None:
    """Raises `ValueError` unless `teacher_token_logprobs` are log-probabilities of this row's completion.

    Args:
        row (`Mapping`): Has `completion_ids`, and may have `prompt_ids` and `teacher_checksum`.
        where (`str`): Names the row in the error.
    """
    values = np.asarray(row["teacher_token_logprobs"], dtype=np.float64)
    length = len(row["completion_ids"])
    if len(values) != length:
        raise ValueError(
            f"{where} has {length} completion tokens but {len(values)} entries in `teacher_token_logprobs`, which must "
            "have one per token. Create the column from these completions."
        )
    bad = np.flatnonzero(~(np.isfinite(values) & (values <= LOG_P_TOLERANCE)))
    if len(bad):
        raise ValueError(
            f"{where}: `teacher_token_logprobs` has {values[bad[0]]} at token {bad[0]}, which is no log-probability of "
            "a token that was written. Create the column again with `score_completions`, or remove the row."
        )
    _check_tie(row, 0, where)


def read_signal(row: Record, info: TeacherInfo, where: str) -> tuple[Array, Array]:
    """Unpacks and checks the signal of a row.

    Args:
        row (`Mapping`): As for [`check_logprobs`], with `teacher_signal`.
        info (`TeacherInfo`): Read from the row.
        where (`str`): Names the row in the error.

    Returns:
        As `unpack_sparse`.

    Raises:
        ValueError: Unless the signal holds distributions, and those of this row's completion.
    """
    try:
        records, per_token = unpack_sparse(row["teacher_signal"], len(row["completion_ids"]), info)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    _check_tie(row, 1, where)
    token = np.repeat(np.arange(len(per_token)), per_token)
    if len(records) and records["id"].max() >= info.vocab_size:
        at = token[records["id"].argmax()]
        raise ValueError(
            f"{where}: the teacher signal has the id {records['id'].max()} at token {at}, beyond the {info.vocab_size} "
            "ids of its vocabulary: it is damaged. Create it again with `score_completions`."
        )
    if not info.sparse_method.has_log_p:
        return records, per_token
    mass = np.bincount(token, np.exp(records["log_p"].astype(np.float64)), minlength=len(per_token))
    pairs = token * np.int64(info.vocab_size) + records["id"]
    if (mass > 1 + MASS_TOLERANCE).any() or len(np.unique(pairs)) < len(pairs):
        at = int(mass.argmax())
        raise ValueError(
            f"{where}: the ids kept at token {at} have a probability of {mass[at]:.4g} together, or one is there "
            "twice: this is no distribution. Create the signal again with `score_completions`."
        )
    logprobs = row.get("teacher_token_logprobs")
    if row.get(CHECKSUM_COLUMN) is None and logprobs is not None and len(logprobs) == len(per_token):
        _check_agreement(row, records, token, np.asarray(logprobs, np.float64), where)
    return records, per_token


def check_same_teacher(infos: Sequence[TeacherInfo]) -> None:
    """Raises `ValueError` unless all come from one target and are one kind of signal, so that one loss fits them."""
    for info in infos[1:]:
        if different := [name for name in SHARED_FACTS if getattr(info, name) != getattr(infos[0], name)]:
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
    """The hash of the weights, or the model's name if that is all the engine knows."""
    try:
        return str(json.loads(info.target)["model"])
    except (ValueError, KeyError, TypeError):
        return info.target


def _check_tie(row: Record, part: int, where: str) -> None:
    expected = row.get(CHECKSUM_COLUMN)
    if expected is None or row.get("prompt_ids") is None:
        return
    columns = ("teacher_token_logprobs", "teacher_signal")
    if compute_checksum(row["prompt_ids"], row["completion_ids"], *map(row.get, columns))[part] != expected[part]:
        raise ValueError(
            f"{where}: `{columns[part]}` does not belong to its `prompt_ids` and `completion_ids`, by its "
            f"`{CHECKSUM_COLUMN}`: rows were shifted, or one of them was changed. Go back to the set as it was made, "
            "or create the signal again with `score_completions`."
        )


def _check_agreement(row: Record, records: Array, token: Array, logprobs: Array, where: str) -> None:
    """For rows without a checksum: both columns must agree on the written token where its id is kept."""
    is_written = records["id"] == np.asarray(row["completion_ids"], np.int64)[token]
    kept, said = records["log_p"][is_written].astype(np.float64), logprobs[token[is_written]]
    apart = np.abs(np.maximum(kept, -64.0) - np.maximum(said, -64.0))
    if (apart > LOG_P_TOLERANCE).any():
        at = int(token[is_written][apart.argmax()])
        raise ValueError(
            f"{where}: `teacher_signal` and `teacher_token_logprobs` have different log-probabilities of the token "
            f"written at {at} ({kept[apart.argmax()]:.3f} and {said[apart.argmax()]:.3f}): rows were shifted, or one "
            "column was changed. Create the signal again with `score_completions`."
        )
