r"""Reads tokens and their log-probabilities from the answers of servers, as ids of the target's tokenizer.

Log-probabilities belong to ids, but OpenAI's completions API names tokens by strings. These look as follows:
- `"token_id:123"`: vLLM with `return_tokens_as_token_ids`; exact.
- an entry with an `id`: llama.cpp, whose `/v1/completions` answers in the shape of the chat API; exact.
- `" the"`: the decoded token (SGLang, TensorRT-LLM, vLLM without the option, OpenAI). Several ids may decode to one
  string: every part of a character of a byte-level tokenizer is "\ufffd", and a sentencepiece word loses its space.
- `"Ġthe"` or `"▁the"`: the token as in the vocabulary (older vLLM).
- `"bytes:\\xe2\\x80"`: OpenAI, for part of a character.
A string counts as an id only if it belongs to exactly one id. Nothing is guessed or tokenized again.
"""

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from spec_kd.engines.base import Completion
from spec_kd.losses import SparseDistribution
from spec_kd.open_types import JsonValue, Record

TOKEN_ID = re.compile(r"token_id:(\d+)")
BYTES = re.compile(r"bytes:((?:\\x[0-9a-fA-F]{2})+)")
BYTE_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")
REPLACEMENT = "\ufffd"
LEAST_LOG_P = -9999.0  # what servers write for log 0, as JSON has no infinity
MOST_LOG_P = 1e-3  # rounding of a 16-bit softmax
NUM_EXAMPLES = 5

Token = int | str


class UnidentifiedTokensError(ValueError):
    """The server named tokens by strings that are not exactly one id, so some completions have no exact ids.

    Args:
        names (`Sequence[list[str]]`): Such tokens of each completion of the batch, as the server named them; empty for
            a completion that is whole.
        completions (`list[Completion | None]`): Completions of the batch, `None` where the ids are unknown.

    Attributes:
        names (`list[list[str]]`): The argument.
        completions (`list[Completion | None]`): The argument.
        count (`int`): Number of such tokens, in all completions together.
        examples (`list[str]`): A few of these tokens.
    """

    def __init__(self, names: Sequence[list[str]], completions: list[Completion | None]):
        self.names, self.completions, self.count = list(names), completions, sum(map(len, names))
        self.examples = list_examples(names)
        super().__init__(
            f"{self.count} tokens, in {sum(c is None for c in completions)} of {len(completions)} completions, are not "
            f"exactly one id of the tokenizer, such as {', '.join(map(repr, self.examples))}. Use a server that "
            "returns ids: vLLM from 0.10.2 and recent SGLang do, and llama.cpp does except for tokens that end inside "
            'a character. Or leave these completions out: pass `on_unidentified_token="drop"` to `generate_responses`, '
            "or take those in `error.completions` that are not `None`."
        )

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.names, self.completions)


def list_examples(names: Iterable[Sequence[str]]) -> list[str]:
    """A few different names out of those of all completions."""
    return list(itertools.islice(dict.fromkeys(itertools.chain.from_iterable(names)), NUM_EXAMPLES))


@dataclass(frozen=True)
class Position:
    """A token as the server describes it.

    Args:
        token (`int` or `str`): Id or name.
        log_p (`float`, *optional*): Log-probability; `None` if the server gives none.
        top (`list[tuple[int | str, float | None]]`, *optional*): Most likely tokens with their log-probabilities.
    """

    token: Token
    log_p: float | None
    top: list[tuple[Token, float | None]] | None


class MalformedResponseError(ValueError):
    """The parts of an answer do not fit together. The message says which."""


class FullContextError(MalformedResponseError):
    """An answer ends before its limit, because the server has no room for more tokens after this prompt."""


class UnidentifiedTokens(Exception):  # noqa: N818  # caught within the engine, which counts them over the batch
    """A completion has tokens whose `names` are not exactly one id."""

    def __init__(self, names: Sequence[str]):
        super().__init__(f"{len(names)} tokens without an id")
        self.names = list(names)


