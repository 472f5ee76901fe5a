"""The target behind an OpenAI-compatible server: vLLM, SGLang, llama.cpp, TensorRT-LLM, `transformers serve`."""

from collections.abc import Callable, Sequence

from spec_kd.engines.base import Completion, Engine, check_untruncated, join_rows
from spec_kd.engines.server.client import CompletionsClient, RefusedPromptsError, ServerRequestError
from spec_kd.engines.server.completion_reader import CompletionReader
from spec_kd.engines.server.connection import ServerOptions, check_base_url, find_root, hide_userinfo
from spec_kd.engines.server.logprobs import (
    FullContextError,
    MalformedResponseError,
    UnidentifiedTokens,
    UnidentifiedTokensError,
)
from spec_kd.engines.server.requests import RequestBuilder
from spec_kd.engines.server.scoring import verify_scoring
from spec_kd.losses import SignalSpec
from spec_kd.open_types import Argument, JsonObject, JsonValue
from spec_kd.options import resolve_options
from spec_kd.sampling.generation import derive_seed
from spec_kd.sampling.options import SamplingOptions
from spec_kd.sampling.prompts import name_prompt, report_progress
from spec_kd.secrets import strip_secrets
from spec_kd.vocabulary import ProcessingClass, get_tokenizer

SEED_BITS = 31  # llama.cpp takes 32 without a sign


