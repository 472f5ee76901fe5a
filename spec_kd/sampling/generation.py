"""Batched generation with a transformers model, by options of ours and none of the config that the model ships.

With its parts: seeds, drawing one id of each row, and logits processors.
"""

import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from spec_kd.heads import evaluation_mode, find_input_device
from spec_kd.open_types import Argument
from spec_kd.sampling.options import SamplingOptions
from spec_kd.sampling.prompts import PromptBatch, report_progress
from spec_kd.vocabulary import ProcessingClass, get_tokenizer

if TYPE_CHECKING:
    from transformers._typing import GenerativePreTrainedModel

SEED_BITS = 56  # of the 64 bits of a torch generator's seed
NO_IDS: Argument = None  # previous tokens for processors that do not read them


def generate_batch(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    options: SamplingOptions,
    *,
    eos_ids: Collection[int],
    pad_id: int,
    vocab_size: int,
    seed: str | Sequence[str],
    on_logits: Iterable[LogitsProcessor] = (),
    on_scores: Iterable[LogitsProcessor] = (),
) -> torch.Tensor:
    """Writes one completion to each prompt, all prompts in one batch.

    The generation config that the model ships does not count. Its mode and that config are restored, the global random
    state is not touched, and no gradient is recorded.

    Args:
        model (`PreTrainedModel`): The model, with whole parameters.
        prompts (`Sequence[list[int]]`): Ids of each prompt, at least one. A [`PromptBatch`] is told of progress.
        options (`SamplingOptions`): All but its seed.
        eos_ids (`Collection[int]`): Ids that end a completion.
        pad_id (`int`): Id that fills up shorter rows.
        vocab_size (`int`): Number of real ids; ids beyond are never written.
        seed (`str` or `Sequence[str]`):
            All that is drawn follows from it. With one for each prompt, what a prompt draws does not depend on the
            others of its batch.
        on_logits (`Iterable[LogitsProcessor]`, *optional*, defaults to `()`):
            Processors of the logits of the real ids, before temperature, top-k and top-p.
        on_scores (`Iterable[LogitsProcessor]`, *optional*, defaults to `()`):
            Processors of the scores that are sampled from, before the draw.

    Returns:
        `torch.Tensor`: Ids after the prompts, int64 `(B, T)`, with anything after an EOS; see [`cut_after_eos`].
    """
    device = find_input_device(model)
    length = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (length - len(ids)) + ids for ids in prompts], device=device)  # (B, L)
    mask = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
    warpers = build_warpers(options.temperature, options.top_k, options.top_p)
    processors = LogitsProcessorList([RealIdsOnly(vocab_size), *on_logits, *warpers, *on_scores])
    watch = ProgressWatch(prompts, eos_ids)
    if isinstance(prompts, PromptBatch):
        processors.append(watch)
    if options.temperature > 0:
        processors.append(DrawnToken(seed_generator(seed, device) if isinstance(seed, str) else RowGenerators(seed)))
    config = GenerationConfig(
        do_sample=False,  # temperature and draw are processors, which in a config would come after all others
        max_new_tokens=options.max_new_tokens,
        eos_token_id=sorted(eos_ids),
        pad_token_id=pad_id,
        use_cache=True,
    )
    with evaluation_mode(model), generation_config(model, config):
        output = cast("GenerativePreTrainedModel", model).generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            logits_processor=processors,
            synced_gpus=False,  # the parameters are whole, and a process without prompts would be waited for
        )
    written = output[:, length:]
    watch.note(written[:, -1].tolist(), is_last=True)
    return written


