"""Sends requests to an OpenAI-compatible server: many at a time, at a limited rate, with retries.

The API key is read from the environment while a batch lasts and is kept nowhere. Errors of the `openai` client hold the
request with its headers, so they never leave this file. Our own errors say what failed; they are raised outside of the
`except` blocks, so that no traceback leads back to the others.
"""

import asyncio
import email.utils
import json
import logging
import math
import os
import random
import re
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar, cast

from spec_kd.engines.base import Completion, MissingCompletionsError
from spec_kd.engines.server.connection import (
    ServerOptions,
    Userinfo,
    explain_connection_error,
    hide_userinfo,
    run_to_end,
)
from spec_kd.open_types import Call, JsonObject, JsonValue
from spec_kd.secrets import hide_secrets

if TYPE_CHECKING:
    from openai import AsyncOpenAI

MAX_BACKOFF = 60.0  # seconds
MAX_RETRY_AFTER = 300.0  # seconds; a server that wants more is not worth waiting for unattended
RETRIED_STATUS_CODES = (408, 409, 429)
REFUSED_STATUS_CODES = (400, 422)  # the server understands the body and does not accept it
# The words of vLLM, SGLang, llama.cpp, TensorRT-LLM and OpenAI for a prompt that is too long.
TOO_LONG = re.compile(
    r"context (?:length|size|window)|context_length|maximum context|max_model_len|max_input|too long|longer than|"
    r"exceeds? (?:the|max)|too many tokens",
    re.IGNORECASE,
)
MESSAGE_LENGTH = 1000

Result = TypeVar("Result")
logger = logging.getLogger(__name__)


class ServerRequestError(RuntimeError):
    """The server refused a request, answered no attempt, or sent an unusable answer.

    Attributes:
        index (`int`, *optional*): Index of the prompt in the batch.
        status_code (`int`, *optional*): HTTP status; `None` if there was no answer, or one with status 200.
    """

    def __init__(self, message: str, index: int | None = None, status_code: int | None = None):
        super().__init__(message)
        self.index, self.status_code = index, status_code


class RefusedPromptsError(MissingCompletionsError, ServerRequestError):
    """A server refused some prompts of a batch and completed the others.

    Args:
        refusals (`Mapping[int, ServerRequestError]`): The refusal of each refused prompt, by its index in the batch.
        completions (`Sequence[Completion | None]`): Completions of the batch, `None` where there is none.
        unidentified (`Sequence[list[str]]`): Unidentified tokens of each completion.
    """

    def __init__(
        self,
        refusals: Mapping[int, ServerRequestError],
        completions: Sequence[Completion | None],
        unidentified: Sequence[list[str]],
    ):
        first = min(refusals)
        rest = f" ({len(refusals)} of {len(completions)} prompts were refused)" if len(refusals) > 1 else ""
        reasons = {index: str(refusals[index]).partition(": ")[2] for index in sorted(refusals)}
        super().__init__(f"{refusals[first]}{rest}", reasons, completions, unidentified)
        self.index, self.status_code = first, refusals[first].status_code


@dataclass(frozen=True)
class _Failure:
    reason: str
    is_transient: bool
    status_code: int | None = None
    retry_after: float | None = None


