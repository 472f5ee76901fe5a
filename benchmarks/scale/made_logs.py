"""A log of any length, made in a minute for each million lines: single questions, conversations, and duplicates.

Of 100 lines, 10 are exact duplicates of an earlier one, 12 are near-duplicates with some words replaced, 20 continue a
conversation, 1 in 200 is malformed, and the rest is new. A fifth has a system prompt, which is one of three, and a
tenth has tools. Near-duplicates are of all similarities from 0.6 on; every second one differs in case and spaces only.
"""

import gzip
import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

LINES_OF_FILE = 250_000
BLOCK = 20_000  # sentences composed at a time
NUM_WORDS, NUM_DRAWS = 50_000, 2**20
NUM_ANSWERS = 500
SHARES = {"exact": 0.10, "near": 0.12, "follow_up": 0.20, "malformed": 0.005}  # the rest is new
RECENT = 2_000
LONGEST_CONVERSATION = 8  # messages
LENGTHS = (6, 12, 25, 50, 100)  # words
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You answer questions about our products. " + "Be polite. " * 20,
    "Reply in one sentence, without markdown.",
)
TOOLS = [{"type": "function", "function": {"name": "search", "parameters": {"properties": {"q": {"type": "string"}}}}}]
ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl", ".jsonl.zst")  # file by file


class LogMaker:
    """Makes the lines of a log, the same ones for the same seed."""

    def __init__(self, seed: int = 0):
        self._rng, self._generator = random.Random(seed), np.random.default_rng(seed)
        letters = "etaoinshrdlucmfwypvbgkjqxz"
        weights = [1 / (n + 2) for n in range(26)]
        self._words = [
            "".join(self._rng.choices(letters, weights, k=self._rng.randint(2, 9))) for _ in range(NUM_WORDS)
        ]
        weights_of_words = 1 / (np.arange(NUM_WORDS) + 10)  # as frequent as words are, by Zipf's law
        self._draws = self._generator.choice(NUM_WORDS, NUM_DRAWS, p=weights_of_words / weights_of_words.sum())
        self._stock: Iterator[str] = iter(())
        self._answers = [self._compose() for _ in range(NUM_ANSWERS)]
        self._recent: list[tuple[str, list[dict[str, str]], bool]] = []

    def make_line(self, number: int) -> bytes:
        """The next line, without its end."""
        draw, kind = self._rng.random(), "new"
        for name, share in SHARES.items():
            draw -= share
            if draw < 0:
                kind = name
                break
        if kind == "malformed":
            return b'{"messages": [{"role": "user", "content": "cut'
        name = f"c{number}"
        if kind == "new" or not self._recent:
            messages = [{"role": "user", "content": self._compose()}]
            if self._rng.random() < 0.2:
                messages.insert(0, {"role": "system", "content": self._rng.choice(SYSTEM_PROMPTS)})
            has_tools = self._rng.random() < 0.1
        else:
            place = self._rng.randrange(len(self._recent))
            before, messages, has_tools = self._recent[place]
            if kind == "near":
                messages = [*messages[:-1], {"role": "user", "content": self._edit(messages[-1]["content"])}]
            elif kind == "follow_up":
                name = before
                messages = [*messages, {"role": "assistant", "content": self._rng.choice(self._answers)}]
                messages += [{"role": "user", "content": self._compose()}]
                self._recent[place] = (name, messages, has_tools)
                if len(messages) > LONGEST_CONVERSATION:  # which then ends
                    self._recent.pop(place)
        if kind == "new":
            if len(self._recent) < RECENT:
                self._recent.append((name, messages, has_tools))
            else:
                self._recent[self._rng.randrange(RECENT)] = (name, messages, has_tools)
        return json.dumps(self._dress(number, name, messages, has_tools)).encode()

    def _dress(self, number: int, name: str, messages: list[dict[str, str]], has_tools: bool) -> dict[str, Any]:
        answer = {"role": "assistant", "content": self._rng.choice(self._answers)}
        response = {"choices": [{"message": answer, "finish_reason": "stop"}], "created": 1_700_000_000 + number}
        request: dict[str, Any] = {"model": "target", "messages": messages}
        if has_tools:
            request["tools"] = TOOLS
        return {"conversation_id": name, "request": request, "response": response}

    def _compose(self) -> str:
        if (text := next(self._stock, None)) is None:
            lengths = self._generator.choice(LENGTHS, BLOCK)
            draws = self._draws[self._generator.integers(0, NUM_DRAWS, int(lengths.sum()))]
            words = [self._words[place] for place in draws.tolist()]
            ends = np.cumsum(lengths).tolist()
            starts = [0, *ends[:-1]]
            self._stock = iter([" ".join(words[start:end]) for start, end in zip(starts, ends, strict=True)])
            text = next(self._stock)
        return text

    def _edit(self, text: str) -> str:
        if self._rng.random() < 0.5:
            return text.capitalize() + self._rng.choice([".", "!", "  "])
        words = text.split()
        for position in self._rng.sample(range(len(words)), self._rng.randint(1, max(1, len(words) // 12))):
            words[position] = self._rng.choice(self._words)
        return " ".join(words)


def make_log(size: int, folder: Path, seed: int = 0) -> int:
    """Writes a log of so many lines as files of 250,000 lines, plain and compressed; returns its bytes as text."""
    folder.mkdir(parents=True, exist_ok=True)
    maker, num_bytes = LogMaker(seed), 0
    for start in range(0, size, LINES_OF_FILE):
        number = start // LINES_OF_FILE
        path = folder / f"log-{number:05d}{ENDINGS[number % len(ENDINGS)]}"
        with _open(path) as file:
            lines: list[bytes] = []
            for line in range(start, min(start + LINES_OF_FILE, size)):
                lines.append(maker.make_line(line))
                if len(lines) == 1000 or line == min(start + LINES_OF_FILE, size) - 1:
                    data = b"\n".join(lines) + b"\n"
                    file.write(data)
                    num_bytes += len(data)
                    lines = []
    return num_bytes


def _open(path: Path) -> io.BufferedIOBase:
    if path.suffix == ".gz":
        return gzip.GzipFile(path, "wb", compresslevel=1)
    return pa.CompressedOutputStream(str(path), "zstd") if path.suffix == ".zst" else path.open("wb")
