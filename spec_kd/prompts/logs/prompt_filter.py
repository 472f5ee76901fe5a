"""Decides which prompts of a log are kept: no duplicates, within the limits of length, user and day."""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
from datasets import Json

from spec_kd.prompts.deduplication import BATCH_SIZE, NearDuplicateIndex, normalize_text
from spec_kd.prompts.logs.logged_call import LoggedCall
from spec_kd.prompts.logs.messages import Message
from spec_kd.prompts.logs.options import LogOptions
from spec_kd.prompts.splitting import hash_text

if TYPE_CHECKING:
    from spec_kd.vocabulary import ProcessingClass

ENCODER = json.JSONEncoder(ensure_ascii=False)  # `json.dumps` creates one at each call
REASONS = ("exact_duplicate", "too_short", "too_long", "near_duplicate", "over_user_limit", "over_day_limit")
NEEDED = {"user": "user", "day": "timestamp that is understood"}


@dataclass(frozen=True)
class LoggedPrompt:
    """A prompt as it is stored, and its origin.

    Attributes:
        call (`LoggedCall`): Prompt, completion and what the log says about them.
        source (`str`): File of the log.
        conversation (`int`): Number of the conversation, see [`number_conversation`].
        messages (`list[str]`), completion (`str`, *optional*), tools (`str`, *optional*): Parts of the call as JSON.
    """

    call: LoggedCall
    source: str
    conversation: int
    messages: list[str]
    completion: str | None
    tools: str | None

    @classmethod
    def encode(cls, call: LoggedCall, source: str, conversation: int | None = None) -> "LoggedPrompt":
        """The prompt of a call.

        Args:
            call (`LoggedCall`): The call.
            source (`str`): File of the log.
            conversation (`int`, *optional*): Number of the conversation; [`number_conversation`] of the call by
                default.

        Raises:
            ValueError: A value would be changed when it is stored in a dataset.
        """
        messages = [_encode_message(message) for message in call.prompt]
        completion = None if call.completion is None else _encode_message(call.completion)
        tools = _to_json(call.tools) if call.tools else None
        number = number_conversation(call) if conversation is None else conversation
        return cls(call, source, number, messages, completion, tools)


def _to_json(value: object) -> str:
    text = ENCODER.encode(value)
    text.encode()  # raises `ValueError` for halves of surrogate pairs, which Arrow refuses
    return text


def _encode_message(message: Message) -> str:
    text = _to_json(message)
    # `datasets` reads JSON with ujson, which refuses integers over 64 bits and rounds some numbers of 17 digits.
    with suppress(ValueError):
        if "tool_calls" not in message or Json().decode_example(text) == message:
            return text
    raise ValueError(f"arguments of a tool call hold numbers that `datasets` cannot store exactly: {text:.200}")