class CompletionsClient:
    """Posts to `/v1/completions`, many requests at a time.

    Connection errors, timeouts, statuses 408, 409, 429 and 5xx, and answers that are no JSON object with `choices` are
    tried again. The pause before attempt n is drawn uniformly from 0 to min(60 s, `backoff` x 2^(n - 1)), or is what
    the server's `Retry-After` says if that is longer; more than 300 s is refused. Any other status fails at once. A
    waiting request keeps its place among the `max_concurrency`, so that a server in trouble gets fewer requests. Each
    attempt opens its own connection.

    Args:
        base_url (`str`):
            Address of the server, with the `/v1`. A user name and password in it are sent as a header, and never shown
            or logged.
        options (`ServerOptions`): Concurrency, retries, rate, timeout and API key. Without a key, "EMPTY" is sent.

    Raises:
        ImportError: The `openai` package is missing.
    """

    def __init__(self, base_url: str, options: ServerOptions):
        self._openai = _import_openai()
        self._base_url = hide_userinfo(base_url)  # the HTTP library logs the address of every request
        self._userinfo, self._options = Userinfo(base_url), options
        self._next_start, self._has_answered = 0.0, False
        self._random = random.Random()  # the global one belongs to the experiment

    def post_all(
        self,
        bodies: Sequence[JsonObject],
        read: Callable[[int, JsonObject], Result],
        fails_at_once: Collection[int] = (),
        names: Sequence[str] | None = None,
        refuse: Callable[[int, ServerRequestError], Result] | None = None,
        url: str = "/completions",
        translate: Callable[[JsonObject], JsonObject] | None = None,
        tell_seconds: Callable[[int, float], None] | None = None,
    ) -> list[Result]:
        """Posts all bodies and reads the answers, in order.

        The first failure of a request or of `read` is raised and cancels all open requests. This also works inside of a
        running event loop (Jupyter), which it blocks.

        Args:
            bodies (`Sequence[dict]`): JSON objects.
            read (`Callable`): Function from the index of a body and its answer to a result.
            fails_at_once (`Collection[int]`, *optional*, defaults to `()`): HTTP statuses that are not tried again.
            names (`Sequence[str]`, *optional*): Names of the bodies in messages; `"Prompt 0"`, ... by default.
            refuse (`Callable`, *optional*):
                Function from the index of a body and the server's refusal to a result. It is called if the server
                refused the prompt: if its words say that the prompt is too long, or if it has answered another request.
                By default such a refusal is raised.
            url (`str`, *optional*, defaults to `"/completions"`):
                Where to post: a path after `base_url`, or an address.
            translate (`Callable`, *optional*):
                Function from an answer in the server's own form to one in OpenAI's. By default it is in OpenAI's.
            tell_seconds (`Callable`, *optional*):
                Called with the index of a body and the seconds that its answer took, just before it is read.

        Returns:
            `list` of the results of `read` and `refuse`.

        Raises:
            ServerRequestError: A request failed; the error has the index of its body.
            ValueError: The API key has characters that cannot be sent.
        """
        if not bodies:
            return []
        names = names or [f"Prompt {index}" for index in range(len(bodies))]

        async def post(client: "AsyncOpenAI", index: int) -> JsonObject:
            answer, seconds = await self._repeat(
                lambda: self._attempt(client, url, bodies[index], translate), index, names[index], fails_at_once
            )
            if tell_seconds is not None:
                tell_seconds(index, seconds)
            return answer

        return run_to_end(self._post_all(len(bodies), post, read, refuse))

    def fetch(self, url: str) -> str:
        """Gets a page of the server as text, with the same attempts as a request.

        Args:
            url (`str`): A path after `base_url`, or an address.

        Raises:
            ServerRequestError: The page cannot be read.
        """

        async def fetch() -> str:
            async with self._open() as client:
                response = await self._repeat(
                    lambda: self._send(lambda binary: client.get(url, cast_to=binary)), None, f"GET {url}", (500, 501)
                )
                return cast(str, response.text)

        return run_to_end(fetch())

    async def _post_all(
        self,
        num_bodies: int,
        post: "Callable[[AsyncOpenAI, int], Awaitable[JsonObject]]",
        read: Callable[[int, JsonObject], Result],
        refuse: Callable[[int, ServerRequestError], Result] | None,
    ) -> list[Result]:
        places, jury = asyncio.Semaphore(self._options.max_concurrency), _Jury(self._has_answered)

        async def post_one(index: int) -> Result:
            async with places:
                jury.num_open += 1
                try:
                    answer = await post(client, index)
                except ServerRequestError as error:
                    if refuse is None or not await jury.blames_prompt(error):
                        raise
                    return refuse(index, error)
                self._has_answered = jury.has_answered = True
                jury.close_request()
                return read(index, answer)

        failures: BaseExceptionGroup | None = None
        async with self._open() as client:
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(post_one(index)) for index in range(num_bodies)]
            except BaseExceptionGroup as raised:
                failures = raised
        if failures is not None:
            raise failures.exceptions[0]
        return [task.result() for task in tasks]

    def _open(self) -> "AsyncOpenAI":
        return cast(
            "AsyncOpenAI",
            self._openai.AsyncOpenAI(
                api_key=_read_key(self._options.api_key_env),
                base_url=self._base_url,
                timeout=self._options.timeout,
                max_retries=0,
                # on a connection that is kept, bytes left over from one answer would be read as the next answer
                default_headers={"Connection": "close", **self._userinfo.headers},
            ),
        )

    async def _repeat(
        self,
        attempt_once: Callable[[], Awaitable[Result | _Failure]],
        index: int | None,
        name: str,
        fails_at_once: Collection[int],
    ) -> Result:
        attempt = 0
        while True:
            attempt += 1
            await self._wait_for_turn()
            failure = await attempt_once()
            if not isinstance(failure, _Failure):
                return failure
            pause = failure.retry_after or 0.0
            ends = (
                (not failure.is_transient or failure.status_code in fails_at_once, ""),
                (attempt > self._options.max_retries, f"no usable answer in {attempt} attempts; the last: "),
                (
                    pause > MAX_RETRY_AFTER,
                    f"the server asks for a pause of {pause:.0f} s, more than the maximum of {MAX_RETRY_AFTER:.0f} s: ",
                ),
            )
            if (words := next((words for is_end, words in ends if is_end), None)) is not None:
                raise ServerRequestError(f"{name}: {words}{failure.reason}", index, failure.status_code)
            pause = max(pause, self._random.uniform(0.0, min(MAX_BACKOFF, self._options.backoff * 2 ** (attempt - 1))))
            logger.warning(
                "%s: %s; attempt %d of %d in %.1f s",
                name, failure.reason, attempt + 1, self._options.max_retries + 1, pause,
            )  # fmt: skip
            await asyncio.sleep(pause)

    async def _wait_for_turn(self) -> None:
        now = time.monotonic()
        start = max(now, self._next_start)
        self._next_start = start + 60.0 / (self._options.requests_per_minute or math.inf)
        await asyncio.sleep(start - now)

    async def _attempt(
        self,
        client: "AsyncOpenAI",
        url: str,
        body: JsonObject,
        translate: Callable[[JsonObject], JsonObject] | None,
    ) -> tuple[JsonObject, float] | _Failure:
        """The answer to a body, and the seconds that it took."""
        start = time.perf_counter()
        response = await self._send(lambda binary: client.post(url, cast_to=binary, body=body))
        seconds = time.perf_counter() - start
        if isinstance(response, _Failure):
            return response
        try:
            answer = json.loads(response.content)
        except ValueError:  # of JSON, or of the characters in it
            return _Failure("the answer is not JSON", is_transient=True)
        answer = translate(answer) if translate is not None and isinstance(answer, dict) else answer
        choices = answer.get("choices") if isinstance(answer, dict) else None
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            return _Failure(f"the answer has no `choices`: {self._shorten(json.dumps(answer))}", is_transient=True)
        return answer, seconds

    async def _send(self, send: Call[Awaitable[JsonValue]]) -> JsonValue:
        """The response, or the [`_Failure`] why there is none."""
        try:
            # the client's own timeout counts from one read to the next
            async with asyncio.timeout(self._options.timeout):
                return await send(self._openai.HttpxBinaryResponseContent)
        except (TimeoutError, self._openai.APITimeoutError):
            return _Failure(f"no complete answer within {self._options.timeout:g} s", is_transient=True)
        except self._openai.APIStatusError as error:
            code, text = error.status_code, self._shorten(error.response.text)
            return _Failure(
                f"the server answered with HTTP status {code}: {text}",
                is_transient=code in RETRIED_STATUS_CODES or code >= 500,
                status_code=code,
                retry_after=_read_retry_after(error.response.headers),
            )
        except self._openai.APIConnectionError as error:
            reason, is_transient = explain_connection_error(error, self._base_url)
            return _Failure(f"the connection to {self._base_url} failed: {reason}", is_transient)

    def _shorten(self, text: str) -> str:
        """The words of a server, without the API key and the password, which some servers repeat."""
        key = os.environ.get(self._options.api_key_env, "").strip()
        text = hide_secrets(self._userinfo.hide(text.replace(key, "[API key]") if key else text))
        return text if len(text) <= MESSAGE_LENGTH else f"{text[:MESSAGE_LENGTH]}... ({len(text)} characters)"


