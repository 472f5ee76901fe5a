"""How a server is reached: its options, its address, which may hold a password, and why a connection failed."""

import asyncio
import base64
import socket
import ssl
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar, cast
from urllib.parse import unquote, urlsplit, urlunsplit

from spec_kd.open_types import JsonValue, Record
from spec_kd.options import check_choice, check_int, check_number, document_options, option
from spec_kd.secrets import hide_secrets

Result = TypeVar("Result")


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


def check_base_url(base_url: str, api_key_env: str = "OPENAI_API_KEY") -> None:
    """Raises `ValueError` unless `base_url` is the address of a server. The error does not show its secrets."""
    try:
        parts = urlsplit(base_url)
        shown = hide_userinfo(base_url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname)
        _ = parts.port  # raises above 65535
    except ValueError:
        parts, shown, is_address = urlsplit(""), hide_secrets(base_url), False
    if not is_address:
        raise ValueError(
            f"`base_url={shown!r}` is not the address of a server. Write it like http://localhost:8000/v1."
        )
    if parts.query or parts.fragment:
        raise ValueError(
            f"`base_url` has a `?...` or `#...` after {hide_userinfo(base_url)!r}, which would end up in the middle of "
            f"every request's address. Remove it; an API key belongs in the environment variable {api_key_env}."
        )


def hide_userinfo(url: str) -> str:
    """The URL without user name, password, query and fragment."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def find_root(base_url: str) -> str:
    """The address without its `/v1`, where servers have the pages that are not of OpenAI's API."""
    return base_url.rstrip("/").removesuffix("/v1")


class Userinfo:
    """User name and password of a URL, which are shown nowhere.

    Attributes:
        headers (`dict[str, str]`): Header in which HTTP clients send them (RFC 7617); empty without a user name.
    """

    def __init__(self, url: str):
        parts = urlsplit(url)
        pair = [] if parts.username is None else [parts.username, parts.password or ""]
        credentials = base64.b64encode(":".join(map(unquote, pair)).encode()).decode()
        self.headers = {"Authorization": f"Basic {credentials}"} if pair else {}
        self._secrets = sorted({*pair[1:], *map(unquote, pair[1:]), credentials} - {""}, key=len)

    def hide(self, text: str) -> str:
        """A server's text without the password, which it may repeat."""
        for secret in self._secrets:
            text = text.replace(secret, "[hidden]")
        return text

    def __repr__(self) -> str:
        return "Userinfo([hidden])"


def explain_connection_error(error: BaseException, url: str) -> tuple[str, bool]:
    """Finds the cause of an error of the HTTP library, and whether it may pass.

    Args:
        error (`BaseException`): The error, with its causes in `__cause__` and `__context__`.
        url (`str`): Address of the connection, which the explanation may show.

    Returns:
        `tuple[str, bool]`: A clause without a period, and whether another attempt makes sense.
    """
    causes = _list_causes(error)
    if certificate := next((cause for cause in causes if isinstance(cause, ssl.SSLCertVerificationError)), None):
        return f"its TLS certificate is not accepted ({certificate.verify_message or certificate})", False
    if tls := next((cause for cause in causes if isinstance(cause, ssl.SSLError)), None):
        reason = getattr(tls, "reason", None) or tls
        return f"TLS could not be set up ({reason}); a server without TLS has an address with http://", False
    if name := next((cause for cause in causes if isinstance(cause, socket.gaierror)), None):
        reason, may_pass = name.strerror or name, name.errno == socket.EAI_AGAIN
        return f"the name {urlsplit(url).hostname!r} has no address ({reason})", may_pass
    if any(isinstance(cause, ConnectionRefusedError) for cause in causes):
        return "nothing listens there (connection refused)", True
    if message := next((cause.strerror for cause in causes if isinstance(cause, OSError) and cause.strerror), None):
        return message.lower(), True
    innermost = next((cause for cause in reversed(causes) if str(cause)), error)
    kind = type(error.__cause__ or error).__name__
    return f"{kind}: {innermost}" if str(innermost) else kind, True


def _list_causes(error: BaseException) -> list[BaseException]:
    """The error and its causes, each once, from the outermost to the innermost."""
    causes: dict[int, BaseException] = {}
    waiting: list[BaseException | None] = [error]
    for found in waiting:  # which grows
        if found is not None and id(found) not in causes:
            causes[id(found)] = found
            waiting += [found.__cause__, found.__context__]
            waiting += found.exceptions if isinstance(found, BaseExceptionGroup) else ()
    return list(causes.values())


def run_to_end(coroutine: Coroutine[JsonValue, JsonValue, Result]) -> Result:
    """Runs a coroutine to its end, on a thread of its own if a loop is already running."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[Result]]] = Future()

    async def start() -> Result:
        started.set_result((asyncio.get_running_loop(), cast("asyncio.Task[Result]", asyncio.current_task())))
        return await coroutine

    with ThreadPoolExecutor(max_workers=1) as pool:
        running = pool.submit(asyncio.run, start())
        try:
            return running.result()
        except BaseException:
            if not running.done():  # interrupted from outside; the thread would run to the end of the batch
                loop, task = started.result()
                loop.call_soon_threadsafe(task.cancel)
            raise