class PromptFilter:
    """Takes prompts one by one, and returns those that are kept some hundreds later, in order.

    Two prompts are exact duplicates if their messages and tools are the same. They are near-duplicates if they have the
    same number of turns of the user and of tools, the texts of these turns are nearly the same, and so are the system
    prompts with the tools. (If prompts were compared as a whole, different questions after one long system prompt would
    be near-duplicates, and so would the turns of one conversation.) Long texts are compared at their ends as well, so
    that different questions before or after one long document are kept.

    A prompt is remembered by a 64-bit hash, and for near-duplicates as in [`NearDuplicateIndex`].

    Args:
        options (`LogOptions`): The threshold of near-duplicates, and the limits.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*): Renders prompts to count tokens.
        folder (`Path`, *optional*):
            Folder for the texts by which near-duplicates are found; by default the system's for temporary files.

    Attributes:
        dropped (`Counter`): Number of dropped prompts by reason, one of [`REASONS`].
    """

    def __init__(
        self, options: LogOptions, processing_class: "ProcessingClass | None" = None, folder: Path | None = None
    ):
        self.dropped: Counter[str] = Counter()
        self._processing_class = processing_class
        self._min_tokens, self._max_tokens = options.min_tokens or 0, options.max_tokens or float("inf")
        limits = {"user": options.max_per_user, "day": options.max_per_day}
        self._limits = {name: limit for name, limit in limits.items() if limit is not None}
        self._counts: Counter[tuple[str, object]] = Counter()
        self._seen: set[int] = set()
        threshold = options.near_duplicate_threshold
        self._index = None if threshold is None else NearDuplicateIndex(threshold, compare_ends=True, folder=folder)
        self._contexts = NearDuplicateIndex(threshold or 1.0, folder=folder)
        self._context_numbers: dict[int, int] = {}
        self._waiting: list[LoggedPrompt] = []

    def push(self, prompt: LoggedPrompt) -> Iterator[LoggedPrompt]:
        """Takes a prompt, and returns earlier prompts that are kept.

        Raises:
            ValueError: The chat template refuses the prompt, or the user or time that a limit needs is missing.
        """
        self._list_limited(prompt.call)
        identity = hash_prompt(prompt)
        reason = "exact_duplicate" if identity in self._seen else self._check_length(prompt.call)
        self._seen.add(identity)
        if reason is not None:
            self.dropped[reason] += 1
        else:
            self._waiting.append(prompt)
        if len(self._waiting) == BATCH_SIZE:
            yield from self.flush()

    def flush(self) -> Iterator[LoggedPrompt]:
        """Those of the prompts that are still waiting that are kept."""
        waiting, self._waiting = self._waiting, []
        kept: list[LoggedPrompt] = []
        if self._index is None:
            for prompt in waiting:
                self._admit(prompt, kept)
        elif waiting:
            texts = [normalize_text(prompt.call.prompt) for prompt in waiting]
            scopes = [self._find_scope(prompt) for prompt in waiting]
            flags = self._index.find_and_add(texts, scopes, lambda position: self._admit(waiting[position], kept))
            self.dropped["near_duplicate"] += int(flags.sum())
        yield from kept

    def _admit(self, prompt: LoggedPrompt, kept: list[LoggedPrompt]) -> bool:
        """Adds a prompt to those that are kept, unless its user or day has enough; returns whether it is added."""
        limited = self._list_limited(prompt.call)
        for name, key in limited:
            if self._counts[name, key] >= self._limits[name]:
                self.dropped[f"over_{name}_limit"] += 1
                return False
        self._counts.update(limited)
        kept.append(prompt)
        return True

    def _list_limited(self, call: LoggedCall) -> list[tuple[str, object]]:
        """User and day of a call, as far as they are limited; raises `ValueError` if the log lacks one."""
        day = None if call.timestamp is None else datetime.fromtimestamp(call.timestamp, UTC).date()
        known = {"user": call.user, "day": day}
        for name in self._limits:
            if known[name] is None:
                raise ValueError(f"no {NEEDED[name]}, which `max_per_{name}` needs")
        return [(name, known[name]) for name in self._limits]

    def _check_length(self, call: LoggedCall) -> str | None:
        """The reason to drop a prompt of this length, or `None`; raises `ValueError` if it cannot be rendered."""
        if self._processing_class is None:
            return None
        from spec_kd.data.prompt_rendering import render_prompt_ids  # imports torch, which is not needed otherwise

        try:
            ids = next(render_prompt_ids([{"prompt": call.prompt, "tools": call.tools}], self._processing_class))
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"the chat template refuses the prompt ({error})") from error
        if len(ids) < self._min_tokens:
            return "too_short"
        return "too_long" if len(ids) > self._max_tokens else None

    def _find_scope(self, prompt: LoggedPrompt) -> int:
        context, num_turns = describe_context(prompt)
        identity = hash_text(context)
        if identity not in self._context_numbers:
            context = normalize_text(context)
            number = self._contexts.find(context)
            self._context_numbers[identity] = self._contexts.add(context) if number is None else number
        return self._context_numbers[identity] << 16 | num_turns


def hash_prompt(prompt: LoggedPrompt) -> int:
    """The hash by which exact duplicates are found."""
    return hash_text("\n".join([*prompt.messages, prompt.tools or ""]))


def describe_context(prompt: LoggedPrompt) -> tuple[str, int]:
    """The system prompts with the tools, and the number of turns of the user and of tools, at most 65,535."""
    messages = prompt.call.prompt
    num_turns = sum(message["role"] in ("user", "tool") for message in messages)
    texts = [message["content"] for message in messages if message["role"] in ("system", "developer")]
    return "\n".join([*texts, prompt.tools or ""]), min(num_turns, 2**16 - 1)


def number_conversation(call: LoggedCall) -> int:
    """A 64-bit number of the conversation that a call belongs to.

    It is a hash of the logged name or, without one, of the user's first turn, because each request of a conversation
    repeats its history. All conversations that begin with "hello" then count as one, and are on one side of a split.
    """
    if call.conversation_id is not None:
        return hash_text(call.conversation_id)
    opening = next((turn["content"] for turn in call.prompt if turn["role"] == "user"), call.prompt[0]["content"])
    return hash_text("opening\0" + normalize_text(opening))
