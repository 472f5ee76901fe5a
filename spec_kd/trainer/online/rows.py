"""Rows of an online run: datasets of prompts alone, rows that get a new completion, and those of an optimizer step."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset
from torch.utils.data import RandomSampler, Sampler

from spec_kd.data.arrow_padding import remove_row_padding
from spec_kd.data.prompt_rendering import prepare_prompts, render_prompt_ids
from spec_kd.data.training_rows import ACCEPTED_COLUMNS, IGNORED_LABEL
from spec_kd.open_types import JsonObject
from spec_kd.options import refuse
from spec_kd.sampling.generation import seed_generator
from spec_kd.sampling.prompts import check_room
from spec_kd.trainer.arguments import AnyDataset, EvalDataset, find_columns
from spec_kd.vocabulary import ProcessingClass


def is_prompts_only(dataset: AnyDataset) -> bool:
    """Whether the rows have prompts and no completions."""
    columns = set(next(iter(dataset), {}))
    return not columns.isdisjoint(("prompt", "prompt_ids")) and not any(map(columns.issuperset, ACCEPTED_COLUMNS))


def add_placeholders(dataset: AnyDataset, processing_class: ProcessingClass) -> AnyDataset:
    """Prompts as `prompt_ids` with a `completion_ids` of one token, which is replaced before it is read.

    Args:
        dataset (`Dataset` or `IterableDataset`): Rows with `prompt` or `prompt_ids`.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`): Renders the prompts.

    Raises:
        ValueError: As [`~spec_kd.data.prompt_rendering.render_prompt_ids`]; for a stream when it reaches that row.
    """

    def make_row(ids: list[int]) -> dict[str, list[int]]:
        return {"prompt_ids": ids, "completion_ids": ids[-1:]}

    if isinstance(dataset, Dataset):
        _, rows = prepare_prompts(dataset)
        return Dataset.from_list([make_row(ids) for ids in render_prompt_ids(rows, processing_class)])

    def render(row: JsonObject) -> dict[str, list[int]]:
        return make_row(next(render_prompt_ids([remove_row_padding(row, dataset.features)], processing_class)))

    return dataset.map(render, remove_columns=list(find_columns(dataset)))


def complete_evaluation_prompts(
    eval_dataset: EvalDataset | None, processing_class: ProcessingClass, lmbda: float, mode: str
) -> tuple[EvalDataset | None, bool]:
    """Evaluation data with a placeholder for each completion if it has prompts alone, and whether it does.

    Args:
        eval_dataset (`Dataset`, `IterableDataset` or a dictionary of them, *optional*): Evaluation data.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`): Renders the prompts.
        lmbda (`float`), mode (`str`): Options of the run.

    Raises:
        ValueError: If only some of the sets have prompts alone, or if nothing would write their completions.
    """
    sets = eval_dataset if isinstance(eval_dataset, Mapping) else {"evaluation": eval_dataset}
    bare = [name for name, dataset in sets.items() if dataset is not None and is_prompts_only(dataset)]
    if not bare:
        return eval_dataset, False
    refuse(
        (
            len(bare) < len(sets),
            f"The evaluation sets {bare} have prompts only and the others have completions. Evaluate them one by one.",
        ),
        (
            mode != "on_policy" or lmbda == 0,
            f"The evaluation dataset has prompts only, and nothing writes their completions with `mode={mode!r}` and "
            f"`lmbda={lmbda}`. Write them with `spec_kd.generate_responses(target, prompts)`.",
        ),
    )
    prepared = {name: add_placeholders(dataset, processing_class) for name, dataset in sets.items()}
    return (prepared if isinstance(eval_dataset, Mapping) else prepared["evaluation"]), True


def number_rows(counts: Sequence[int], batch_size: int, process_index: int, num_processes: int) -> list[int]:
    """The number of each row of this process among the rows of all processes, in the order of the dataset.

    Args:
        counts (`Sequence[int]`): Number of rows in each batch of this process.
        batch_size (`int`): Rows of a batch that is complete.
        process_index (`int`), num_processes (`int`): Which process this is, of how many; they take turns.
    """
    starts = [(i * num_processes + process_index) * batch_size for i in range(len(counts))]
    return [start + row for start, count in zip(starts, counts, strict=True) for row in range(count)]


def draw_rows(numbers: Sequence[int], lmbda: float, seed: str) -> list[bool]:
    """Draws whether each example gets a new completion: true with probability `lmbda`.

    Args:
        numbers (`Sequence[int]`): Numbers of the examples.
        lmbda (`float`): Probability of a new completion.
        seed (`str`): What is drawn for an example follows from the seed and its number.
    """
    return [torch.rand((), generator=seed_generator(f"{seed}:{number}:draw")).item() < lmbda for number in numbers]


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
        ValueError: Unless the labels are those of a prompt without labels and a completion with them.
    """
    labels = row["labels"]
    start = next((i for i, label in enumerate(labels) if label != IGNORED_LABEL), len(labels))
    refuse(
        (
            start in (0, len(labels)),
            f"{where} has {'no prompt' if start == 0 else 'no completion'}. A new completion replaces the labeled "
            "tokens at the end of a row, after at least one other token. Remove the row, or set `lmbda=0`.",
        ),
        (
            IGNORED_LABEL in labels[start:],
            f"{where} has tokens without a label after its first completion token (token {start}), so it is not a "
            "prompt and one completion. Make a row of each completion, or set `lmbda=0`.",
        ),
    )
    return list(row["input_ids"][:start])


