"""Requests to an OpenAI-compatible server: how many at a time, how often, and what is tried again.

The API key is read from the environment for as long as a batch lasts and kept nowhere. Errors of the `openai` client
hold the request with its headers, so they never leave this file: what failed is said in errors of our own, which are
raised outside of the `except` blocks, so that no traceback leads back to them either.
"""

import asyncio
import email.utils
import json
import logging
import os
import random
import re
import time
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType
from typing import TypeVar, cast

from spec_kd.checks import check_int, check_number
from spec_kd.engines.base import Completion, MissingCompletionsError
from spec_kd.engines.server.address import Userinfo, hide_userinfo
from spec_kd.engines.server.connection_errors import explain_connection_error
from spec_kd.open_types import JsonObject, JsonValue
from spec_kd.secrets import hide_secrets

MAX_BACKOFF = 60.0  # seconds
MAX_RETRY_AFTER = 300.0  # seconds; a server that wants more is not worth waiting for unattended
RETRIED_STATUS_CODES = (408, 409, 429)
REFUSED_STATUS_CODES = (400, 422)  # of a body that is understood and not accepted
# What vLLM, SGLang, llama.cpp, TensorRT-LLM and OpenAI say of a prompt that is too long for them.
TOO_LONG = re.compile(
    r"context (?:length|size|window)|context_length|maximum context|max_model_len|max_input|too long|longer than|"
    r"exceeds? (?:the|max)|too many tokens",
    re.IGNORECASE,
)
MESSAGE_LENGTH = 1000

Result = TypeVar("Result")
logger = logging.getLogger(__name__)


class ServerRequestError(RuntimeError):
    """A request that the server refused, did not answer through all retries, or answered with something unusable.

    Attributes:
        index (`int`, *optional*): Of the prompt in the batch.
        status_code (`int`, *optional*): HTTP status; `None` where there was no answer, or one with status 200.
    """

    def __init__(self, message: str, index: int | None = None, status_code: int | None = None):
        super().__init__(message)
        self.index = index
        self.status_code = status_code


