"""The options of `load_query_logs`, with their texts, defaults and checks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spec_kd.open_types import JsonObject, JsonValue
from spec_kd.options import check_choice, check_int, check_number, document_options, option
from spec_kd.prompts.deduplication import check_threshold
from spec_kd.prompts.logs.formats import FORMATS
from spec_kd.prompts.logs.logged_call import TURNS
from spec_kd.prompts.logs.redaction import check_redactions
from spec_kd.prompts.splitting import SPLITS

if TYPE_CHECKING:
    Format = str | Callable[[JsonValue], JsonValue]
else:
    Format = str  # a command line names a format; only Python can give a function


@document_options
@dataclass(frozen=True)
class LogOptions:
    """Options of [`load_query_logs`].

    `format` is one of these:

    - `"auto"` recognizes each record by its keys, also runs of LangSmith and observations of Langfuse.
    - `"openai"` and `"litellm"`: requests of the chat completions, Responses and Anthropic APIs, in one object with the
      response, or as `request` and `response`. The response may be a stream of events. LiteLLM's standard payload and
      its table of spend logs have this form. Input and output files of batches are joined.
    - `"vllm"`: the same (files of `vllm run-batch`), or the log that the server prints with `--enable-log-requests`.
      The rendered prompts in it are read with the chat template of the `processing_class`; its other lines are left
      out.
    - `"sharegpt"`: `conversations`.
    - `"trl"`: `prompt` and `completion`, or `messages`.
    - `"text"`: `prompt` or `text`, or lines of text.
    - In Python also a function, which gets each record and returns it in one of these forms, or `None` to leave it out.

    `split_by` keeps each conversation on one side of the split. A conversation is known by its logged
    `conversation_id`, `session_id`, `thread_id` or `chat_id`, otherwise by the user's first turn. Ids of a trace or of
    a request do not count, and a request that continues the history of another one belongs to the same conversation
    whatever its ids are. Conversations that contain the same prompt, under any system prompts, are on one side as well.

    Raises:
        ValueError: An option is out of its range.
    """

    format: Format = option(
        "Form of the records: auto (recognizes each record), openai, vllm, litellm, sharegpt, trl or text.", "auto"
    )
    turns: str = option(
        "Assistant turns that become prompts, each with its history: all, last, or auto. With auto these are all turns "
        "of a record that is a whole conversation, and the last turn of a record that is one request, because the "
        "earlier turns had requests of their own.",
        "auto",
    )
    min_tokens: int | None = option("Fewest tokens of a rendered prompt; no limit by default.", None)
    max_tokens: int | None = option("Most tokens of a rendered prompt; no limit by default.", None)
    near_duplicate_threshold: float | None = option(
        "Similarity from which prompts count as the same, see `PromptFilter` for what is compared. `None` keeps "
        "near-duplicates, which may then be on both sides of the split.",
        0.8,
    )
    max_per_user: int | None = option("Most prompts of one user; no limit by default.", None)
    max_per_day: int | None = option("Most prompts of one day (UTC); no limit by default.", None)
    test_fraction: float = option("Share of the prompts for testing. A warning says which side has no prompts.", 0.05)
    split_by: str = option(
        "Choice of the test conversations: hash (random, and stable when the log grows) or time (those that began "
        "last).",
        "hash",
    )
    redact: list[str] = option(
        "Kinds of strings to replace by placeholders: email, phone, key, card; none by default. They are replaced in "
        "all that is stored: prompts, completions, arguments of tool calls, tools, ids, names of files.",
        default_factory=list,
    )
    on_error: str = option("What to do with a malformed record: skip (count and list it) or raise (an error).", "skip")
    seed: int = option("Seed of the split by hash.", 0)

    def __post_init__(self) -> None:
        if self.format not in FORMATS and not callable(self.format):
            raise ValueError(
                f"`format` must be one of {', '.join(map(repr, FORMATS))} or a function, got {self.format!r}."
            )
        check_choice("turns", self.turns, TURNS)
        check_choice("split_by", self.split_by, SPLITS)
        check_choice("on_error", self.on_error, ("skip", "raise"))
        check_number("test_fraction", self.test_fraction, 0, below=1)
        for name in ("min_tokens", "max_tokens", "max_per_user", "max_per_day"):
            check_int(name, getattr(self, name), is_optional=True)
        check_int("seed", self.seed, 0)
        check_redactions(self.redact)
        check_threshold(self.near_duplicate_threshold, "near_duplicate_threshold", is_optional=True)

    def check_tokenizer(self, processing_class: object) -> None:
        """Raises `ValueError` for limits of tokens without the target's processing class, which counts them."""
        if processing_class is None and (self.min_tokens is not None or self.max_tokens is not None):
            raise ValueError("`min_tokens` and `max_tokens` count the target's tokens: give its `processing_class`.")

    def describe(self) -> JsonObject:
        """The options as JSON values, a function as the hash of its code."""
        from datasets.fingerprint import Hasher

        format = self.format if isinstance(self.format, str) else Hasher.hash(self.format)
        return {**vars(self), "format": format, "redact": sorted(self.redact)}