class _Jury:
    """Decides whether a server refuses a prompt, or the form of all requests.

    A server that has answered a request accepts the form. Before its first answer, a refusal waits for all open
    requests: if the server refuses every one, it refuses the form.

    Args:
        has_answered (`bool`): Whether the server has answered a request before.

    Attributes:
        has_answered (`bool`): The argument, until the caller sets it.
        num_open (`int`): Number of requests that have neither an answer nor a refusal; the caller counts up.
    """

    def __init__(self, has_answered: bool):
        self.num_open, self._num_waiting, self.has_answered = 0, 0, has_answered
        self._verdict = asyncio.Event()

    async def blames_prompt(self, error: ServerRequestError) -> bool:
        """Whether a request failed because of its prompt."""
        is_too_long = error.status_code == 413 or TOO_LONG.search(str(error)) is not None
        if error.status_code not in REFUSED_STATUS_CODES or is_too_long:
            self.close_request()
            return error.status_code in (413, *REFUSED_STATUS_CODES)
        self._num_waiting += 1
        self.close_request()
        await self._verdict.wait()
        return self.has_answered

    def close_request(self) -> None:
        """Counts a request as answered or refused."""
        self.num_open -= 1
        if self.has_answered or (self.num_open == 0 and self._num_waiting):
            self._verdict.set()


def _import_openai() -> ModuleType:
    """Imports the `openai` package, which the extra `server` installs."""
    try:
        import openai
    except ImportError as error:
        raise ImportError(
            f"`ServerEngine` needs the `openai` package, which cannot be imported ({error}). Install it: "
            "pip install spec_kd[server]"
        ) from error
    return openai


def _read_key(variable: str) -> str:
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        # the HTTP library would refuse the header, with its value in the message
        raise ValueError(
            f"The environment variable {variable} has characters that an API key cannot have, such as a line break or "
            "a typographic quotation mark. Set it again."
        )
    return key or "EMPTY"


def _read_retry_after(headers: JsonValue) -> float | None:
    """The pause in seconds, from either form of `Retry-After`; `None` without one."""
    if (value := headers.get("retry-after")) is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        date = email.utils.parsedate_tz(value)
        return None if date is None else max(0.0, email.utils.mktime_tz(date) - time.time())
