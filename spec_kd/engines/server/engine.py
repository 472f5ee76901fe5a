"""The target behind an OpenAI-compatible server: vLLM, SGLang, llama.cpp, TensorRT-LLM, `transformers serve`."""

from collections.abc import Callable, Collection, Sequence

from spec_kd.checks import check_choice
from spec_kd.engines.base import Completion, Engine, check_untruncated, join_rows
from spec_kd.engines.server.address import check_base_url, hide_userinfo
from spec_kd.engines.server.client import CompletionsClient, RefusedPromptsError, ServerRequestError
from spec_kd.engines.server.completion_reader import CompletionReader
from spec_kd.engines.server.logprobs import (
    FullContextError,
    MalformedResponseError,
    UnidentifiedTokens,
    UnidentifiedTokensError,
)
from spec_kd.engines.server.requests import RequestBuilder
from spec_kd.engines.server.scoring import verify_scoring
from spec_kd.losses import SignalSpec
from spec_kd.open_types import Argument, JsonObject, JsonValue, Record
from spec_kd.sampling.drawing import derive_seed
from spec_kd.sampling.options import SamplingOptions
from spec_kd.sampling.prompt_batch import name_prompt, report_progress
from spec_kd.secrets import strip_secrets
from spec_kd.vocabulary import ProcessingClass, get_tokenizer

SEED_BITS = 31  # llama.cpp takes 32 without a sign


