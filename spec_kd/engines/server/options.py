"""Options of the server engine."""

from collections.abc import Sequence
from dataclasses import dataclass

from spec_kd.open_types import Record
from spec_kd.options import check_choice, check_int, check_number, document_options, option


@document_options
@dataclass(frozen=True)
class ServerOptions:
    """How a server is asked for completions, and how its responses are read.

    Raises `ValueError` for an option out of its range.
    """

    max_concurrency: int = option("Number of requests at a time.", default=16)
    max_retries: int = option(
        "Number of further attempts at a request that failed for a reason that may pass: a connection error, a "
        "timeout, status 408, 409, 429 (after the pause that `Retry-After` asks for) or 5xx, broken JSON.",
        default=6,
    )
    requests_per_minute: float | None = option(
        "Maximum number of requests per minute, evenly spaced, retries included; no limit by default.", default=None
    )
    timeout: float = option("Maximum number of seconds for a whole response.", default=120.0)
    backoff: float = option(
        "Longest pause before the first retry in seconds, doubled for each further one.", default=1.0
    )
    api_key_env: str = option(
        "Environment variable with the API key, which is read from nowhere else. Local servers need none.",
        default="OPENAI_API_KEY",
    )
    logprobs_mode: str = option(
        "Log-probabilities of the server: `raw` or `processed`, as it was started.", default="raw"
    )
    extra_body: Record | None = option(
        "Fields to add to every request, or to remove with `None`; no secrets.", default=None
    )
    eos_token_ids: Sequence[int] | None = option(
        "Ids that end a completion; by default the tokenizer's EOS and the id that ends a reply in its chat template. "
        "A target with several EOS ids in its generation config needs them all here.",
        default=None,
    )
    is_text_only: bool = option("Whether the server takes and returns only text.", default=False)

    def __post_init__(self) -> None:
        check_int("max_concurrency", self.max_concurrency)
        check_int("max_retries", self.max_retries, 0)
        check_number("requests_per_minute", self.requests_per_minute, above=0, is_optional=True)
        check_number("timeout", self.timeout, above=0)
        check_number("backoff", self.backoff, 0)
        check_choice("logprobs_mode", self.logprobs_mode, ("raw", "processed"))
