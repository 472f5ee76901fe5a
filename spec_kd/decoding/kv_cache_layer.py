"""A cache layer with room to grow: a new token is written, and nothing else is copied."""

from collections.abc import Sequence

import torch
from transformers.cache_utils import DynamicLayer
from typing_extensions import override

from spec_kd.open_types import Argument

SPARE_SLOTS = 128


class GrowingCacheLayer(DynamicLayer):
    """A cache layer that adds and removes rows and slots in place.

    A plain `DynamicLayer` concatenates, which copies all keys and values at every token. For a batch of long rows this
    takes as long as the model. `keys` and `values` are views of the buffers, `(B, H, S, D)`.
    """

    keys: torch.Tensor
    values: torch.Tensor

    @override
    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self._buffers = [states[:, :, :0] for states in (key_states, value_states)]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Argument, **kwargs: Argument
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes new tokens after the present ones; see `DynamicLayer.update`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        first = self.get_seq_length()
        self.resize(len(key_states), first + key_states.shape[2])
        self.keys[:, :, first:] = key_states
        self.values[:, :, first:] = value_states
        return self.keys, self.values

    def resize(self, num_rows: int, num_slots: int) -> None:
        """Sets the numbers of rows and slots of `keys` and `values`; slots that were never written are zero."""
        for i, buffer in enumerate(self._buffers):
            rows, heads, slots, size = buffer.shape
            if rows < num_rows or slots < num_slots:
                shape = max(rows, num_rows), heads, max(slots, num_slots + SPARE_SLOTS), size
                self._buffers[i] = buffer.new_zeros(shape)
                self._buffers[i][:rows, :, :slots] = buffer
        self.keys, self.values = (buffer[:num_rows, :, :num_slots] for buffer in self._buffers)

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Keeps some rows, in this order; the i-th must not be below i."""
        for i, row in enumerate(rows):
            if row != i:
                self.keys[i], self.values[i] = self.keys[row], self.values[row]
        self.resize(len(rows), self.keys.shape[2])

    def move(self, source: torch.Tensor, destination: torch.Tensor) -> None:
        """Copies slots of each row to other slots of the same row, all at once.

        Args:
            source (`torch.Tensor`): Slots to copy from, int64 `(B, K)`.
            destination (`torch.Tensor`): Slots to copy to, int64 `(B, K)`.
        """
        source, destination = source.to(self.keys.device), destination.to(self.keys.device)
        rows = torch.arange(len(source), device=source.device)[:, None]  # (B, 1)
        for states in (self.keys, self.values):
            # several times faster than an index along the third dimension, which addresses single numbers
            by_slot = states.transpose(1, 2)  # (B, S, H, D)
            by_slot[rows, destination] = by_slot[rows, source]

    def append(self, other: "GrowingCacheLayer", first: int) -> None:
        """Adds the rows of another layer, from slot `first` on, where there must be room for all their slots."""
        rows, slots = self.keys.shape[0], slice(first, first + other.keys.shape[2])
        self.resize(rows + other.keys.shape[0], self.keys.shape[2])
        self.keys[rows:, :, slots] = other.keys
        self.values[rows:, :, slots] = other.values
