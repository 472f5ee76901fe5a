"""The sparse teacher signal of a completion as bytes, small enough to keep for every token, and back.

Bits of a row, all tokens after each other, each part starting on a whole byte:

- draws: of the sampled methods, every slot's count in unary (count - 1 zeros, then a one), which takes exactly
  `num_draws` bits a token and says how many slots the token has;
- ids: ceil(log2(vocabulary)) bits per slot;
- log p: where kept, 16 bits per slot, -log p in steps of 2^-10 nats (rounded by less than 0.0005); the highest code
  stands for anything below -63.998, whose probability is 0 for every purpose.

At 50 draws, 12 distinct ids and a vocabulary of 152k that is 33 bytes a token with counts alone, 57 with log p.
"""

import json
from dataclasses import asdict, dataclass

import numpy as np

from spec_kd.engines.base import SignalSpec, SparseDistribution
from spec_kd.losses import SPARSE_METHODS, SparseMethod
from spec_kd.open_types import Array

LOG_P_STEPS = 1024
LOWEST_CODE = 2**16 - 1

SPARSE_FEATURE = np.dtype([("id", "<i4"), ("log_p", "<f4"), ("weight", "<f4")])
"""One slot of a token in memory: `weight` is the share of the draws (1 for top-k), `log_p` NaN where not kept."""