def read_positions(choice: Record) -> list[Position] | None:
    """Reads the log-probabilities of a choice, in the form of the completions API or of the chat API.

    Returns:
        `list[Position]`, or `None` if there are none.

    Raises:
        MalformedResponseError: Lists have different lengths, or values are no log-probabilities.
    """
    logprobs = choice["logprobs"] if isinstance(choice.get("logprobs"), Mapping) else {}
    if logprobs.get("content") is not None:
        return [
            Position(
                _name(entry),
                _read_log_p(entry.get("logprob")),
                [(_name(other), _read_log_p(other.get("logprob"))) for other in entry.get("top_logprobs") or []],
            )
            for entry in logprobs["content"]
        ]
    tokens, values = logprobs.get("tokens"), logprobs.get("token_logprobs")
    if tokens is None or values is None:
        return None
    tops = logprobs.get("top_logprobs") or [None] * len(tokens)
    if not len(tokens) == len(values) == len(tops):
        raise MalformedResponseError(
            f"the log-probabilities have {len(tokens)} tokens, {len(values)} values and {len(tops)} lists of the most "
            "likely tokens"
        )
    return [
        Position(token, _read_log_p(value), top and [(name, _read_log_p(log_p)) for name, log_p in top.items()])
        for token, value, top in zip(tokens, values, tops, strict=True)
    ]


def _name(entry: Record) -> Token:
    return entry["id"] if isinstance(entry.get("id"), int) else entry.get("token", "")


def _read_log_p(value: JsonValue) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value) or value > MOST_LOG_P:
        raise MalformedResponseError(f"{value!r} is not a log-probability")
    return min(float(value), 0.0)


