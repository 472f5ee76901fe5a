"""The examples of one optimizer step with what was generated for them, and their use in several steps."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import RandomSampler, Sampler

from spec_kd.open_types import JsonObject


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
        indices: list[int] = []
        for index in self.sampler:
            indices.append(index)
            if len(indices) == self.window:
                yield from indices * self.repeats
                indices = []
        yield from indices