@dataclass(frozen=True)
class TeacherInfo:
    """What the teacher columns of a dataset are of; kept as JSON in its `teacher_info` column.

    A column and not the dataset's metadata: it survives `select`, `concatenate_datasets`, streaming and the Hub, and
    takes no room on disk, where equal values are stored once. Nothing in it is about a loss.

    Args:
        target_name (`str`, *optional*): Path or Hub id of the target.
        target (`str`): What identifies its weights, as the engine tells it.
        tokenizer (`str`): `spec_kd.vocabulary.fingerprint_tokenizer` of the target's.
        vocab_size (`int`): Number of real ids.
        engine (`str`): Which engine ran the target.
        method (`str`): A name of `SPARSE_METHODS`.
        num_draws (`int`, *optional*): Of the sampled methods.
        top_k (`int`, *optional*): Of `"top_k_tail"`.
        sampling_temperature (`float`, *optional*): How the text was sampled, 0.0 for greedy, `None` for text that was
            there already and of which it is not known.
        max_new_tokens (`int`, *optional*): The limit that the text was written under, where it is known.
        logprobs_mode (`str`): `"processed"` or `"raw"`: which distribution the log-probabilities are of.
        logprobs_temperature (`float`): The temperature of that distribution.
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
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "TeacherInfo":
        """Raises `ValueError` for text that another version wrote."""
        try:
            return cls(**json.loads(text))
        except (TypeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"The `teacher_info` {text!r:.200} cannot be read ({error}). Make the dataset anew."
            ) from error

    @property
    def request(self) -> SignalSpec:
        """What an engine has to be asked for, to get such a signal again."""
        return SignalSpec(self.method, self.num_draws, self.top_k)

    @property
    def sparse_method(self) -> SparseMethod:
        """The rule by which the ids were kept, from `SPARSE_METHODS`."""
        return SPARSE_METHODS[self.method]


def _count_id_bits(vocab_size: int) -> int:
    return max(1, (vocab_size - 1).bit_length())


def _pack_bits(values: Array, bits: int) -> bytes:
    return np.packbits(((values[:, None] >> np.arange(bits)) & 1).astype(np.uint8), bitorder="little").tobytes()


def _unpack_bits(content: bytes, count: int, bits: int) -> Array:
    flags = np.unpackbits(np.frombuffer(content, np.uint8), count=count * bits, bitorder="little").reshape(count, bits)
    return flags @ (1 << np.arange(bits, dtype=np.int64))


def pack_sparse(slots: SparseDistribution, info: TeacherInfo) -> bytes:
    """The slots of a completion in as few bytes as they need.

    Args:
        slots (`SparseDistribution`): T tokens.
        info (`TeacherInfo`): Whose method, numbers and vocabulary say what the bits mean.

    Raises:
        ValueError: If a token has another number of slots or draws than the method says, or for what is no
            log-probability.
    """
    ids = np.concatenate(slots.ids).astype(np.int64)
    parts = []
    if info.num_draws is not None:
        for i, counts in enumerate(slots.counts):
            if counts.sum() != info.num_draws:
                raise ValueError(f"Token {i} has {counts.sum()} draws, the dataset {info.num_draws} a token.")
        ends = np.zeros(len(slots.ids) * info.num_draws, np.uint8)
        ends[np.cumsum(np.concatenate(slots.counts)) - 1] = 1
        parts.append(np.packbits(ends, bitorder="little").tobytes())
    elif any(len(token) != info.top_k for token in slots.ids):
        raise ValueError(f"Every token must have {info.top_k} slots, got {sorted({len(t) for t in slots.ids})}.")
    parts.append(_pack_bits(ids, _count_id_bits(info.vocab_size)))
    if info.sparse_method.has_log_p:
        log_p = np.concatenate(slots.log_p).astype(np.float64)
        if not (log_p <= 0.01).all():  # False for NaN; a server may round 0 up
            raise ValueError(f"A signal holds {log_p[~(log_p <= 0.01)][0]}, which is no log-probability.")
        codes = np.where(log_p < -(LOWEST_CODE - 1) / LOG_P_STEPS, LOWEST_CODE, np.round(-log_p * LOG_P_STEPS))
        parts.append(codes.clip(0, LOWEST_CODE).astype("<u2").tobytes())
    return b"".join(parts)


def unpack_sparse(content: bytes, num_tokens: int, info: TeacherInfo) -> tuple[Array, Array]:
    """The slots of a completion.

    Args:
        content (`bytes`): What `pack_sparse` wrote.
        num_tokens (`int`): Tokens of the completion, T.
        info (`TeacherInfo`): As for `pack_sparse`.

    Returns:
        The slots of all tokens, of dtype `SPARSE_FEATURE`, and the number of each token's, `(T,)`.

    Raises:
        ValueError: If the bytes are not of so many tokens.
    """
    weights = None
    if info.num_draws is not None:
        size = -(-num_tokens * info.num_draws // 8)
        bits = np.unpackbits(
            np.frombuffer(content[:size], np.uint8), count=num_tokens * info.num_draws, bitorder="little"
        )
        ends = np.flatnonzero(bits)
        counts = np.diff(ends, prepend=-1)
        per_token = np.bincount(ends // info.num_draws, minlength=num_tokens)
        weights, content = counts / info.num_draws, content[size:]
    else:
        per_token = np.full(num_tokens, info.top_k)
    total, id_bits = int(per_token.sum()), _count_id_bits(info.vocab_size)
    id_bytes = -(-total * id_bits // 8)
    if len(content) != id_bytes + 2 * total * info.sparse_method.has_log_p:
        raise ValueError(
            f"A teacher signal of {len(content)} bytes does not belong to {num_tokens} tokens and {info.method!r} with "
            f"{info.vocab_size} ids: the completion was changed after the signal was made. Make it anew."
        )
    slots = np.empty(total, SPARSE_FEATURE)
    slots["id"] = _unpack_bits(content[:id_bytes], total, id_bits)
    slots["weight"] = 1.0 if weights is None else weights
    slots["log_p"] = np.nan
    if info.sparse_method.has_log_p:
        codes = np.frombuffer(content[id_bytes:], "<u2")
        slots["log_p"] = np.where(codes == LOWEST_CODE, -np.inf, -(codes / LOG_P_STEPS))
    return slots, per_token


def split_tokens(slots: Array, per_token: Array) -> list[bytes]:
    """The slots of each token as bytes: an entry per token, which can be cut and packed with it."""
    content, ends = slots.tobytes(), np.cumsum(per_token) * SPARSE_FEATURE.itemsize
    return [
        content[end - size : end]
        for end, size in zip(ends.tolist(), (per_token * SPARSE_FEATURE.itemsize).tolist(), strict=True)
    ]
