"""An engine that writes what a function says, so that it is known what a synthesis must come to."""

from tiny import build_tokenizer

from spec_kd.engines.base import Completion, Engine
from spec_kd.prompts.synthesis.synthesis import synthesize_queries
from spec_kd.sampling.generation import derive_seed
from spec_kd.sampling.prompts import UnusablePromptError

TOOLS = [{"name": f"tool_{letter}", "parameters": {"type": "object", "properties": {}}} for letter in "abcd"]
WORDS = (
    "red", "blue", "round", "small", "quick", "stone", "bird", "cloud", "river", "lamp", "paper", "glass", "north",
    "dark", "summer", "window", "garden",
)  # fmt: skip
USER_TURN, ANSWER = "<|user|>", "<|assistant|>"


class ScriptedEngine(Engine):
    """Writes what a function says to each prompt, as text, and stops at `<|end|>` or at the limit."""

    name = "scripted"
    is_reproducible = True
    logprobs_mode = "processed"
    target_name = "some/target"

    def __init__(self, write, context=10_000):
        self.write, self.context = write, context
        self.tokenizer = build_tokenizer()
        self.calls = []

    def describe(self):
        return {"script": "one"}

    def check(self, prompts, options, signal):
        if any(len(ids) + options.max_new_tokens > self.context for ids in prompts):
            raise UnusablePromptError("does not fit", "context_full")

    def generate(self, prompts, options, signal=None, seed=""):
        texts = [self.tokenizer.decode(ids) for ids in prompts]
        self.calls.append((texts, options))
        written = []
        for number, text in enumerate(texts):
            ids = self.tokenizer(self.write(text, f"{seed}:{number}"))["input_ids"]
            stop = ids.index(1) + 1 if 1 in ids else len(ids)
            is_cut = min(stop, options.max_new_tokens) < stop or 1 not in ids
            written.append(Completion(ids[: min(stop, options.max_new_tokens)], "length" if is_cut else "stop"))
        return written


def listed(queries):
    """A script that writes these queries one after the other, and answers with `Yes.`."""
    remaining = iter(queries)

    def write(prompt, seed):
        return "Yes.<|end|>" if prompt.endswith(ANSWER) else f"{next(remaining)}<|end|>"

    return write


def drawn(prompt, seed):
    """A script that writes a query of six words, which depend on the seed alone."""
    if prompt.endswith(ANSWER):
        return f"Answer {derive_seed(seed, 16)}.<|end|>"
    words = [WORDS[derive_seed(f"{seed}:{i}", 16) % len(WORDS)] for i in range(6)]
    return f"Is the {' '.join(words)}?<|end|>"


def synthesize(write, num_queries, **options):
    engine = write if isinstance(write, ScriptedEngine) else ScriptedEngine(write)
    return synthesize_queries(
        engine, num_queries=num_queries, processing_class=engine.tokenizer, **{"show_progress": False, **options}
    )


def get_queries(result):
    return [row["prompt"][-1]["content"] for row in result.dataset]