class RefusedPromptsError(MissingCompletionsError, ServerRequestError):
    """A server refused some prompts of a batch and answered the others.

    Args:
        refusals (`Mapping[int, ServerRequestError]`): By the index in the batch.
        completions (`Sequence[Completion | None]`), unidentified (`Sequence[list[str]]`): Of the batch.
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
        self.index = first
        self.status_code = refusals[first].status_code


@dataclass(frozen=True)
class _Failure:
    reason: str
    is_transient: bool
    status_code: int | None = None
    retry_after: float | None = None


class CompletionsClient:
    """Posts to `/v1/completions`, many requests at a time.

    Connection errors, timeouts, statuses 408, 409, 429 and 5xx, and answers that are no JSON object with `choices` are
    tried again after a pause drawn uniformly from 0 to min(60 s, `backoff` x 2^attempt), or after what the server's
    `Retry-After` says if that is longer (more than 300 s is refused). Any other status fails at once. A request keeps
    its place among the `max_concurrency` while it waits, so that a server in trouble gets fewer requests. Each attempt
    opens its own connection.

    Args:
        base_url (`str`):
            With the `/v1`. A user name and password in it are sent as a header, and never shown or logged.
        max_concurrency (`int`): Requests under way at a time, in a batch.
        max_retries (`int`): Further attempts after the first.
        requests_per_minute (`float`, *optional*): Attempts started a minute, evenly spaced, over all batches.
        timeout (`float`): Seconds from sending a request to having the whole answer.
        api_key_env (`str`): Environment variable with the API key. If it is not set, "EMPTY" is sent.
        backoff (`float`): Longest pause before the first further attempt, in seconds.
    """

    def __init__(
        self,
        base_url: str,
        *,
        max_concurrency: int,
        max_retries: int,
        requests_per_minute: float | None,
        timeout: float,
        api_key_env: str,
        backoff: float,
    ):
        import_openai()
        check_int("max_concurrency", max_concurrency)
        check_int("max_retries", max_retries, 0)
        check_number("requests_per_minute", requests_per_minute, above=0, is_optional=True)
        check_number("timeout", timeout, above=0)
        check_number("backoff", backoff, 0)
        self._base_url = hide_userinfo(base_url)  # the HTTP library logs the address of every request
        self._userinfo = Userinfo(base_url)
        self._max_concurrency = max_concurrency
        self._max_retries = max_retries
        self._interval = 0.0 if requests_per_minute is None else 60.0 / requests_per_minute
        self._next_start = 0.0
        self._timeout = timeout
        self._api_key_env = api_key_env
        self._backoff = backoff
        self._has_answered = False
        self._random = random.Random()  # not the global one, whose state belongs to the experiment

    def post_all(
        self,
        bodies: Sequence[JsonObject],
        read: Callable[[int, JsonObject], Result],
        fails_at_once: Collection[int] = (),
        names: Sequence[str] | None = None,
        refuse: Callable[[int, ServerRequestError], Result] | None = None,
    ) -> list[Result]:
        """Posts all bodies and returns what `read(index, answer)` makes of the answers, in order.

        The first failure, of a request or of `read`, cancels what is still under way and is raised. Works inside of a
        running event loop too (Jupyter), which it blocks.

        Args:
            bodies (`Sequence[dict]`): JSON objects.
            read (`Callable`): From the index of a body and its answer to what is kept of it.
            fails_at_once (`Collection[int]`, *optional*): HTTP statuses that are not tried again in this call.
            names (`Sequence[str]`, *optional*): Of the bodies, for messages; `"Prompt 0"`, ... by default.
            refuse (`Callable`, *optional*):
                What is kept of a request that the server refused for its prompt, while others go on: one that is too
                long by the server's words, or any other as soon as the server has answered one.

        Raises:
            `ServerRequestError`: Names the index of the body that failed.
            `ValueError`: The API key cannot be sent.
        """
        if not bodies:
            return []
        names = [f"Prompt {index}" for index in range(len(bodies))] if names is None else names
        return _run_to_end(self._post_all(bodies, read, fails_at_once, names, refuse))

    async def _post_all(
        self,
        bodies: Sequence[JsonObject],
        read: Callable[[int, JsonObject], Result],
        fails_at_once: Collection[int],
        names: Sequence[str],
        refuse: Callable[[int, ServerRequestError], Result] | None,
    ) -> list[Result]:
        openai = import_openai()
        places = asyncio.Semaphore(self._max_concurrency)
        jury = _Jury(self._has_answered)

        async def post(index: int, body: JsonObject) -> Result:
            async with places:
                jury.open()
                try:
                    answer = await self._post(client, index, names[index], body, fails_at_once)
                except ServerRequestError as error:
                    if refuse is None or not await jury.blames_prompt(error):
                        raise
                    return refuse(index, error)
                jury.note_completion()
                self._has_answered = True
                return read(index, answer)

        failures: BaseExceptionGroup | None = None
        async with openai.AsyncOpenAI(
            api_key=_read_key(self._api_key_env),
            base_url=self._base_url,
            timeout=self._timeout,
            max_retries=0,
            # On a connection that is kept, bytes left over from one answer would be read as the answer to the next.
            default_headers={"Connection": "close", **self._userinfo.build_headers()},
        ) as client:
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(post(index, body)) for index, body in enumerate(bodies)]
            except BaseExceptionGroup as raised:
                failures = raised
        if failures is not None:
            raise failures.exceptions[0]
        return [task.result() for task in tasks]

    async def _post(
        self, client: JsonValue, index: int, name: str, body: JsonObject, fails_at_once: Collection[int]
    ) -> JsonObject:
        attempt = -1
        while True:
            attempt += 1
            await self._wait_for_turn()
            answer, failure = await self._attempt(client, body)
            if failure is None:
                return answer
            if not failure.is_transient or failure.status_code in fails_at_once:
                raise ServerRequestError(f"{name}: {failure.reason}", index, failure.status_code)
            if attempt == self._max_retries:
                raise ServerRequestError(
                    f"{name}: no usable answer in {attempt + 1} attempts; the last: {failure.reason}",
                    index,
                    failure.status_code,
                )
            pause = self._random.uniform(0.0, min(MAX_BACKOFF, self._backoff * 2**attempt))
            if failure.retry_after is not None:
                if failure.retry_after > MAX_RETRY_AFTER:
                    raise ServerRequestError(
                        f"{name}: the server wants to be left alone for {failure.retry_after:.0f} s, more than "
                        f"the {MAX_RETRY_AFTER:.0f} s that are waited: {failure.reason}",
                        index,
                        failure.status_code,
                    )
                pause = max(pause, failure.retry_after)
            logger.warning(
                "%s: %s; attempt %d of %d in %.1f s",
                name,
                failure.reason,
                attempt + 2,
                self._max_retries + 1,
                pause,
            )
            await asyncio.sleep(pause)

    async def _wait_for_turn(self) -> None:
        now = time.monotonic()
        start = max(now, self._next_start)
        self._next_start = start + self._interval
        await asyncio.sleep(start - now)

    async def _attempt(self, client: JsonValue, body: JsonObject) -> tuple[JsonObject, _Failure | None]:
        openai = import_openai()
        fields = {name: value for name, value in body.items() if name not in ("model", "prompt")}
        try:
            async with asyncio.timeout(self._timeout):  # the client's own timeout is per read
                response = await client.completions.with_raw_response.create(
                    model=body["model"], prompt=body["prompt"], extra_body=fields
                )
        except (TimeoutError, openai.APITimeoutError):
            return {}, _Failure(f"no whole answer within {self._timeout:g} s", is_transient=True)
        except openai.APIStatusError as error:
            return {}, self._describe_status(error.response)
        except openai.APIConnectionError as error:
            reason, is_transient = explain_connection_error(error, self._base_url)
            return {}, _Failure(f"the connection to {self._base_url} failed: {reason}", is_transient)
        try:
            answer = json.loads(response.http_response.content)
        except ValueError:  # of JSON, or of the characters in it
            return {}, _Failure("the answer is not JSON", is_transient=True)
        choices = answer.get("choices") if isinstance(answer, dict) else None
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            return {}, _Failure(f"the answer has no `choices`: {self._shorten(json.dumps(answer))}", is_transient=True)
        return answer, None

    def _describe_status(self, response: JsonValue) -> _Failure:
        code = response.status_code
        return _Failure(
            f"the server answered with HTTP status {code}: {self._shorten(response.text)}",
            is_transient=code in RETRIED_STATUS_CODES or code >= 500,
            status_code=code,
            retry_after=_read_retry_after(response.headers),
        )

    def _shorten(self, text: str) -> str:
        """What a server says, without the key and the password, which some repeat."""
        text = text.replace(_read_key(self._api_key_env), "[API key]") if os.environ.get(self._api_key_env) else text
        text = hide_secrets(self._userinfo.hide(text))
        return text if len(text) <= MESSAGE_LENGTH else f"{text[:MESSAGE_LENGTH]}... ({len(text)} characters)"


class _Jury:
    """Tells a prompt that a server refuses from a form of requests that it refuses.

    A server that has answered some request takes the form. Before that, a refusal waits for the requests that are under
    way: if all are refused, it is the form.
    """

    def __init__(self, has_answered: bool):
        self._has_answered = has_answered
        self._verdict = asyncio.Event()
        if has_answered:
            self._verdict.set()
        self._num_open = self._num_waiting = 0

    def open(self) -> None:
        """Notes a request that is under way."""
        self._num_open += 1

    def note_completion(self) -> None:
        """Notes the answer to one."""
        self._has_answered = True
        self._verdict.set()
        self._close()

    async def blames_prompt(self, error: ServerRequestError) -> bool:
        """Whether a request that failed did so for its prompt."""
        is_too_long = error.status_code == 413 or TOO_LONG.search(str(error)) is not None
        if error.status_code not in REFUSED_STATUS_CODES or is_too_long:
            self._close()
            return error.status_code in (413, *REFUSED_STATUS_CODES)
        self._num_waiting += 1
        self._close()
        await self._verdict.wait()
        return self._has_answered

    def _close(self) -> None:
        self._num_open -= 1
        if self._num_open == 0 and self._num_waiting:
            self._verdict.set()


def import_openai() -> ModuleType:
    """The `openai` package, of the extra `server`."""
    try:
        import openai
    except ImportError as error:
        raise ImportError(
            f"`ServerEngine` needs the `openai` package, which cannot be imported ({error}): "
            "pip install spec_kd[server]"
        ) from error
    return openai


def _read_key(variable: str) -> str:
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        # The HTTP library would refuse the header with its value in the message.
        raise ValueError(
            f"The environment variable {variable} holds characters that an API key cannot have, such as line breaks or "
            "quotation marks of a word processor: set it again."
        )
    return key or "EMPTY"


def _read_retry_after(headers: JsonValue) -> float | None:
    """Seconds, from `Retry-After` in either of its forms."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        date = email.utils.parsedate_tz(value)
        return None if date is None else max(0.0, email.utils.mktime_tz(date) - time.time())


def _run_to_end(coroutine: Coroutine[JsonValue, JsonValue, Result]) -> Result:
    """`asyncio.run`, on a thread of its own where a loop is running already."""
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
            if not running.done():  # interrupted from outside: the thread would go on to the end of the batch
                loop, task = started.result()
                loop.call_soon_threadsafe(task.cancel)
            raise
