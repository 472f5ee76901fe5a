"""What is asked of a completion server: what it can be asked for, the fields of a request, prompts as ids or text."""

import json
from collections.abc import Sequence
from typing import cast

from transformers import PreTrainedTokenizerBase

from spec_kd.engines.base import UnsupportedByEngineError
from spec_kd.losses import SignalSpec
from spec_kd.open_types import JsonObject, Record
from spec_kd.sampling.input_checks import check_prompt_ids
from spec_kd.sampling.prompt_batch import UnusablePromptError, name_prompt
from spec_kd.vocabulary import count_real_ids

# Not OpenAI's. The first two ask for ids; the others undo what servers take from a model's generation config (vLLM,
# SGLang) or do by default (llama.cpp: top-k 40, min-p 0.05).
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
    """Builds the bodies of requests to `/v1/completions` for plain sampling at a temperature.

    Args:
        model (`str`): Name under which the server has the target.
        tokenizer (`PreTrainedTokenizerBase`): The target's.
        eos_token_ids (`list[int]`): Ids that end a completion.
        is_text_only (`bool`): Whether prompts are sent as text, in the dialect of `transformers serve`.
        extra_body (`Mapping[str, Any]`, *optional*): Fields to add, or with `None` to take out.

    Raises:
        `ValueError`: `extra_body` has a field that belongs to the engine.
    """

    def __init__(
        self,
        model: str,
        tokenizer: PreTrainedTokenizerBase,
        eos_token_ids: list[int],
        is_text_only: bool,
        extra_body: Record | None,
    ):
        if taken := OWN_FIELDS & set(extra_body or {}):
            raise ValueError(f"`extra_body` cannot have {', '.join(sorted(taken))}: the engine sets them itself.")
        self._model = model
        self._tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids
        self._is_text_only = is_text_only
        self._num_ids = count_real_ids(tokenizer)
        constant: JsonObject = {"presence_penalty": 0.0, "frequency_penalty": 0.0}
        if not is_text_only:
            constant |= EXTENSIONS | {"stop_token_ids": eos_token_ids}
        self._fields = {**constant, **(extra_body or {})}

    @property
    def constant_fields(self) -> JsonObject:
        """Fields that are the same in all requests."""
        return {name: value for name, value in self._fields.items() if value is not None}

    def count_logprobs(self, signal: SignalSpec | None) -> int:
        """How many of the most likely tokens to ask for. At least 1: with 0, llama.cpp returns no tokens at all.

        Raises:
            `UnsupportedByEngineError`: Servers, or text-only ones, do not give this signal.
            `ValueError`: An unknown method, or no `top_k`.
        """
        if signal is None:
            return 1
        top_k = signal.sparse_method.count_likely_ids(signal)
        if self._is_text_only:
            raise UnsupportedByEngineError(
                f"A text-only server cannot give {signal.method!r}: use one that returns log-probabilities (vLLM, "
                "SGLang, llama.cpp) without `is_text_only`, or the transformers engine."
            )
        if top_k is None:
            raise UnsupportedByEngineError(
                f"Servers return the most likely ids, not draws from the target's distribution, so they cannot give "
                f"{signal.method!r}: ask for 'top_k_tail' or 'token_only', or use the transformers engine."
            )
        if top_k > self._num_ids:
            raise UnsupportedByEngineError(f"`top_k={top_k}` is more than the {self._num_ids} ids of the target.")
        return max(1, top_k)

    def check_prompts(self, prompts: Sequence[list[int]]) -> None:
        """Raises `ValueError` for prompts that are empty, have unknown ids, or must be said as text and cannot."""
        check_prompt_ids(prompts, self._num_ids, "the tokenizer has")
        if self._is_text_only:
            for index, ids in enumerate(prompts):
                self._say_as_text(name_prompt(prompts, index), list(ids))

    def build(
        self,
        name: str,
        ids: Sequence[int],
        max_tokens: int,
        temperature: float,
        num_logprobs: int = 1,
        seed: int | None = None,
    ) -> JsonObject:
        """The body that asks for a completion of the prompt `ids` of this name; they were checked before."""
        own = {"model": self._model, "max_tokens": max_tokens, "temperature": temperature, "top_p": 1.0, "seed": seed}
        if self._is_text_only:
            own["prompt"] = self._say_as_text(name, list(ids))
            own["generation_config"] = self._build_generation_config(temperature)
        else:
            own |= {"prompt": list(ids), "logprobs": num_logprobs}
        return {name: value for name, value in {**own, **self._fields}.items() if value is not None}

    def build_echo(self, ids: Sequence[int], num_logprobs: int = 1) -> JsonObject:
        """The body that asks for the log-probabilities of `ids` themselves; at temperature 1, raw is processed."""
        # One more token is generated, since not all servers can generate none.
        return self.build("The text", ids, 1, 1.0, num_logprobs) | {"echo": True}

    def _say_as_text(self, name: str, ids: list[int]) -> str:
        """The text that gives these ids when the server tokenizes it, with or without the BOS that it adds."""
        for start in (0, 1):
            text = cast(str, self._tokenizer.decode(ids[start:], clean_up_tokenization_spaces=False))
            if list(self._tokenizer(text)["input_ids"]) == ids:
                return text
        raise UnusablePromptError(
            f"{name} cannot be sent as text: tokenized again it has other ids. Use a server that takes ids.",
            fault="not_text",
        )

    def _build_generation_config(self, temperature: float) -> str:
        """For `transformers serve`, which else samples, or not, as the model's own generation config says."""
        config = {"do_sample": temperature > 0, "eos_token_id": self._eos_token_ids}
        if temperature > 0:
            config |= {"top_k": 0, "top_p": 1.0, "temperature": temperature}
        if self._tokenizer.pad_token_id is not None:
            config["pad_token_id"] = self._tokenizer.pad_token_id
        return json.dumps(config)
