"""Reads whole completions from the answers of servers: their ids, their end and their log-probabilities."""

from collections.abc import Mapping, Sequence
from typing import cast

from spec_kd.end_of_turn import find_turn_end_id
from spec_kd.engines.base import Completion, UnsupportedByEngineError
from spec_kd.engines.server.logprobs import (
    REPLACEMENT,
    FullContextError,
    MalformedResponseError,
    Position,
    TokenNames,
    UnidentifiedTokens,
    read_positions,
    read_sparse,
)
from spec_kd.losses import SignalSpec, SparseDistribution
from spec_kd.open_types import Record
from spec_kd.vocabulary import ProcessingClass, get_tokenizer


class CompletionReader:
    """Reads answers of `/v1/completions`, parsed from JSON.

    Args:
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`): Processing class of the target.
        eos_token_ids (`Sequence[int]`, *optional*):
            Ids that end a completion; by default the tokenizer's EOS and the id that ends a reply in its chat template.
        is_text_only (`bool`): Whether completions are text that is tokenized again.

    Attributes:
        eos_token_ids (`list[int]`): Ids that end a completion.

    Raises:
        ValueError: There is no EOS id.
    """

    def __init__(self, processing_class: ProcessingClass, eos_token_ids: Sequence[int] | None, is_text_only: bool):
        self._tokenizer = tokenizer = get_tokenizer(processing_class)
        known = set(eos_token_ids or [tokenizer.eos_token_id]) - {None}
        turn_end = find_turn_end_id(processing_class, known)
        self.eos_token_ids = sorted(known if eos_token_ids else (known | {turn_end}) - {None})
        if not self.eos_token_ids:
            raise ValueError("The tokenizer has no EOS token, so no completion would ever end. Give `eos_token_ids`.")
        # the EOS that a server drops is the end of a reply, which need not be the tokenizer's EOS
        self._appended_eos_id = next(
            id for id in (turn_end, tokenizer.eos_token_id, *self.eos_token_ids) if id in self.eos_token_ids
        )
        self._is_text_only, self._names = is_text_only, TokenNames(tokenizer)

    def read_completion(
        self,
        answer: Record,
        signal: SignalSpec | None,
        max_new_tokens: int,
        prompt_ids: Sequence[int],
    ) -> Completion:
        """Reads the completion of a prompt, with its signal.

        Args:
            answer (`Mapping`): JSON object of the server.
            signal (`SignalSpec`, *optional*): What was asked for; `None` for nothing.
            max_new_tokens (`int`): Maximum number of tokens that was asked for.
            prompt_ids (`Sequence[int]`): Ids of the prompt.

        Raises:
            UnsupportedByEngineError: Ids, log-probabilities or the EOS are missing.
            UnidentifiedTokens: Tokens are not exactly one id, or were left out.
            MalformedResponseError: The parts do not fit together, the server did not do what it was asked, it stopped
                at a special token that is no known EOS, or it completed another prompt.
        """
        choice = answer["choices"][0]
        completed = choice.get("prompt_token_ids")
        if completed is not None and list(completed) != list(prompt_ids):
            raise MalformedResponseError(
                f"it belongs to another prompt ({len(completed)} tokens; {len(prompt_ids)} were sent): the server, or "
                "a proxy in front of it, truncates prompts or mixes them up"
            )
        reason = choice.get("finish_reason")
        if reason not in ("stop", "length"):
            raise MalformedResponseError(f"its finish_reason is {reason!r}, neither 'stop' nor 'length'")
        if self._is_text_only:
            return self._read_text(choice["text"], reason)
        found, positions = self.read_ids(choice)
        if signal is not None and positions is None:
            raise UnsupportedByEngineError(
                f"The server returned no log-probabilities, so it cannot give {signal.method!r}. Use a server that "
                "returns them (vLLM, SGLang, llama.cpp), or the transformers engine."
            )
        ids = self._check_count(found, reason, (answer.get("usage") or {}).get("completion_tokens"), positions)
        if choice.get("token_ids") is None and choice.get("text") is not None:
            self._check_text(ids, choice["text"])
        ids, finish_reason = self._find_end(ids, reason, choice, signal, max_new_tokens)
        if signal is None or positions is None:
            return Completion(ids, finish_reason)
        return Completion(ids, finish_reason, *self._read_signal(positions[: len(ids)], positions, signal))

    def read_scored(self, answer: Record, row_ids: Sequence[int], start: int, signal: SignalSpec) -> Completion:
        """Reads the echoed log-probabilities of `row_ids[start:]`.

        Args:
            answer (`Mapping`): JSON object of the server.
            row_ids (`Sequence[int]`): Ids of prompt and completion.
            start (`int`): Position of the first completion token.
            signal (`SignalSpec`): What was asked for.

        Raises:
            UnsupportedByEngineError: The server did not echo a log-probability for each completion token.
            UnidentifiedTokens: Tokens of the `top_k` are not exactly one id.
            MalformedResponseError: The parts do not fit together, or the server echoed other ids.
        """
        choice = answer["choices"][0]
        positions = read_positions(choice) or []
        if len(positions) not in (len(row_ids), len(row_ids) + 1):
            raise UnsupportedByEngineError(
                f"The server echoed log-probabilities of {len(positions)} positions for a row of {len(row_ids)} "
                "tokens, so it cannot score. Use vLLM, SGLang or the transformers engine."
            )
        echoed = choice.get("prompt_token_ids")
        wrong = [
            (i, id, position.token if echoed is None else echoed[i : i + 1])
            for i, (id, position) in enumerate(zip(row_ids, positions, strict=False))
            if (not self._names.means(position.token, id) if echoed is None else echoed[i : i + 1] != [id])
        ]
        if wrong or (echoed is not None and len(echoed) != len(row_ids)):
            raise MalformedResponseError(
                "the server echoed another row than the one that was sent; the first difference, as (position, id "
                f"sent, token echoed), is {wrong[:1]}"
            )
        scored = positions[start : len(row_ids)]
        if any(position.log_p is None for position in scored):
            raise UnsupportedByEngineError(
                "The server echoed the row without a log-probability for each token of the completion, so it cannot "
                "score. Use vLLM, SGLang or the transformers engine."
            )
        ids = list(row_ids[start:])
        finish_reason = "stop" if ids[-1] in self.eos_token_ids else "length"
        return Completion(ids, finish_reason, *self._read_signal(scored, positions, signal))

    def read_ids(self, choice: Record) -> tuple[list[int | None], list[Position] | None]:
        """Reads the ids of a choice, `None` where a token is not exactly one id, and its log-probabilities."""
        positions, token_ids = read_positions(choice), choice.get("token_ids")
        if token_ids is None and positions is None:
            raise UnsupportedByEngineError(
                "The server returned only text, without ids and without log-probabilities that name tokens, so the "
                "exact ids of the completion are unknown. For black-box training, `ServerEngine(..., "
                "is_text_only=True)` tokenizes the text again."
            )
        known = positions or []
        if token_ids is None:
            return self._names.find_ids([position.token for position in known], self._pick_spelling(known)), positions
        if positions is not None and len(positions) != len(token_ids):
            raise MalformedResponseError(
                f"it has {len(token_ids)} ids and log-probabilities of {len(positions)} tokens"
            )
        for number, (position, id) in enumerate(zip(known, token_ids, strict=False)):
            if not self._names.means(position.token, id) and self._names.is_exact(position.token):
                raise MalformedResponseError(
                    f"its token {number} has the id {id}, but its log-probabilities name it {position.token!r}"
                )
        return self._names.find_ids(token_ids, {}), positions

    def _read_text(self, text: str, reason: str) -> Completion:
        if reason == "length":
            text = text.rstrip(REPLACEMENT)  # the limit fell inside a character
        if REPLACEMENT in text:
            raise UnidentifiedTokens([REPLACEMENT] * text.count(REPLACEMENT))
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        if reason == "stop" and (not ids or ids[-1] not in self.eos_token_ids):
            ids = [*ids, self._appended_eos_id]
        if not ids:
            raise UnidentifiedTokens(["(tokens without text)"])
        return Completion(ids, reason)

    def _check_count(
        self,
        found: list[int | None],
        reason: str,
        num_reported: int | None,
        positions: list[Position] | None,
    ) -> list[int]:
        """Returns the ids if all are known and none was left out; raises `UnidentifiedTokens` otherwise."""
        unidentified = [
            str(positions[i].token) if positions else "(an id beyond the tokenizer)"
            for i, id in enumerate(found)
            if id is None
        ]
        has_dropped_eos = reason == "stop" and (not found or found[-1] not in self.eos_token_ids)
        # llama.cpp leaves the log-probabilities of a token out where the text then ends inside a character.
        num_missing = (num_reported or 0) - len(found) - has_dropped_eos
        unidentified += ["(left out of the answer)"] * num_missing
        if unidentified:
            raise UnidentifiedTokens(unidentified)
        return [id for id in found if id is not None]

    def _check_text(self, ids: list[int], text: str) -> None:
        """Raises `MalformedResponseError` unless ids that were found by token names spell the server's text."""
        written = ids[:-1] if ids and ids[-1] in self.eos_token_ids else ids
        spelled = [
            cast(str, self._tokenizer.decode(written, skip_special_tokens=skips, clean_up_tokenization_spaces=False))
            for skips in (True, False)
        ]
        if _squeeze(text) not in [_squeeze(other) for other in spelled]:
            raise MalformedResponseError(
                f"its tokens spell {spelled[0]!r}, but its text is {text!r}: the tokenizer is not the server's"
            )

    def _find_end(
        self,
        ids: list[int],
        reason: str,
        choice: Record,
        signal: SignalSpec | None,
        max_new_tokens: int,
    ) -> tuple[list[int], str]:
        """Returns the ids up to and including their EOS, and the finish reason."""
        if len(ids) > max_new_tokens:
            raise MalformedResponseError(f"it has {len(ids)} tokens, more than the limit of {max_new_tokens}")
        end = next((i for i, id in enumerate(ids) if id in self.eos_token_ids), None)
        if end is not None:
            return ids[: end + 1], "stop"
        if reason == "length":
            if len(ids) < max_new_tokens:
                raise FullContextError(
                    f"it ends with finish_reason 'length' after {len(ids)} of {max_new_tokens} tokens, because the "
                    "server's context is full. Raise the server's context length, lower `max_new_tokens`, or remove "
                    "long prompts"
                )
            return ids, "length"
        named = choice.get("stop_reason") if choice.get("stop_reason") is not None else choice.get("matched_stop")
        if isinstance(named, str):
            raise MalformedResponseError(f"the server stopped at {named!r}, a stop string that it was not given")
        if ids and ids[-1] == named:
            return ids, "stop"
        last = self._tokenizer.added_tokens_decoder.get(ids[-1]) if ids else None
        if named is None and last is not None and last.special:
            raise MalformedResponseError(
                f"the server stopped at id {ids[-1]} ({last.content!r}), which is not among the `eos_token_ids` "
                f"{self.eos_token_ids}: add it there"
            )
        if signal is not None:
            raise UnsupportedByEngineError(
                "The server stopped at an EOS that it does not return, so the log-probability of the EOS is unknown "
                f"and {signal.method!r} would be incomplete. Use vLLM, SGLang, llama.cpp or the transformers engine."
            )
        return [*ids, self._appended_eos_id if named is None else named], "stop"

    def _read_signal(
        self, positions: Sequence[Position], all_positions: Sequence[Position], signal: SignalSpec
    ) -> tuple[list[float], SparseDistribution | None]:
        token_logprobs = [position.log_p for position in positions]
        known = [log_p for log_p in token_logprobs if log_p is not None]
        if len(known) < len(token_logprobs):
            raise MalformedResponseError(f"token {token_logprobs.index(None)} has no log-probability")
        top_k = signal.sparse_method.count_likely_ids(signal)
        return known, read_sparse(positions, top_k, self._names, self._pick_spelling(all_positions)) if top_k else None

    def _pick_spelling(self, positions: Sequence[Position]) -> Mapping[str, int | None]:
        return self._names.pick_spelling(
            name for position in positions for name in (position.token, *(name for name, _ in position.top or ()))
        )


def _squeeze(text: str) -> str:
    """Removes what servers may clean up: spaces, and an incomplete character at the end."""
    return "".join(text.replace(REPLACEMENT, "").split())