class ServerEngine(Engine):
    """The target on an OpenAI-compatible server, which completes prompts of token ids at `/v1/completions`.

    **Ids.** They come from the server if it returns them (vLLM from 0.10.2, recent SGLang, llama.cpp). Otherwise they
    come from the token strings of its log-probabilities, each of which must be exactly one id of the tokenizer. A batch
    with other strings raises an [`UnidentifiedTokensError`] with their number, examples, and the completions that are
    whole; `generate_responses(..., on_unidentified_token="drop")` leaves such rows out. Ids never come from tokenizing
    the text again, except with `is_text_only`.

    **Log-probabilities.** vLLM and llama.cpp return *raw* ones, of the model before any temperature. For completions
    sampled at a temperature other than 1, they are not those of the distribution that was sampled from, and do not
    allow exact replay. vLLM started with `--logprobs-mode processed_logprobs`, and SGLang unless it was started with
    `SGLANG_RETURN_ORIGINAL_LOGPROB=1`, return *processed* ones: set `logprobs_mode="processed"`. The engine cannot find
    out which ones it gets.

    **EOS.** A completion that the server stopped ends with its EOS. vLLM, SGLang and llama.cpp return the EOS with its
    log-probability. A server that drops it (TensorRT-LLM) can give no signal, because a draft must predict the EOS too.
    Without a signal the engine appends the EOS: the id that the server names as `stop_reason` or `matched_stop`, else
    the tokenizer's.

    **Servers that check fields.** Requests have fields that OpenAI's do not have (`request_fields` in `describe`). Most
    servers ignore those that they do not know. For others, remove fields with `None`:
    `extra_body={"return_token_ids": None, "return_tokens_as_token_ids": None, "top_k": 0}` for TensorRT-LLM.

    **Text only.** With `is_text_only=True`, for servers such as `transformers serve`, prompts are sent as text, which
    must give the same ids when tokenized again. The ids of a completion are *its text, tokenized again*, which is not
    always what the target wrote. So they serve black-box training only, any signal is refused, and `describe` says so.
    Half a character at the limit is cut off; a text with one anywhere else raises an [`UnidentifiedTokensError`].

    Args:
        model (`str`): Name of the target on the server.
        tokenizer (`PreTrainedTokenizerBase` or `ProcessorMixin`): Processing class of the target.
        base_url (`str`):
            Address such as `"http://localhost:8000/v1"`. A user name and password in it are sent, and shown nowhere;
            anything after a `?` is refused.
        options (`ServerOptions`, *optional*): How the server is asked; the defaults of [`ServerOptions`] by default.
        given: Fields of [`ServerOptions`] as keywords, which replace those of `options`.

    Attributes:
        options (`ServerOptions`): The options.
        eos_token_ids (`list[int]`): Ids that end a completion.

    Raises:
        ImportError: The `openai` package is missing.
        TypeError: A keyword is no option.
        ValueError: An option is out of its range, `base_url` is no address, or there is no EOS id.
    """

    name = "server"

    def __init__(
        self,
        model: str,
        tokenizer: ProcessingClass,
        base_url: str,
        options: ServerOptions | None = None,
        **given: Argument,
    ):
        self.options = options = resolve_options(ServerOptions, options, given)
        check_base_url(base_url, options.api_key_env)
        self.target_name, self.processing_class, self.logprobs_mode = model, tokenizer, options.logprobs_mode
        self._reader = CompletionReader(tokenizer, options.eos_token_ids, options.is_text_only)
        self.eos_token_ids = self._reader.eos_token_ids
        self._requests = RequestBuilder(model, get_tokenizer(tokenizer), self.eos_token_ids, options)
        self._base_url, self._client = hide_userinfo(base_url), CompletionsClient(base_url, options)
        self._is_scoring_verified = False

    def __repr__(self) -> str:
        return f"ServerEngine({self.target_name!r}, base_url={self._base_url!r}, logprobs_mode={self.logprobs_mode!r})"

    def describe(self) -> dict[str, object]:
        """The model, the fields of the requests and where ids come from, as JSON values.

        The address is left out, because it may change before a job is resumed.
        """
        return {
            "engine": self.name,
            "model": self.target_name,
            "logprobs_mode": self.logprobs_mode,
            "completion_ids": "text tokenized again" if self.options.is_text_only else "of the server",
            "eos_token_ids": self.eos_token_ids,
            "request_fields": strip_secrets(self._requests.constant_fields, None),
        }

    def check(self, prompts: Sequence[list[int]], options: SamplingOptions | None, signal: SignalSpec | None) -> None:
        """Checks a job without asking the server; see [`Engine.check`].

        Raises:
            UnsupportedByEngineError: Servers cannot give the signal, or sample with `top_k` or `top_p`.
            UnusablePromptError: A prompt is not the ids of any text (`is_text_only`).
            ValueError: A prompt is empty, or has an id that the tokenizer does not have.
        """
        self._requests.count_logprobs(signal)
        check_untruncated(options, self.name)
        self._requests.check_prompts(prompts)

    def generate(
        self,
        prompts: Sequence[list[int]],
        options: SamplingOptions,
        signal: SignalSpec | None = None,
        seed: str = "",
    ) -> list[Completion]:
        """Writes a completion to each prompt, `max_concurrency` at a time, also in a notebook; see [`Engine.generate`].

        When sampling, each request gets a seed of its own, which a server may ignore.

        Args:
            prompts (`Sequence[list[int]]`): Ids of each prompt, at least one.
            options (`SamplingOptions`): Options for all prompts.
            signal (`SignalSpec`, *optional*):
                `"token_only"`, or `"top_k_tail"` with a `top_k` that the server allows (vLLM: `--max-logprobs`, 20 by
                default). Completions then have exactly `top_k` ids per token, most likely first, with log p = -inf
                where the server writes -9999. `None` keeps nothing.
            seed (`str`, *optional*, defaults to `""`): Tells this batch from the others of the job.

        Returns:
            `list[Completion]` in the order of the prompts.

        Raises:
            UnsupportedByEngineError: Servers cannot give the signal (before any request), or this one returns no ids,
                no log-probabilities or no EOS (after its first answers).
            UnidentifiedTokensError: Tokens have no exact id. Raised after the batch, with the other completions.
            RefusedPromptsError: The server refused some prompts, such as those that are too long. Raised after the
                batch, with the other completions.
            ServerRequestError: A request failed for good, or its answer makes no sense. All others are canceled.
            ValueError: A prompt is empty or has an unknown id. Raised before any request.
        """
        self.check(prompts, options, signal)
        bodies = [
            self._requests.build(
                name_prompt(prompts, index),
                ids,
                options.max_new_tokens,
                options.temperature,
                self._requests.count_logprobs(signal),
                derive_seed(f"{options.seed}:{seed}:{index}", SEED_BITS) if options.temperature > 0 else None,
            )
            for index, ids in enumerate(prompts)
        ]
        return self._collect(
            prompts, bodies, lambda i, a: self._reader.read_completion(a, signal, options.max_new_tokens, prompts[i])
        )

    def observe(
        self,
        prompts: Sequence[list[int]],
        options: SamplingOptions,
        tell: Callable[[int, Completion, JsonObject, float], None],
        seeds: Sequence[str],
        *,
        path: str | None = None,
        build_body: Callable[[JsonObject], JsonObject] | None = None,
        translate: Callable[[JsonObject], JsonObject] | None = None,
        fields: Sequence[JsonObject] | None = None,
    ) -> None:
        """Writes a completion to each prompt as [`generate`], and tells of each as soon as it is there.

        No log-probabilities are asked for, because a server spends time on them that would count as decoding.

        Args:
            prompts (`Sequence[list[int]]`): Ids of each prompt, at least one.
            options (`SamplingOptions`): Options for all prompts.
            tell (`Callable`):
                Called with the index of a prompt, its completion, the server's whole answer and the seconds from the
                request to the answer.
            seeds (`Sequence[str]`): Text for each prompt, from which its sampling seed is derived above temperature 0.
            path (`str`, *optional*):
                Path from the root of the server's address, such as `"/completion"`; `/v1/completions` by default.
            build_body (`Callable`, *optional*): Makes a body for `path` of one in OpenAI's form.
            translate (`Callable`, *optional*): Makes an answer in OpenAI's form of one of `path`.
            fields (`Sequence[dict]`, *optional*): Further fields of each body, before `build_body`; none by default.

        Raises:
            Exception: As [`generate`]; also what `tell` raises, which cancels all open requests.
        """
        self.check(prompts, options, None)
        seconds: dict[int, float] = {}
        bodies = [
            self._requests.build(
                name_prompt(prompts, index),
                ids,
                options.max_new_tokens,
                options.temperature,
                None,
                derive_seed(seeds[index], SEED_BITS) if options.temperature > 0 else None,
            )
            for index, ids in enumerate(prompts)
        ]

        def read(index: int, answer: JsonObject) -> Completion:
            completion = self._reader.read_completion(answer, None, options.max_new_tokens, prompts[index])
            tell(index, completion, answer, seconds[index])
            return completion

        bodies = bodies if fields is None else [{**body, **more} for body, more in zip(bodies, fields, strict=True)]
        form = {"url": find_root(self._base_url) + path, "translate": translate} if path is not None else {}
        bodies = bodies if build_body is None else [build_body(body) for body in bodies]
        self._collect(prompts, bodies, read, tell_seconds=seconds.__setitem__, **form)

    def fetch(self, path: str) -> str:
        """Gets a page of the server as text.

        Args:
            path (`str`): Path from the root of the server's address, such as `"/metrics"` or `"/v1/models"`.

        Raises:
            ServerRequestError: There is no such page, or it cannot be read.
        """
        return self._client.fetch(find_root(self._base_url) + path)

    def score(
        self, prompts: Sequence[list[int]], completions: Sequence[list[int]], signal: SignalSpec, seed: str = ""
    ) -> list[Completion]:
        """Reads completions that exist already; see [`Engine.score`]. vLLM and SGLang can do it.

        Prompt and completion are sent together and echoed. One more token is generated, for which there must be room.
        Before the first batch, a few short completions are sampled and scored. If the two log-probabilities differ, the
        server cannot score: some return a wrong echo without an error (llama-cpp-python's is shifted by one token).

        Args:
            prompts (`Sequence[list[int]]`): Ids of each prompt, at least one.
            completions (`Sequence[list[int]]`): Ids of each completion, at least one.
            signal (`SignalSpec`): `"token_only"` or `"top_k_tail"`, as for `generate`.
            seed (`str`, *optional*, defaults to `""`): Not used, as nothing is drawn.

        Returns:
            `list[Completion]` with the given ids, in their order. `finish_reason` is `"stop"` if the last id is an EOS.

        Raises:
            UnsupportedByEngineError: Servers cannot give the signal, or this one cannot score.
            UnidentifiedTokensError: Tokens of the `top_k` have no exact id. Raised after the batch.
            ServerRequestError: A request failed for good, or its answer makes no sense.
            ValueError: The numbers of prompts and completions differ, or one is empty. Raised before any request.
        """
        rows = join_rows(prompts, completions)
        self.check(rows, None, signal)
        bodies = [self._requests.build_echo(row, self._requests.count_logprobs(signal)) for row in rows]
        if bodies and not self._is_scoring_verified:
            verify_scoring(prompts, self._requests, self._reader, self._post_all, self._collect)
            self._is_scoring_verified = True
        return self._collect(
            prompts, bodies, lambda i, a: self._reader.read_scored(a, rows[i], len(prompts[i]), signal)
        )

    def _collect(
        self,
        prompts: Sequence[list[int]],
        bodies: list[JsonObject],
        read: Callable[[int, JsonObject], Completion],
        **form: Argument,
    ) -> list[Completion]:
        def read_one(index: int, answer: JsonObject) -> Completion | UnidentifiedTokens | ServerRequestError:
            try:
                completion = read(index, answer)
            except UnidentifiedTokens as error:
                return error
            except MalformedResponseError as error:
                message = f"{name_prompt(prompts, index)}: the answer cannot be used: {error}."
                if isinstance(error, FullContextError):
                    return ServerRequestError(message, index)
                raise ServerRequestError(message, index) from error
            report_progress(prompts, len(completion.ids))
            return completion

        prompt_names = [name_prompt(prompts, index) for index in range(len(bodies))]
        results = self._post_all(bodies, read_one, names=prompt_names, refuse=lambda index, error: error, **form)
        completions = [result if isinstance(result, Completion) else None for result in results]
        unidentified = [result.names if isinstance(result, UnidentifiedTokens) else [] for result in results]
        if refusals := {i: result for i, result in enumerate(results) if isinstance(result, ServerRequestError)}:
            raise RefusedPromptsError(refusals, completions, unidentified)
        if any(unidentified):
            raise UnidentifiedTokensError(unidentified, completions)
        return [completion for completion in completions if completion is not None]

    def _post_all(
        self,
        bodies: list[JsonObject],
        read: Callable[[int, JsonObject], JsonValue],
        **options: Argument,
    ) -> list[JsonValue]:
        try:
            return self._client.post_all(bodies, read, **options)
        except ServerRequestError as error:
            if error.status_code not in (400, 422):
                raise
            raise ServerRequestError(
                f"{error}\nThe request has these fields in addition to OpenAI's: "
                f"{', '.join(self._requests.constant_fields)}. If the server does not know one of them, remove it with "
                "`extra_body={name: None}`. If it takes no token ids as the prompt, set `is_text_only=True`.",
                error.index,
                error.status_code,
            ) from None
