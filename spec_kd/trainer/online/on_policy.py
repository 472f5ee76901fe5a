"""Where the completions of online distillation come from: prompts in, text of the draft, the target or both out."""

from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset, IterableDataset
from torch.utils.data import RandomSampler, Sampler
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from spec_kd.data.arrow_padding import remove_row_padding
from spec_kd.data.prompt_rendering import prepare_prompts, render_prompt_ids
from spec_kd.data.training_rows import ACCEPTED_COLUMNS, IGNORED_LABEL
from spec_kd.decoding.ragged_model import RaggedModel
from spec_kd.engines.base import Completion, derive_seed
from spec_kd.engines.transformers import SEED_BITS, RealIdsOnly, cut_after_eos, find_special_ids, neutral
from spec_kd.heads import evaluation_mode, find_input_device
from spec_kd.open_types import JsonObject
from spec_kd.probes import group_for_generation
from spec_kd.sampling.drawn_token import DrawnToken
from spec_kd.sampling.logits_processors import build_warpers
from spec_kd.sampling.options import SamplingOptions
from spec_kd.vocabulary import ProcessingClass, count_real_ids

SOURCES = ("draft", "target", "mixed")


@dataclass(frozen=True)
class CompletionSource:
    """Who writes completions, and how; the writers themselves change from call to call.

    Nothing of the generation configs that the models ship counts, except for their EOS ids, which end a completion
    together with the tokenizer's. Ids beyond the tokenizer's vocabulary are never written.

    Args:
        options (`SamplingOptions`): Temperature, top-k, top-p, length.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`): Of the vocabulary and an EOS.
        sample_from (`str`): One of `SOURCES`.
        mix (`float`): Probability that a token is the draft's, with `"mixed"`.
        batch_size (`int`, *optional*): Prompts at a time, of similar lengths; all at once by default.
    """

    options: SamplingOptions
    processing_class: ProcessingClass
    sample_from: str = "draft"
    mix: float = 0.5
    batch_size: int | None = None

    @property
    def writers(self) -> tuple[str, ...]:
        """The models that are needed: `"draft"`, `"target"` or both."""
        return ("draft", "target") if self.sample_from == "mixed" else (self.sample_from,)

    def write(self, models: dict[str, PreTrainedModel], prompts: Sequence[list[int]], seed: str) -> list[Completion]:
        """One completion for each prompt, in the order of the prompts.

        Modes, generation configs and the global random state are left as they were, and no gradient is recorded.

        Args:
            models (`dict[str, PreTrainedModel]`): Those of `writers`, not wrapped.
            prompts (`Sequence[list[int]]`): Ids of each prompt, at least one of each.
            seed (`str`): All that is random follows from it and from the batches.
        """
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        size = self.batch_size or len(prompts) or 1
        written = {}
        for first in range(0, len(order), size):
            batch = order[first : first + size]
            groups = group_for_generation(models[self.writers[0]], [prompts[i] for i in batch])
            for group in groups:
                rows = [batch[i] for i in group]
                completions = self._write_batch(models, [prompts[i] for i in rows], f"{seed}:{first + group[0]}")
                written |= dict(zip(rows, completions, strict=True))
        return [written[i] for i in range(len(prompts))]

    def make_row(self, prompt: list[int], completion: Completion) -> dict[str, list[int]]:
        """A training row, with the loss on the completion alone."""
        return join_row(prompt, completion.ids)

    def _write_batch(self, models: dict[str, PreTrainedModel], prompts: list[list[int]], seed: str) -> list[Completion]:
        writers = [models[name] for name in self.writers]
        special = [find_special_ids(writer, self.processing_class) for writer in writers]
        eos_ids, pad_id = sorted({eos for ids, _ in special for eos in ids}), special[0][1]
        device = find_input_device(writers[0])
        longest = max(map(len, prompts))
        padding = torch.tensor([longest - len(ids) for ids in prompts], device=device)  # (B,)
        ids = torch.tensor([[pad_id] * (longest - len(ids)) + ids for ids in prompts], device=device)  # (B, L)
        mask = (torch.arange(longest, device=device) >= padding[:, None]).long()  # (B, L)

        vocab_size = count_real_ids(self.processing_class)
        processors = LogitsProcessorList([RealIdsOnly(vocab_size)])
        if len(writers) == 2:
            generator = torch.Generator(device).manual_seed(derive_seed(f"{seed}:mix", SEED_BITS))
            processors.append(_MixedScores(RaggedModel(writers[1], padding, vocab_size, device), self.mix, generator))
        processors += build_warpers(self.options.temperature, self.options.top_k, self.options.top_p)
        if self.options.temperature > 0:
            generator = torch.Generator(device).manual_seed(derive_seed(seed, SEED_BITS))
            processors.append(DrawnToken(generator))
        with ExitStack() as stack:
            stack.enter_context(evaluation_mode(*writers))
            stack.enter_context(neutral(writers[0], self.options.max_new_tokens, eos_ids, pad_id))
            output = writers[0].generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=writers[0].generation_config,
                logits_processor=processors,
                synced_gpus=False,  # parameters are whole here, and a process without prompts would be waited for
            )
        return [Completion(*cut_after_eos(row, eos_ids)) for row in output[:, longest:].tolist()]


