"""Requests to a completion server: the signals it can give, the fields of a request, prompts as ids or text."""

import json
from collections.abc import Sequence
from typing import cast

from transformers import PreTrainedTokenizerBase

from spec_kd.engines.base import UnsupportedByEngineError, count_likely_ids
from spec_kd.engines.server.connection import ServerOptions
from spec_kd.losses import SignalSpec
from spec_kd.open_types import JsonObject
from spec_kd.sampling.prompts import UnusablePromptError, check_prompt_ids, name_prompt
from spec_kd.vocabulary import count_real_ids

# OpenAI's requests do not have these fields. The first two ask for ids. The others undo what servers take from the
# model's generation config (vLLM, SGLang) or do by default (llama.cpp: top-k 40, min-p 0.05).
EXTENSIONS = {
    "return_token_ids": True,
    "return_tokens_as_token_ids": True,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}
OWN_FIELDS = frozenset(
    ("model", "prompt", "max_tokens", "temperature", "top_p", "logprobs", "echo", "seed", "n", "stream", "stop")
)


class RequestBuilder:
    """Builds the bodies of requests to `/v1/completions`, for plain sampling at a temperature.

    Args:
        model (`str`): Name of the target on the server.
        tokenizer (`PreTrainedTokenizerBase`): Tokenizer of the target.
        eos_token_ids (`list[int]`): Ids that end a completion.
        options (`ServerOptions`): Its `extra_body`, and whether prompts are sent as text to `transformers serve`.

    Raises:
        ValueError: `extra_body` has a field that the engine sets itself.
    """

    def __init__(
        self, model: str, tokenizer: PreTrainedTokenizerBase, eos_token_ids: list[int], options: ServerOptions
    ):
        extra_body = options.extra_body or {}
        if taken := OWN_FIELDS & set(extra_body):
            raise ValueError(
                f"`extra_body` has {', '.join(sorted(taken))}, which the engine sets itself. Remove it from there."
            )
        self._model, self._tokenizer, self._num_ids = model, tokenizer, count_real_ids(tokenizer)
        self._eos_token_ids, self._is_text_only = eos_token_ids, options.is_text_only
        extensions = {} if options.is_text_only else EXTENSIONS | {"stop_token_ids": eos_token_ids}
        self._fields = {"presence_penalty": 0.0, "frequency_penalty": 0.0, **extensions, **extra_body}

    @property
    def constant_fields(self) -> JsonObject:
        """The fields that are the same in all requests."""
        return {name: value for name, value in self._fields.items() if value is not None}

    def count_logprobs(self, signal: SignalSpec | None) -> int:
        """Number of most likely tokens to ask for; at least 1, because with 0 llama.cpp returns no tokens at all.

        Raises:
            UnsupportedByEngineError: Servers, or text-only servers, cannot give this signal.
            ValueError: The method is unknown, or its `top_k` is missing.
        """
        if signal is not None and self._is_text_only:
            raise UnsupportedByEngineError(
                f"A text-only server cannot give {signal.method!r}. Use one that returns log-probabilities (vLLM, "
                "SGLang, llama.cpp) without `is_text_only`, or the transformers engine."
            )
        top_k = count_likely_ids(signal, "server")
        if top_k > self._num_ids:
            raise UnsupportedByEngineError(
                f"`top_k={top_k}` is more than the {self._num_ids} ids of the target. Lower it."
            )
        return max(1, top_k)

    def check_prompts(self, prompts: Sequence[list[int]]) -> None:
        """Raises `ValueError` for a prompt that is empty, has an unknown id, or must be sent as text and cannot."""
        check_prompt_ids(prompts, self._num_ids, "the tokenizer has")
        if self._is_text_only:
            for index, ids in enumerate(prompts):
                self._decode_exactly(name_prompt(prompts, index), list(ids))

    def build(
        self,
        name: str,
        ids: Sequence[int],
        max_tokens: int,
        temperature: float,
        num_logprobs: int | None = 1,
        seed: int | None = None,
    ) -> JsonObject:
        """Builds the body that asks for one completion.

        Args:
            name (`str`): Name of the prompt, for errors.
            ids (`Sequence[int]`): Ids of the prompt, which [`check_prompts`] has checked.
            max_tokens (`int`): Maximum number of tokens of the completion.
            temperature (`float`): Sampling temperature; 0 is greedy.
            num_logprobs (`int`, *optional*, defaults to `1`): Number of most likely tokens to return at each token;
                `None` asks for no log-probabilities, from which ids would be read if a server returns none.
            seed (`int`, *optional*): Sampling seed, which a server may ignore.
        """
        own = {"model": self._model, "max_tokens": max_tokens, "temperature": temperature, "top_p": 1.0, "seed": seed}
        if self._is_text_only:
            own["prompt"] = self._decode_exactly(name, list(ids))
            own["generation_config"] = self._build_generation_config(temperature)
        else:
            own |= {"prompt": list(ids), "logprobs": num_logprobs}
        return {name: value for name, value in {**own, **self._fields}.items() if value is not None}

    def build_echo(self, ids: Sequence[int], num_logprobs: int = 1) -> JsonObject:
        """Builds the body that asks for the log-probabilities of `ids` themselves.

        The temperature is 1, where raw log-probabilities are processed ones. One token is generated, as not all servers
        can generate none.
        """
        return self.build("The row", ids, 1, 1.0, num_logprobs) | {"echo": True}

    def _decode_exactly(self, name: str, ids: list[int]) -> str:
        """The text from which the server's tokenizer makes these ids, with or without the BOS that it adds."""
        for start in (0, 1):
            text = cast(str, self._tokenizer.decode(ids[start:], clean_up_tokenization_spaces=False))
            if list(self._tokenizer(text)["input_ids"]) == ids:
                return text
        raise UnusablePromptError(
            f"{name} cannot be sent as text, because its text has other ids when it is tokenized again. Use a server "
            "that takes ids.",
            fault="not_text",
        )

    def _build_generation_config(self, temperature: float) -> str:
        """The generation config for `transformers serve`, which otherwise follows the model's own."""
        sampling = {"top_k": 0, "top_p": 1.0, "temperature": temperature} if temperature > 0 else {}
        pad_id = self._tokenizer.pad_token_id
        padding = {} if pad_id is None else {"pad_token_id": pad_id}
        config = {"do_sample": temperature > 0, "eos_token_id": self._eos_token_ids, **sampling, **padding}
        return json.dumps(config)