def join_row(prompt: list[int], completion: list[int]) -> dict[str, list[int]]:
    """A training row with the loss on the completion alone."""
    return {"input_ids": prompt + completion, "labels": [IGNORED_LABEL] * len(prompt) + completion}


def check_row_room(
    rows: Iterable[dict[str, list[int]]], limits: Mapping[str, int | None], max_new_tokens: int, name: str
) -> None:
    """Raises `ValueError` unless every row is a prompt and a completion, with room after the prompt.

    Args:
        rows (`Iterable`): Rows with `input_ids` and `labels`.
        limits (`Mapping[str, int]`): Positions of all that read or write the rows, by their roles; `None` if unlimited.
        max_new_tokens (`int`): Maximum number of tokens to be generated.
        name (`str`): Names the rows in the error.
    """
    lengths = [len(find_prompt(row, f"Row {i} of {name}")) for i, row in enumerate(rows)]
    check_room(lengths, max_new_tokens, limits, name=lambda i: f"The prompt of row {i} of {name}")


@dataclass
class Window:
    """The batches of an optimizer step on this process.

    Args:
        source (`list[dict[str, torch.Tensor]]`): The batches of the dataset.
        batches (`list[dict[str, torch.Tensor]]`): The same batches with generated completions.
        generated (`list[list[list[int]]]`): Ids of prompt and completion of each generated response.
        uses (`int`, *optional*, defaults to `1`): Number of optimizer steps on these batches so far.
    """

    source: list[dict[str, torch.Tensor]]
    batches: list[dict[str, torch.Tensor]]
    generated: list[list[list[int]]]
    uses: int = 1

    def holds(self, batches: list[JsonObject]) -> bool:
        """Whether the window was made of these batches."""
        return len(batches) == len(self.source) and all(
            torch.equal(a[name], b[name].to(a[name].device))
            for a, b in zip(batches, self.source, strict=True)
            for name in ("input_ids", "labels")
        )

    def save(self, path: Path) -> None:
        """Writes the window to a file of a checkpoint."""
        torch.save(vars(self), path)

    @classmethod
    def load(cls, path: Path) -> "Window":
        """Reads what `save` wrote; files of earlier versions name `generated` otherwise."""
        state = torch.load(path, map_location="cpu", weights_only=True)
        if "texts" in state:
            state["generated"] = state.pop("texts")
        return cls(**state)


class RepeatedWindows(Sampler[int]):
    """Another sampler's indices, each window of them several times in a row; an incomplete last window comes once.

    Args:
        sampler (`Sampler` or `Collection[int]`): Gives the indices.
            A random sampler is seeded by the epoch, so that all processes agree.
        window (`int`): Number of examples of an optimizer step, over all processes.
        repeats (`int`): How often each window comes.
        seed (`int`): Seed of a random sampler.
    """

    def __init__(self, sampler: RandomSampler | Collection[int], window: int, repeats: int, seed: int):
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
        indices = iter(self.sampler)
        while window := list(islice(indices, self.window)):
            yield from window * (self.repeats if len(window) == self.window else 1)