class TokenNames:
    """Finds the id that a server means by the name of a token.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Tokenizer of the target.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer

    def find_ids(self, names: Sequence[Token], spelling: Mapping[str, int | None]) -> list[int | None]:
        """Finds the id of each name, in a spelling from [`pick_spelling`]; `None` where it is not exactly one."""
        return [self._find(name, spelling) for name in names]

    def pick_spelling(self, names: Iterable[Token]) -> Mapping[str, int | None]:
        """Picks the spelling in which more of the names are known: decoded, or as in the vocabulary."""
        texts = [name for name in names if isinstance(name, str) and not TOKEN_ID.fullmatch(name)]
        if not texts:
            return {}
        num_decoded = sum(text in self._by_text for text in texts)
        return self._by_key if sum(text in self._by_key for text in texts) > num_decoded else self._by_text

    def is_exact(self, name: Token) -> bool:
        """Whether the name is itself an id."""
        return _read_exact_id(name) is not None

    def means(self, name: Token, id: int) -> bool:
        """Whether the name can mean this id, even if it could mean others too."""
        if (exact := _read_exact_id(name)) is not None:
            return exact == id
        if match := BYTES.fullmatch(str(name)):
            return self._bytes_of.get(id) == _read_bytes(match)
        return str(name) in self._texts_of.get(id, ())

    def _find(self, name: Token, spelling: Mapping[str, int | None]) -> int | None:
        if (exact := _read_exact_id(name)) is not None:
            return exact if exact in self._keys else None
        if match := BYTES.fullmatch(str(name)):
            return self._by_bytes.get(_read_bytes(match))
        return spelling.get(str(name))

    @cached_property
    def _keys(self) -> dict[int, str]:
        return {id: key for key, id in self._tokenizer.get_vocab().items()}

    @cached_property
    def _by_key(self) -> dict[str, int | None]:
        return _invert((id, [key]) for id, key in self._keys.items())

    @cached_property
    def _decoded(self) -> dict[int, str]:
        texts = self._tokenizer.batch_decode(
            [[id] for id in self._keys], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return dict(zip(self._keys, texts, strict=True))

    @cached_property
    def _texts_of(self) -> dict[int, set[str]]:
        # a sentencepiece token decodes without its space when alone, and with it in the middle of a text
        return {id: {text, self._keys[id], self._keys[id].replace("▁", " ")} for id, text in self._decoded.items()}

    @cached_property
    def _by_text(self) -> dict[str, int | None]:
        spaced = {id: key.replace("▁", " ") for id, key in self._keys.items() if key.startswith("▁")}
        return _invert(
            (id, [t for t in {text, spaced.get(id, text)} if t and REPLACEMENT not in t])
            for id, text in self._decoded.items()
        )

    @cached_property
    def _bytes_of(self) -> dict[int, bytes]:
        byte_of, found = {character: byte for byte, character in bytes_to_unicode().items()}, {}
        for id, key in self._keys.items():
            if match := BYTE_FALLBACK.fullmatch(key):
                found[id] = bytes.fromhex(match[1])
            elif REPLACEMENT not in self._decoded[id]:
                found[id] = self._decoded[id].encode()
            elif set(key) <= byte_of.keys():
                found[id] = bytes(byte_of[character] for character in key)
        return found

    @cached_property
    def _by_bytes(self) -> dict[bytes, int | None]:
        return _invert((id, [value]) for id, value in self._bytes_of.items())


def _read_exact_id(name: Token) -> int | None:
    if isinstance(name, int):
        return name
    match = TOKEN_ID.fullmatch(name)
    return int(match[1]) if match else None


def _read_bytes(match: re.Match[str]) -> bytes:
    return bytes.fromhex(match[1].replace("\\x", ""))


def _invert(names_of: Iterable[tuple[int, Iterable[JsonValue]]]) -> dict[JsonValue, int | None]:
    """Maps names to ids; `None` for a name of several ids."""
    ids: dict[JsonValue, int | None] = {}
    for id, names in names_of:
        for name in names:
            ids[name] = None if name in ids else id
    return ids


def read_sparse(
    positions: Sequence[Position], top_k: int, names: TokenNames, spelling: Mapping[str, int | None]
) -> SparseDistribution:
    """Reads the `top_k` most likely ids of each position, most likely first.

    Args:
        positions (`Sequence[Position]`): Tokens of the completion.
        top_k (`int`): Number of ids for each token.
        names (`TokenNames`): Finds the ids.
        spelling (`Mapping[str, int | None]`): The answer's spelling, from [`TokenNames.pick_spelling`].

    Raises:
        MalformedResponseError: A position has fewer than `top_k` tokens, or the same id twice.
        UnidentifiedTokens: Some are not exactly one id, or share a name.
    """
    ids, log_p, unidentified = [], [], []
    most = max(len(position.top or []) for position in positions)
    for number, position in enumerate(positions):
        # the token itself may be listed beside the most likely ones
        head = sorted(position.top or [], key=lambda entry: -entry[1] if entry[1] is not None else math.inf)[:top_k]
        if most >= top_k > len(head) and not all(names.is_exact(name) for name, _ in head):
            unidentified.append(f"({len(head)} names for {top_k} tokens)")  # those that share a name are listed once
            continue
        values = [value for _, value in head if value is not None]
        if len(values) < top_k:
            raise MalformedResponseError(
                f"it lists {len(head)} most likely tokens at token {number}, but {top_k} were asked for. Lower "
                "`top_k` to what the server allows (vLLM: --max-logprobs, 20 by default; OpenAI: 5)"
            )
        found = names.find_ids([name for name, _ in head], spelling)
        unidentified += [str(name) for (name, _), id in zip(head, found, strict=True) if id is None]
        if None in found:
            continue
        if len(set(found)) < top_k:
            raise MalformedResponseError(f"the most likely tokens at token {number} name an id twice: {head}")
        ids.append(np.array(found, dtype=np.int32))
        log_p.append(np.array([-np.inf if v <= LEAST_LOG_P else v for v in values], dtype=np.float32))
    if unidentified:
        raise UnidentifiedTokens(unidentified)
    return SparseDistribution(ids, log_p)
