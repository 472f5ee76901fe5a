"""How a running server is asked what it drafted: its own form of requests, its answers, and its counters."""

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, zip_longest

from spec_kd.open_types import JsonObject, JsonValue, Record
from spec_kd.sampling.response_format import ResponseFormat

# One sample of the text format of Prometheus: a name, labels, a value
SAMPLE = re.compile(r"^(?P<name>[\w:]+)(?:\{(?P<labels>[^}]*)\})?\s+(?P<value>\S+)", re.M)
POSITION = re.compile(r'\bposition="(\d+)"')


@dataclass(frozen=True)
class DraftCounts:
    """What a server says of its drafts, for one request or for all of them; `None` where it says nothing.

    Args:
        drafted (`int`, *optional*): Drafted tokens.
        accepted (`int`, *optional*): Accepted drafted tokens.
        rounds (`int`, *optional*): Rounds that drafted at least one token.
        accepted_by_position (`list[int]`, *optional*): Rounds in which drafted token k = 1, 2, ... was accepted.
    """

    drafted: int | None = None
    accepted: int | None = None
    rounds: int | None = None
    accepted_by_position: list[int] | None = None

    @classmethod
    def of_histogram(cls, drafted: int, accepted: int, histogram: Sequence[int]) -> "DraftCounts":
        """Counts with a histogram whose number j is how many rounds accepted j drafted tokens."""
        at_least = list(accumulate(reversed(histogram)))[::-1]
        return cls(drafted, accepted, sum(histogram), at_least[1:])

    def minus(self, other: "DraftCounts") -> "DraftCounts":
        """What was counted since `other`."""
        return self._combine(other, operator.sub)

    def plus(self, other: "DraftCounts") -> "DraftCounts":
        """Both counts together."""
        return self._combine(other, operator.add)

    def _combine(self, other: "DraftCounts", combine: Callable[[int, int], int]) -> "DraftCounts":
        drafted, accepted, rounds = (
            None if own is None else combine(own, theirs or 0)
            for own, theirs in zip(
                (self.drafted, self.accepted, self.rounds), (other.drafted, other.accepted, other.rounds), strict=True
            )
        )
        pairs = zip_longest(self.accepted_by_position or (), other.accepted_by_position or (), fillvalue=0)
        return DraftCounts(drafted, accepted, rounds, [combine(*pair) for pair in pairs] or None)

    @property
    def activity(self) -> int | None:
        """A number above 0 if something was drafted; `None` where that is not known."""
        return self.rounds if self.drafted is None else self.drafted


def keep(value: JsonObject) -> JsonObject:
    """The value as it is."""
    return value


def say_nothing(answer: Record) -> None:
    """`None`, for servers whose answers do not tell."""


@dataclass(frozen=True)
class Observer:
    """How to ask a running server what it drafted.

    Args:
        owner (`str`): What it calls itself as `owned_by` under `/v1/models`.
        counters (`Mapping[str, str]`): Names of its counters under `/metrics`, by field of [`DraftCounts`].
        read_counts (`Callable`): Reads the [`DraftCounts`] of a request from its answer; `None` if it tells nothing.
        write_format (`Callable`): Fields of a request, in OpenAI's form, that hold the completion to a format.
        metrics_hint (`str`): What makes it tell, a clause after "Start the server".
        drafting_hint (`str`): What may be wrong if it drafts nothing, a question.
        path (`str`, *optional*):
            Path of requests in its own form, from the root of its address; by default `/v1/completions`.
        build_body (`Callable`, *optional*): Makes a body in that form of one in OpenAI's.
        translate (`Callable`, *optional*): Makes an answer in OpenAI's form of one in its own.
        read_decoding_seconds (`Callable`, *optional*):
            Reads from an answer the seconds from its first to its last token; `None` if it does not tell.
        read_format (`Callable`, *optional*):
            Reads from an answer what the server really held it to, such as a grammar that it made of a JSON schema;
            `None` if it does not tell.
    """

    owner: str
    counters: Mapping[str, str]
    read_counts: Callable[[Record], DraftCounts | None]
    write_format: Callable[[ResponseFormat], JsonObject]
    metrics_hint: str
    drafting_hint: str
    path: str | None = None
    build_body: Callable[[JsonObject], JsonObject] = field(default=keep)
    translate: Callable[[JsonObject], JsonObject] = field(default=keep)
    read_decoding_seconds: Callable[[Record], float | None] = field(default=say_nothing)
    read_format: Callable[[Record], ResponseFormat | None] = field(default=say_nothing)

    def read_metrics(self, page: str) -> DraftCounts | None:
        """The counters on a page of `/metrics`, of all its engines together; `None` for a page of something else.

        Servers leave out counters that never moved, which are 0.
        """
        found: dict[str, JsonValue] = {name: 0 for name in self.counters if name != "accepted_by_position"}
        names = {counter: name for name, counter in self.counters.items()}
        for sample in SAMPLE.finditer(page):
            name, value = names.get(sample["name"]), sample["value"]
            if name == "accepted_by_position" and (position := POSITION.search(sample["labels"] or "")):
                by_position = found.setdefault(name, {})
                by_position[int(position[1])] = by_position.get(int(position[1]), 0) + int(float(value))
            elif name is not None and name != "accepted_by_position":
                found[name] += int(float(value))
        if next(iter(self.counters.values())).partition(":")[0] + ":" not in page:
            return None
        if positions := found.get("accepted_by_position"):
            found["accepted_by_position"] = [positions[position] for position in sorted(positions)]
        return DraftCounts(**found)


def find_first(values: Record, *names: str) -> JsonValue:
    """The value of the first of these names that is there; `None` without any."""
    return next((values[name] for name in names if values.get(name) is not None), None)