class _MixedScores(LogitsProcessor):
    """Replaces the scores of one model by another's in random rows, so that every token has one of two authors."""

    def __init__(self, other: RaggedModel, mix: float, generator: torch.Generator):
        self._other, self._mix, self._generator = other, mix, generator
        self._has_read_prompts = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        other = self._other.read(input_ids[:, -1:] if self._has_read_prompts else input_ids)[:, 0]  # (B, real ids)
        self._has_read_prompts = True
        draws = torch.rand(len(scores), 1, generator=self._generator, device=scores.device)
        scores[:, : other.shape[1]] = torch.where(draws < self._mix, scores[:, : other.shape[1]], other)  # (B, V)
        return scores


@contextmanager
def seeded(seed: str, device: torch.device) -> Iterator[None]:
    """The global random state set by a text inside, and as it was behind, for writers that sample from it."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(derive_seed(seed, SEED_BITS))
        yield


def draw_rows(count: int, lmbda: float, seed: str) -> list[bool]:
    """Whether each of `count` examples is generated anew: true with probability `lmbda`, the same for the same seed."""
    generator = torch.Generator().manual_seed(derive_seed(seed, SEED_BITS))
    return (torch.rand(count, generator=generator) < lmbda).tolist()


def read_rows(batch: dict[str, torch.Tensor]) -> list[dict[str, list[int]]]:
    """The rows that a right-padded batch was made of.

    Args:
        batch (`dict[str, torch.Tensor]`): `input_ids`, `labels` and `attention_mask`, int64 `(B, T)`.
    """
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    columns = {name: batch[name].tolist() for name in ("input_ids", "labels")}
    return [{name: rows[i][:length] for name, rows in columns.items()} for i, length in enumerate(lengths)]


def find_prompt(row: dict[str, list[int]], where: str) -> list[int]:
    """Ids of a row before its completion.

    Args:
        row (`dict[str, list[int]]`): `input_ids` and `labels`, -100 on the prompt.
        where (`str`): Names the row in the error.

    Raises:
        ValueError: If the labels are not a prompt without labels and a completion with them.
    """
    labels = row["labels"]
    start = next((i for i, label in enumerate(labels) if label != IGNORED_LABEL), len(labels))
    if start == 0 or start == len(labels):
        raise ValueError(
            f"{where} has {'no prompt' if start == 0 else 'no completion'}: a completion is generated in place of the "
            "labeled tokens at its end, behind at least one other. Remove it, or set `lmbda=0`."
        )
    if IGNORED_LABEL in labels[start:]:
        raise ValueError(
            f"{where} has tokens without a label behind its first completion token (token {start}), so it is not a "
            "prompt and one completion. Make a row of each completion, or set `lmbda=0`."
        )
    return list(row["input_ids"][:start])


def join_row(prompt: list[int], completion: list[int]) -> dict[str, list[int]]:
    """A training row, with the loss on the completion alone."""
    return {"input_ids": prompt + completion, "labels": [IGNORED_LABEL] * len(prompt) + completion}


def check_room(
    rows: Iterable[dict[str, list[int]]],
    models: dict[str, PreTrainedModel],
    max_new_tokens: int,
    name: str,
    **other_limits: int | None,
) -> None:
    """Raises `ValueError` unless every row is a prompt and a completion, with room behind the prompt.

    Args:
        rows (`Iterable`): With `input_ids` and `labels`.
        models (`dict[str, PreTrainedModel]`): All that will read the text, by their roles.
        max_new_tokens (`int`): Most tokens to be generated.
        name (`str`): Of the rows, for the error.
        other_limits (`int`, *optional*): Positions of what else reads or writes the text, by its name.
    """
    longest, row_of_longest = 0, 0
    for i, row in enumerate(rows):
        length = len(find_prompt(row, f"Row {i} of {name}"))
        if length > longest:
            longest, row_of_longest = length, i
    limits = {
        role: getattr(model.config.get_text_config(), "max_position_embeddings", None) for role, model in models.items()
    }
    for role, limit in (limits | other_limits).items():
        if limit is not None and longest + max_new_tokens > limit:
            raise ValueError(
                f"The prompt of row {row_of_longest} of {name} has {longest} tokens, which leaves no room for "
                f"`max_new_tokens={max_new_tokens}` in the {role}'s {limit} positions. Remove prompts that are as "
                "long, or lower `max_new_tokens`."
            )


def is_prompts_only(dataset: Dataset | IterableDataset) -> bool:
    """Whether the rows have prompts and nothing that says what the target wrote."""
    columns = set(next(iter(dataset), {}))
    has_completions = any(set(accepted) <= columns for accepted in ACCEPTED_COLUMNS)
    return bool({"prompt", "prompt_ids"} & columns) and not has_completions


def add_placeholders(
    dataset: Dataset | IterableDataset, processing_class: ProcessingClass
) -> Dataset | IterableDataset:
    """Prompts as `prompt_ids` with a `completion_ids` of one token, which is replaced before anything reads it.

    Raises:
        ValueError: As [`~spec_kd.data.prompt_rendering.render_prompt_ids`]; of an `IterableDataset` at that row.
    """

    def as_row(ids: list[int]) -> dict[str, list[int]]:
        return {"prompt_ids": ids, "completion_ids": ids[-1:]}

    if isinstance(dataset, Dataset):
        _, rows = prepare_prompts(dataset)
        return Dataset.from_list([as_row(ids) for ids in render_prompt_ids(rows, processing_class)])
    columns = dataset.column_names or list(next(iter(dataset)))

    def render(row: JsonObject) -> dict[str, list[int]]:
        return as_row(next(render_prompt_ids([remove_row_padding(row, dataset.features)], processing_class)))

    return dataset.map(render, remove_columns=columns)


def check_live_models(args: Any, teacher_model: Any, ref_model: Any) -> None:
    """Raises `ValueError` unless there is a target, and a reference draft where the loss needs one, to ask online."""
    if teacher_model is None:
        raise ValueError(
            "OnlineGKDTrainer needs a live `teacher_model`: a signal cached in the dataset is of the text there, not "
            "of what is generated. Pass the target as a model, a path or a Hub id, or use WhiteBoxDistillTrainer."
        )
    selection = args.build_loss().selection
    has_reference = ref_model is not None or args.ref_model_name_or_path is not None
    if args.lmbda > 0 and selection is not None and selection.needs_reference and not has_reference:
        raise ValueError(
            f"`token_selection={args.token_selection!r}` needs a live `ref_model` with `lmbda={args.lmbda}`: scores in "
            "a `reference_forward_kl` column are of the text there, not of what is generated. Pass `ref_model`, or "
            "set `lmbda=0`."
        )


class RepeatedWindows(Sampler[int]):
    """Another sampler's indices, each window of them several times in a row; the last ones, if fewer, once.

    Args:
        sampler (`Sampler`): Of the indices. A random one is seeded by the epoch, so that all processes agree.
        window (`int`): Number of examples of an optimizer step, over all processes.
        repeats (`int`): How often each window comes.
        seed (`int`): Of a random sampler.
    """

    def __init__(self, sampler: Sampler[int] | Sized, window: int, repeats: int, seed: int):
        if isinstance(sampler, RandomSampler):
            sampler = SeedableRandomSampler(sampler.data_source, data_seed=seed)
        self.sampler, self.window, self.repeats = sampler, window, repeats

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the epoch."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        windows, rest = divmod(len(self.sampler), self.window)
        return windows * self.window * self.repeats + rest

    def __iter__(self) -> Iterator[int]:
        indices: list[int] = []
        for index in self.sampler:
            indices.append(index)
            if len(indices) == self.window:
                yield from indices * self.repeats
                indices = []
        yield from indices


def is_same_window(one: list[JsonObject], other: list[JsonObject]) -> bool:
    """Whether two lists of batches hold the same examples."""
    return len(one) == len(other) and all(
        torch.equal(a[name], b[name].to(a[name].device))
        for a, b in zip(one, other, strict=True)
        for name in ("input_ids", "labels")
    )
