"""The sparse teacher signal of a completion as bytes, small enough to keep for every token, and back.

Bits of a row, all tokens after each other, each part starting on a whole byte:

- counts: how many ids each token has, as the method packs it; the sampled methods write the count of every id in unary,
  which takes exactly `num_draws` bits per token, and `top_k_tail` writes nothing;
- ids: ceil(log2(vocabulary)) bits per id;
- log p: where kept, 16 bits per id, -log p in steps of 2^-10 nats (rounded by less than 0.0005); the highest code
  stands for anything below -63.998, whose probability is 0 for every purpose.

At 50 draws, 12 distinct ids and a vocabulary of 152k that is 33 bytes per token with counts alone, 57 with log p.
"""

import json
from dataclasses import asdict, dataclass

import numpy as np
import torch

from spec_kd.losses import SignalSpec, SparseDistribution, SparseMethod
from spec_kd.open_types import Array

LOG_P_STEPS = 1024
LOWEST_CODE = 2**16 - 1

SPARSE_FEATURE = np.dtype([("id", "<i4"), ("log_p", "<f4"), ("weight", "<f4")])
"""One kept id of a token in memory: `weight` is the share of the draws (1 for top-k), `log_p` NaN where not kept."""

INFO_FORMAT = 2
# Keys of format 1, which had no `format`
OLD_KEYS = {"logprobs_are": "logprobs_mode"}