class ServerEngine(Engine):
    """The target behind an OpenAI-compatible server, asked through `/v1/completions` with prompts of token ids.

    **Ids.** They come from the server where it returns them (vLLM from 0.10.2, recent SGLang, llama.cpp), else from the
    token strings of its log-probabilities, each of which must be exactly one id of the tokenizer: those that are not
    raise an [`UnidentifiedTokensError`] with their number, examples, and the completions that are whole, or are left
    out by `generate_responses(..., on_unidentified_token="drop")`. They are never found by tokenizing the text again,
    except with `is_text_only`.

    **Which log-probabilities.** vLLM and llama.cpp return *raw* ones, of the model before any temperature: for text
    sampled at a temperature other than 1 these are not those of the distribution it was drawn from, and serve no exact
    replay. vLLM started with `--logprobs-mode processed_logprobs`, and SGLang unless it was started with
    `SGLANG_RETURN_ORIGINAL_LOGPROB=1`, return *processed* ones: say so with `logprobs_mode="processed"`. The two cannot
    be told apart from here.

    **EOS.** A completion that the server stopped ends with its EOS. vLLM, SGLang and llama.cpp return it with its
    log-probability. A server that drops it (TensorRT-LLM) can give no signal, since the EOS is a token that a draft
    must predict and its log-probability is not there: a signal is refused. Without a signal the EOS is appended: the id
    that the server names as `stop_reason` or `matched_stop`, else the tokenizer's.

    **Servers that check fields.** The request has fields that are not OpenAI's (`request_fields` in `describe`), which
    servers mostly ignore if they do not know them. For those that do not, take fields out with `None`:
    `extra_body={"return_token_ids": None, "return_tokens_as_token_ids": None, "top_k": 0}` for TensorRT-LLM.

    **Text only.** With `is_text_only=True`, for `transformers serve` and its like, prompts are sent as text (which must
    give the same ids when tokenized again) and the ids of a completion are *its text, tokenized again*: not always what
    the target wrote, so good for black-box training only, and any signal is refused. `describe` says so. Half a
    character at the limit is left off; a text with one anywhere else raises an [`UnidentifiedTokensError`].

    Args:
        model (`str`): Name under which the server has the target.
        tokenizer (`PreTrainedTokenizerBase` or `ProcessorMixin`): The target's processing class.
        base_url (`str`):
            Such as `"http://localhost:8000/v1"`. A user name and password in it are sent, and shown nowhere; anything
            after a `?` is refused.
        max_concurrency (`int`, *optional*, defaults to `16`): Requests under way at a time.
        max_retries (`int`, *optional*, defaults to `6`):
            Further attempts at a request that failed for a reason that may pass: connection errors, timeouts, statuses
            408, 409, 429 (waiting as `Retry-After` says) and 5xx, broken JSON.
        requests_per_minute (`float`, *optional*): Limit, evenly spaced; retries count.
        timeout (`float`, *optional*, defaults to `120.0`): Seconds for a whole answer.
        api_key_env (`str`, *optional*, defaults to `"OPENAI_API_KEY"`):
            Environment variable with the API key, the only place where it is read from. Not needed for local servers.
        logprobs_mode (`str`, *optional*, defaults to `"raw"`): `"raw"` or `"processed"`, as the server was started.
        extra_body (`dict`, *optional*): Fields to add to every request, or with `None` to take out. No secrets.
        eos_token_ids (`list[int]`, *optional*):
            Ids that end a completion; by default the tokenizer's EOS, and what its chat template ends a reply with.
            Targets with several in their generation config need them all here.
        is_text_only (`bool`, *optional*, defaults to `False`): Whether the server speaks text only.
        backoff (`float`, *optional*, defaults to `1.0`): Longest pause before the first retry in seconds, then doubled.

    Raises:
        `ImportError`: The `openai` package is missing.
        `ValueError`: An option out of its range, or no EOS id.
    """

    name = "server"

    def __init__(
        self,
        model: str,
        tokenizer: ProcessingClass,
        base_url: str,
        *,
        max_concurrency: int = 16,
        max_retries: int = 6,
        requests_per_minute: float | None = None,
        timeout: float = 120.0,
        api_key_env: str = "OPENAI_API_KEY",
        logprobs_mode: str = "raw",
        extra_body: Record | None = None,
        eos_token_ids: Sequence[int] | None = None,
        is_text_only: bool = False,
        backoff: float = 1.0,
    ):
        check_choice("logprobs_mode", logprobs_mode, ("raw", "processed"))
        check_base_url(base_url, api_key_env)
        self.target_name = model
        self.processing_class = tokenizer
        self._tokenizer = get_tokenizer(tokenizer)
        self.logprobs_mode = logprobs_mode
        self.is_text_only = is_text_only
        self._reader = CompletionReader(tokenizer, eos_token_ids, is_text_only)
        self.eos_token_ids = self._reader.eos_token_ids
        self._requests = RequestBuilder(model, self._tokenizer, self.eos_token_ids, is_text_only, extra_body)
        self._base_url = hide_userinfo(base_url)
        self._client = CompletionsClient(
            base_url,
            max_concurrency=max_concurrency,
            max_retries=max_retries,
            requests_per_minute=requests_per_minute,
            timeout=timeout,
            api_key_env=api_key_env,
            backoff=backoff,
        )
        self._is_scoring_verified = False

    def __repr__(self) -> str:
        return f"ServerEngine({self.target_name!r}, base_url={self._base_url!r}, logprobs_mode={self.logprobs_mode!r})"

    def describe(self) -> dict[str, object]:
        """Model, fields of the requests and where ids come from, as JSON values.

        Without the address, which may be another one when a job is resumed; what the server is, it does not say.
        """
        return {
            "engine": self.name,
            "model": self.target_name,
            "logprobs_mode": self.logprobs_mode,
            "completion_ids": "text tokenized again" if self.is_text_only else "of the server",
            "eos_token_ids": self.eos_token_ids,
            "request_fields": strip_secrets(self._requests.constant_fields, None),
        }

    def check(self, prompts: Sequence[list[int]], options: SamplingOptions | None, signal: SignalSpec | None) -> None:
        """Checks what can be known without the server, as `generate` and `score` do first.

        Raises:
            `UnsupportedByEngineError`: A method that servers do not give, top-k or top-p.
            `UnusablePromptError`: One that is not the ids of any text (`is_text_only`).
            `ValueError`: An empty prompt or one with ids that the tokenizer does not have; an option out of its range.
        """
        self._requests.count_logprobs(signal)
        if options is not None:
            check_untruncated(options, self.name)
        self._requests.check_prompts(prompts)

    def generate(
        self,
        prompts: Sequence[list[int]],
        options: SamplingOptions,
        signal: SignalSpec | None = None,
        seed: str = "",
    ) -> list[Completion]:
        """Answers prompts, given as ids, in their order, `max_concurrency` at a time. Works in a notebook too.

        Each request of a sampled batch gets a seed of its own, which a server may ignore.

        Args:
            prompts (`Sequence[list[int]]`): Ids of each prompt, at least one.
            options (`SamplingOptions`): For all of them.
            signal (`SignalSpec`, *optional*):
                `"token_only"`, or `"top_k_tail"` with a `top_k` that the server allows (vLLM: `--max-logprobs`, 20 by
                default). Slots hold exactly `top_k` ids, most likely first; log p is -inf where the server wrote its
                stand-in for it (-9999).
            seed (`str`): Distinguishes this batch from the job's others.

        Raises:
            `UnsupportedByEngineError`: Before any request, for a method that servers do not give; after the first
                answers, where they lack ids, log-probabilities, or that of the EOS.
            `UnidentifiedTokensError`: After the batch: tokens without an exact id. Holds the whole completions.
            `RefusedPromptsError`: After the batch: the server refused some prompts, as those that are too long for it.
                Holds the completions of the others.
            `ServerRequestError`: A request failed for good, or its answer makes no sense; the others are canceled.
            `ValueError`: Before any request, as of `check`.
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
            prompts,
            bodies,
            lambda i, a: self._reader.read_completion(a, signal, options.max_new_tokens, prompts[i]),
        )

    def score(
        self, prompts: Sequence[list[int]], completions: Sequence[list[int]], signal: SignalSpec, seed: str = ""
    ) -> list[Completion]:
        """The raw log-probabilities (and kept ids) of completions that exist already, in their order.

        Prompt and completion are sent together and echoed, with one more token generated, for which there must be room.
        vLLM and SGLang can do it. Before the first batch a few short sampled texts are scored and compared with what
        their generation said: some servers' echo is wrong without a sign (llama-cpp-python's is shifted by one).

        Args:
            prompts (`Sequence[list[int]]`): Ids of each prompt, at least one.
            completions (`Sequence[list[int]]`): Ids of each completion, at least one.
            signal (`SignalSpec`): As of `generate`.
            seed (`str`): Not used: nothing is drawn.

        Returns:
            `list[Completion]` with the ids given; `finish_reason` is `"stop"` where the last one is an EOS.

        Raises:
            `UnsupportedByEngineError`: The method is none that servers give, or this one cannot score given text.
            `UnidentifiedTokensError`, `ServerRequestError`: As of `generate`.
            `ValueError`: Before any request: not one completion for each prompt, or empty ones.
        """
        texts = join_rows(prompts, completions)
        self.check(texts, None, signal)
        bodies = [self._requests.build_echo(text, self._requests.count_logprobs(signal)) for text in texts]
        if bodies and not self._is_scoring_verified:
            verify_scoring(prompts, self._requests, self._reader, self._post_all, self._collect)
            self._is_scoring_verified = True
        return self._collect(
            prompts, bodies, lambda i, a: self._reader.read_scored(a, texts[i], len(prompts[i]), signal)
        )

    def _collect(
        self,
        prompts: Sequence[list[int]],
        bodies: list[JsonObject],
        read: Callable[[int, JsonObject], Completion],
    ) -> list[Completion]:
        names: list[list[str]] = [[] for _ in bodies]
        refusals: dict[int, ServerRequestError] = {}

        def refuse(index: int, error: ServerRequestError) -> None:
            refusals[index] = error

        def read_one(index: int, answer: JsonObject) -> Completion | None:
            try:
                completion = read(index, answer)
            except UnidentifiedTokens as error:
                names[index] = error.names
                return None
            except MalformedResponseError as error:
                message = f"{name_prompt(prompts, index)}: the answer cannot be used: {error}."
                refusal = ServerRequestError(message, index)
                if not isinstance(error, FullContextError):
                    raise refusal from error
                refuse(index, refusal)
                return None
            report_progress(prompts, len(completion.ids))
            return completion

        completions = self._post_all(
            bodies, read_one, names=[name_prompt(prompts, index) for index in range(len(bodies))], refuse=refuse
        )
        if refusals:
            raise RefusedPromptsError(refusals, completions, names)
        if any(names):
            raise UnidentifiedTokensError(names, completions)
        return completions

    def _post_all(
        self,
        bodies: list[JsonObject],
        read: Callable[[int, JsonObject], JsonValue],
        fails_at_once: Collection[int] = (),
        **options: Argument,
    ) -> list[JsonValue]:
        try:
            return self._client.post_all(bodies, read, fails_at_once, **options)
        except ServerRequestError as error:
            if error.status_code not in (400, 422):
                raise
            hint = (
                f"{error}\nSent beside the OpenAI API: {', '.join(self._requests.constant_fields)}. If the server "
                "does not know one of these, take it out with `extra_body={name: None}`; if it takes no token ids as "
                "prompt, it needs `is_text_only=True`."
            )
            raise ServerRequestError(hint, error.index, error.status_code) from None