@contextmanager
def generation_config(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """The model with another generation config; `generate` takes from the model's own what it is not told."""
    shipped, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = shipped


def cut_after_eos(ids: list[int], eos_ids: Collection[int]) -> tuple[list[int], str]:
    """The ids up to the first EOS, and the finish reason: `"stop"`, or `"length"` without an EOS."""
    end = next((i for i, token in enumerate(ids) if token in eos_ids), None)
    return (ids, "length") if end is None else (ids[: end + 1], "stop")


def join_eos_ids(shipped: int | list[int] | None, own: int | None) -> list[int]:
    """The EOS ids of a generation config, together with that of a tokenizer, sorted."""
    found = {*(shipped if isinstance(shipped, list) else [shipped]), own}
    return sorted(id for id in found if id is not None)


def find_special_ids(model: PreTrainedModel, processing_class: ProcessingClass) -> tuple[list[int], int]:
    """The ids that end a completion, and a pad id.

    Args:
        model (`PreTrainedModel`): Its generation config may name several EOS ids.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`): Its EOS counts as well.

    Returns:
        Sorted EOS ids, and the pad id of the tokenizer, else the first EOS id.

    Raises:
        ValueError: Neither has an EOS.
    """
    tokenizer = get_tokenizer(processing_class)
    eos_ids = join_eos_ids(model.generation_config.eos_token_id, tokenizer.eos_token_id)
    if not eos_ids:
        raise ValueError(
            "Neither the generation config of the model nor its tokenizer has an EOS token, so no completion would "
            "ever end. Set `processing_class.eos_token`."
        )
    return eos_ids, tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos_ids[0]


def derive_seed(text: str, bits: int = SEED_BITS) -> int:
    """The first `bits` bits of the text's SHA-256: the same on every machine, whatever was drawn before."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest(), "big") >> (256 - bits)


def seed_generator(text: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A new generator on `device` with the seed of [`derive_seed`]; the global random state is not touched."""
    return torch.Generator(device).manual_seed(derive_seed(text))


class RowGenerators:
    """A generator for each row of a batch, on the CPU.

    Args:
        seeds (`Sequence[str]`): Seed of each row.
    """

    def __init__(self, seeds: Sequence[str]):
        self._generators = [seed_generator(seed) for seed in seeds]

    def draw(self, device: torch.device) -> torch.Tensor:
        """One number from [0, 1) for each row, float64 `(B, 1)`."""
        draws = [torch.rand(1, generator=generator, dtype=torch.double) for generator in self._generators]
        return torch.stack(draws).to(device)


def draw_ids(weights: torch.Tensor, generator: torch.Generator | RowGenerators) -> torch.Tensor:
    """Draws one id for each row.

    Args:
        weights (`torch.Tensor`): Weights of the ids, `(B, V)`, 0 or above. They need not sum to one.
        generator (`torch.Generator` or `RowGenerators`): Generator on the device of the weights, or one for each row.

    Returns:
        `torch.Tensor`: int64 `(B,)`.
    """
    # `torch.multinomial` draws a number for every id. On a CPU that takes longer than the head of a small model.
    cumulated = weights.double().cumsum(dim=-1)
    if isinstance(generator, RowGenerators):
        draws = generator.draw(weights.device)
    else:
        draws = torch.rand(len(weights), 1, generator=generator, dtype=torch.double, device=weights.device)
    ids = torch.searchsorted(cumulated, draws * cumulated[:, -1:], right=True).squeeze(1)
    return ids.clamp(max=weights.shape[1] - 1)  # the product may be rounded up to the sum


def draw_each(
    logits: torch.Tensor, warpers: LogitsProcessorList, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws an id at each of G positions of B rows, from logits `(B, G, V)` and none of the others.

    Returns:
        Ids, int64 `(B, G)`, and the probabilities that they were drawn from, `(B, G, V)`.
    """
    q = warpers(NO_IDS, logits.flatten(0, 1)).softmax(dim=-1)  # (B * G, V)
    return draw_ids(q, generator).view(logits.shape[:2]), q.view_as(logits)


def build_warpers(temperature: float, top_k: int = 0, top_p: float = 1.0) -> LogitsProcessorList:
    """The processors that turn logits `(N, V)` into those that are sampled from, in the order of transformers.

    None of them reads the previous tokens (pass `NO_IDS`), so one pass can process a whole completion.
    Repetition penalties do read them, and are left out.

    Args:
        temperature (`float`): Temperature of the softmax; 0.0 is greedy and gives an empty list.
        top_k (`int`, *optional*, defaults to `0`): Number of most likely ids to sample from; 0 samples from all.
        top_p (`float`, *optional*, defaults to `1.0`): Probability mass of the most likely ids to sample from.
    """
    if temperature == 0:
        return LogitsProcessorList()
    by_temperature = [TemperatureLogitsWarper(float(temperature))] if temperature != 1 else []
    by_rank = [TopKLogitsWarper(top_k)] if top_k > 0 else []
    by_mass = [TopPLogitsWarper(top_p)] if top_p < 1 else []
    return LogitsProcessorList([*by_temperature, *by_rank, *by_mass])


class RealIdsOnly(LogitsProcessor):
    """Rules out the padded rows of an output head: no tokenizer knows their ids.

    Args:
        vocab_size (`int`): Number of ids of the tokenizer.
    """

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores `(B, V)` with -inf at the padded rows, in place."""
        scores[:, self.vocab_size :] = -torch.inf
        return scores


class DrawnToken(LogitsProcessor):
    """Draws an id from the softmax of each row and rules out all others, so that a greedy `generate` samples.

    `generate` itself draws a number for every id of the vocabulary, which on a CPU takes as long as a small model. This
    must be the last processor.

    Args:
        generator (`torch.Generator` or `RowGenerators`): Generator on the device of the scores, or one for each row.
    """

    def __init__(self, generator: torch.Generator | RowGenerators):
        self._generator = generator

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores `(B, V)`: 0 at the drawn id and -inf elsewhere."""
        drawn = draw_ids(scores.softmax(dim=-1), self._generator)  # (B,)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn[:, None], 0.0)  # (B, V)


class ProgressWatch(LogitsProcessor):
    """Reports tokens and completions while they are written; scores stay as they are.

    Args:
        prompts (`Sequence[list[int]]`): The batch whose completions are written.
        eos_ids (`Collection[int]`): Ids that end a completion.
    """

    def __init__(self, prompts: Sequence[list[int]], eos_ids: Collection[int]):
        self._prompts, self._eos_ids = prompts, set(eos_ids)
        self._is_open, self._is_first = [True] * len(prompts), True

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The scores `(B, V)`, unchanged; `input_ids` `(B, T)` tell the tokens of the step before."""
        if not self._is_first:
            self.note(input_ids[:, -1].tolist())
        self._is_first = False
        return scores

    def note(self, written: list[int], is_last: bool = False) -> None:
        """Counts the newest token of each row, unless the row ended before it.

        Args:
            written (`list[int]`): Newest id of each row.
            is_last (`bool`, *optional*, defaults to `False`): Whether generation ends after this token.
        """
        num_open = sum(self._is_open)
        self._is_open = [
            is_open and not is_last and id not in self._eos_ids
            for is_open, id in zip(self._is_open, written, strict=True)
        ]
        report_progress(self._prompts, num_open, num_open - sum(self._is_open))