@dataclass(frozen=True)
class TeacherInfo:
    """Where the teacher columns of a dataset come from; kept as JSON in its `teacher_info` column.

    It is a column and not the dataset's metadata: a column survives `select`, `concatenate_datasets`, streaming and the
    Hub, and takes no room on disk, where equal values are stored once. Nothing in it is about a loss.

    Args:
        target_name (`str`, *optional*): Path or Hub id of the target.
        target (`str`): Identity of its weights, as the engine describes it.
        tokenizer (`str`): `spec_kd.vocabulary.fingerprint_tokenizer` of the target's tokenizer.
        vocab_size (`int`): Number of real ids.
        engine (`str`): Name of the engine that ran the target.
        method (`str`): A name of `SPARSE_METHODS`.
        num_draws (`int`, *optional*): Draws per token, for the sampled methods.
        top_k (`int`, *optional*): Most likely ids per token, for `"top_k_tail"`.
        sampling_temperature (`float`, *optional*): Temperature that the completions were sampled at, 0.0 for greedy;
            `None` if unknown.
        max_new_tokens (`int`, *optional*): Limit that the completions were written under; `None` if unknown.
        logprobs_mode (`str`): Distribution of the log-probabilities: `"processed"` or `"raw"`, as `Engine` explains.
        logprobs_temperature (`float`): Temperature of that distribution.
    """

    target_name: str | None
    target: str
    tokenizer: str
    vocab_size: int
    engine: str
    method: str
    num_draws: int | None
    top_k: int | None
    sampling_temperature: float | None
    max_new_tokens: int | None
    logprobs_mode: str
    logprobs_temperature: float

    def to_json(self) -> str:
        """The fields as one line of JSON, which `from_json` reads."""
        return json.dumps({"format": INFO_FORMAT, **asdict(self)}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "TeacherInfo":
        """Reads what this version or an earlier one wrote; raises `ValueError` for anything else."""
        try:
            facts = {OLD_KEYS.get(name, name): value for name, value in json.loads(text).items()}
            if facts.pop("format", 1) > INFO_FORMAT:
                raise ValueError(f"it has a newer format than {INFO_FORMAT}, the latest of this version")
            return cls(**facts)
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(
                f"The `teacher_info` {text!r:.200} cannot be read ({error}). Create the dataset again, or upgrade "
                "spec_kd if a newer version wrote it."
            ) from error

    @property
    def signal(self) -> SignalSpec:
        """The request that gives such a signal."""
        return SignalSpec(self.method, self.num_draws, self.top_k)

    @property
    def sparse_method(self) -> SparseMethod:
        """The method that kept the ids; raises `ValueError` for one that is not registered."""
        return self.signal.sparse_method


def _count_id_bits(vocab_size: int) -> int:
    return max(1, (vocab_size - 1).bit_length())


def pack_sparse(sparse: SparseDistribution, info: TeacherInfo) -> bytes:
    """What was kept of a completion's distributions, in as few bytes as it needs.

    Args:
        sparse (`SparseDistribution`): T tokens.
        info (`TeacherInfo`): Method, numbers and vocabulary, which say what the bits mean.

    Raises:
        ValueError: If a token does not have as many ids or draws as the method says, or for a number that is no
            log-probability.
    """
    packed = info.sparse_method.pack_counts(sparse, info.signal.size)
    shifts = np.arange(_count_id_bits(info.vocab_size))
    id_bits = (np.concatenate(sparse.ids).astype(np.int64)[:, None] >> shifts) & 1
    packed += np.packbits(id_bits.astype(np.uint8), bitorder="little").tobytes()
    if info.sparse_method.has_log_p:
        log_p = np.concatenate(sparse.log_p or []).astype(np.float64)
        if not (log_p <= 0.01).all():  # False for NaN; a server may round 0 up
            raise ValueError(f"A signal holds {log_p[~(log_p <= 0.01)][0]}, which is no log-probability.")
        codes = np.where(log_p < -(LOWEST_CODE - 1) / LOG_P_STEPS, LOWEST_CODE, np.round(-log_p * LOG_P_STEPS))
        packed += codes.clip(0, LOWEST_CODE).astype("<u2").tobytes()
    return packed


def unpack_sparse(content: bytes, num_tokens: int, info: TeacherInfo) -> tuple[Array, Array]:
    """The reverse of `pack_sparse`.

    Args:
        content (`bytes`): What `pack_sparse` wrote.
        num_tokens (`int`): Tokens of the completion, T.
        info (`TeacherInfo`): As for `pack_sparse`.

    Returns:
        The kept ids of all tokens as records of dtype `SPARSE_FEATURE`, and their number per token, int64 `(T,)`.

    Raises:
        ValueError: If the bytes are not of so many tokens.
    """
    method = info.sparse_method
    per_token, weights, rest = method.unpack_counts(content, num_tokens, info.signal.size)
    total, id_bits = int(per_token.sum()), _count_id_bits(info.vocab_size)
    id_bytes = -(-total * id_bits // 8)
    if len(rest) != id_bytes + 2 * total * method.has_log_p:
        raise ValueError(
            f"A teacher signal of {len(content)} bytes does not belong to {num_tokens} tokens and {info.method!r} with "
            f"{info.vocab_size} ids: the completion was changed after the signal was made. Create the signal again."
        )
    records = np.empty(total, SPARSE_FEATURE)
    flags = np.unpackbits(np.frombuffer(rest[:id_bytes], np.uint8), count=total * id_bits, bitorder="little")
    records["id"] = flags.reshape(total, id_bits) @ (1 << np.arange(id_bits, dtype=np.int64))
    records["weight"], records["log_p"] = weights, np.nan
    if method.has_log_p:
        codes = np.frombuffer(rest[id_bytes:], "<u2")
        records["log_p"] = np.where(codes == LOWEST_CODE, -np.inf, -(codes / LOG_P_STEPS))
    return records, per_token


def split_tokens(records: Array, per_token: Array) -> list[bytes]:
    """The records of each token as bytes: an entry per token, which can be cut and packed with it."""
    content, ends = records.tobytes(), np.cumsum(per_token) * SPARSE_FEATURE.itemsize
    return [
        content[end - size : end]
        for end, size in zip(ends.tolist(), (per_token * SPARSE_FEATURE.itemsize).tolist(), strict=True)
    ]


def pad_tokens(records: Array, per_token: Array) -> Array:
    """The records as `(T, K)` with the largest number of a token, at least 1, as K.

    Unused places have id 0, weight 0 and log p -inf.
    """
    width = max(1, int(per_token.max(initial=0)))
    padded = np.zeros((len(per_token), width), SPARSE_FEATURE)
    padded["log_p"] = -np.inf
    padded[np.arange(width) < per_token[:, None]] = records
    return padded


def to_tensors(padded: Array) -> dict[str, torch.Tensor]:
    """The fields of padded records as tensors, by name: `"id"`, `"log_p"` and `"weight"`."""
    return {name: torch.from_numpy(np.ascontiguousarray(padded[name])) for name in SPARSE_FEATURE.names or ()}
