"""A model that reads a batch of rows which grow unevenly: it takes tokens back row by row, and takes in new rows."""

import weakref
from collections.abc import Sequence

import torch
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from typing_extensions import override

from spec_kd.heads import are_equal_logits, are_exact_logits, count_rows, evaluation_mode, find_input_device, is_whole
from spec_kd.open_types import Argument
from spec_kd.probes import make_texts
from spec_kd.sampling.prompts import get_max_length

# These keep one key and one value for each token, so that a token can be taken back by leaving it out. A recurrent
# state has already mixed it with the others.
REVERSIBLE_LAYERS = ("DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer")
SPARE_SLOTS = 128

_layouts: "weakref.WeakKeyDictionary[PreTrainedModel, bool]" = weakref.WeakKeyDictionary()


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


class RaggedModel:
    """A model, and the tokens that it has read in each of B rows.

    New tokens are written after the longest row, to the same cache slots in every row. Once it is known which of them
    stay ([`take_back`]), these are moved up to the end of their own row, so that the cache is never wider than the
    longest row and the tokens just read. A mask hides the slots in between. Attention windows count slots, so a model
    with windows gets its rows moved to the right instead, without a gap, which copies the cache at every call.

    Args:
        model (`PreTrainedModel`): The model in eval mode; see [`check_reversible`].
        padding (`torch.Tensor`): Number of padding tokens on the left of each row of the first ids, int64 `(B,)`.
        vocab_size (`int`): Number of real ids; logits beyond are cut off.
        device (`torch.device`): Device of the logits that are returned.
        is_gapless (`bool`, *optional*): Whether rows are moved to the right; [`find_layout`] decides by default.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        padding: torch.Tensor,
        vocab_size: int,
        device: torch.device,
        is_gapless: bool | None = None,
    ):
        self._model, self._vocab_size, self._device = model, vocab_size, device
        limit = get_max_length(model)
        self._last_position = None if limit is None else limit - 1
        self._is_gapless = find_layout(model) if is_gapless is None else is_gapless
        # a cache without windows, whose layers would drop what a row that takes tokens back still needs
        self._cache = Cache(layer_class_to_replicate=GrowingCacheLayer)
        padding = padding.to(find_input_device(model))
        self._settle(padding, lengths=torch.zeros_like(padding), width=0)

    def _settle(self, padding: torch.Tensor, lengths: torch.Tensor, width: int) -> None:
        self._padding = padding  # (B,), padding before what is read next
        self._lengths = lengths  # (B,), tokens that stay
        self._width = width  # slots that these take up
        self._first = width - lengths if self._is_gapless else torch.zeros_like(lengths)  # (B,), their first slot

    def read(self, ids: torch.Tensor, num_logits: int = 1) -> torch.Tensor:
        """Reads the next tokens of every row and returns the logits at the last `num_logits` of them.

        Args:
            ids (`torch.Tensor`): Next ids of each row, int64 `(B, F)`.
            num_logits (`int`, *optional*, defaults to `1`): Number of last positions, at most F.

        Returns:
            `torch.Tensor`: Logits, float32 `(B, num_logits, vocab_size)`.

        Raises:
            ValueError: The model does not write to the cache that it is given.
        """
        num_new = ids.shape[1]
        padding, lengths, first = (x[:, None] for x in (self._padding, self._lengths, self._first))  # (B, 1)
        slots = torch.arange(self._cache.get_seq_length() + num_new, device=padding.device)  # (S,)
        is_settled = (slots >= first) & (slots < first + lengths)  # (B, S)
        output = self._model(
            input_ids=ids.to(padding.device),
            attention_mask=(is_settled | (slots >= self._width + padding)).long(),
            # a row close to its limit also reads drafted tokens that it cannot use
            position_ids=(lengths + slots[-num_new:] - self._width - padding).clamp(0, self._last_position),  # (B, F)
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=num_logits,
        )
        if self._cache.get_seq_length() != len(slots):
            raise ValueError(
                f"{type(self._model).__name__} does not keep its keys and values in the cache it is given, so tokens "
                "cannot be taken back. Use another model."
            )
        return output.logits[:, -num_logits:, : self._vocab_size].float().to(self._device)

    def take_back(self, counts: torch.Tensor, rows: list[int]) -> None:
        """Removes the last tokens of every row, and whole rows.

        Args:
            counts (`torch.Tensor`):
                Number of tokens to remove from each row, int64 `(B,)`. A row that has fewer gets as many padding tokens
                on the left of what it reads next as it lacks.
            rows (`list[int]`): Rows to keep, in their new order; the i-th must not be below i.
        """
        padding, lengths, first = self._padding[rows], self._lengths[rows], self._first[rows]
        num_slots, read_from = self._cache.get_seq_length(), self._width + padding
        kept = lengths + num_slots - read_from - counts[rows].to(padding.device)  # (R,)
        missing, kept = (-kept).clamp(min=0), kept.clamp(min=0)
        width = max(kept.tolist(), default=0)
        self._settle(missing, kept, width)
        if self._is_gapless:
            # what lands before a row is masked but must be finite, so any slot will do
            tokens = torch.arange(width, device=kept.device) - self._first[:, None]  # (R, K)
        else:
            num_moved = max((kept - lengths).clamp(min=0).tolist(), default=0)
            tokens = lengths[:, None] + torch.arange(num_moved, device=kept.device)
        lengths, first, read_from = lengths[:, None], first[:, None], read_from[:, None]
        source = torch.where(tokens < lengths, first + tokens, read_from + tokens - lengths).clamp(0, num_slots - 1)
        for layer in self._layers:
            layer.keep_rows(rows)
            layer.move(source, self._first[:, None] + tokens)
            layer.resize(len(rows), width)

    def add_rows(self, new_rows: Sequence[Sequence[int]], padding: Sequence[int]) -> None:
        """Adds rows after the present ones and reads their ids in one pass. [`take_back`] must follow every [`read`].

        Args:
            new_rows (`Sequence[Sequence[int]]`): Ids of each new row, possibly none.
            padding (`Sequence[int]`):
                Number of padding tokens on the left of what each new row reads next; 0 for a row that has ids.
        """
        device = self._padding.device
        lengths = torch.tensor([len(ids) for ids in new_rows], device=device)
        longest = max(1, int(lengths.max()))
        added = RaggedModel(self._model, longest - lengths, self._vocab_size, self._device, self._is_gapless)
        added.read(torch.tensor([[0] * (longest - len(ids)) + list(ids) for ids in new_rows], device=device))
        added.take_back(torch.zeros_like(lengths), list(range(len(new_rows))))

        width = max(self._width, added._width)
        if self._layers:
            slots = torch.arange(self._width, device=device).expand(len(self._lengths), -1)  # (B, S)
            shift, first = (width - side._width if self._is_gapless else 0 for side in (self, added))
            for layer, others in zip(self._layers, added._layers, strict=True):
                layer.resize(len(slots), width)
                if shift:
                    layer.move(slots, slots + shift)
                layer.append(others, first)
        else:
            self._cache = added._cache
        all_padding = torch.cat([self._padding, torch.tensor(padding, device=device)])
        self._settle(all_padding, torch.cat([self._lengths, added._lengths]), width)

    @property
    def _layers(self) -> list[GrowingCacheLayer]:
        return [layer for layer in self._cache.layers if isinstance(layer, GrowingCacheLayer) and layer.is_initialized]


def _counts_slots(model: PreTrainedModel) -> bool:
    """Whether any part of the model measures the distance of two tokens by their slots."""
    config = model.config.get_text_config()
    # the cache does not know the windows of GPT-Neo
    return any(DynamicCache(config=config).is_sliding) or getattr(config, "window_size", None) is not None


def find_layout(model: PreTrainedModel) -> bool:
    """Whether rows must be moved to the right, without a gap: a mask is not enough if the model counts slots.

    Raises:
        ValueError: Neither layout gives the logits that each row has alone.
    """
    if (known := _layouts.get(model)) is not None:
        return known
    if not is_whole(model):
        return _counts_slots(model)
    error = None
    for is_gapless in (True,) if _counts_slots(model) else (False, True):
        try:
            if _reads_as_alone(model, is_gapless):
                _layouts[model] = is_gapless
                return is_gapless
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as caught:
            error = caught
    raise ValueError(
        f"{type(model).__name__} cannot take single tokens back in a batch: "
        + ("other logits than those of each row alone follow. " if error is None else f"{error} ")
        + "Use a model whose cache holds keys and values alone, with positions as `position_ids` say."
    ) from error


def _reads_as_alone(model: PreTrainedModel, is_gapless: bool) -> bool:
    """Whether two rows of unequal length, from which tokens are taken back twice, get the logits of each alone."""
    texts = [text[0].tolist() for text in make_texts(model)]
    device, rows, width = find_input_device(model), count_rows(model.get_output_embeddings()), max(map(len, texts))
    padding = torch.tensor([width - len(text) for text in texts], device=device)
    first = torch.tensor([[0] * (width - len(text)) + text for text in texts], device=device)  # (2, T)
    new = first[:, -2:].flip(0)  # (2, 2)
    with evaluation_mode(model):
        ragged = RaggedModel(model, padding, rows, device, is_gapless)
        ragged.read(first)
        for counts in ((3, 1), (1, 2)):
            ragged.take_back(torch.tensor(counts), [0, 1])
            logits = ragged.read(new, num_logits=2)  # (2, 2, V)
            for i, count in enumerate(counts):
                texts[i] = texts[i][: len(texts[i]) - count] + new[i].tolist()
                alone = model(input_ids=torch.tensor([texts[i]], device=device), use_cache=False).logits[0, -2:]
                if not are_equal_logits(logits[i], alone, are_exact_logits(model, alone)):
                    return False
    return True


def check_reversible(model: PreTrainedModel, role: str) -> None:
    """Raises `ValueError` unless the model can take tokens back: not with Mamba, RWKV or linear attention.

    Args:
        model (`PreTrainedModel`): The model.
        role (`str`): Name of the model in the error, such as `"target"`.
    """
    layers = {type(layer).__name__ for layer in DynamicCache(config=model.config).layers}
    if not layers <= set(REVERSIBLE_LAYERS):
        raise ValueError(
            f"The {role} ({type(model).__name__}) keeps {', '.join(sorted(layers - set(REVERSIBLE_LAYERS)))} in its "
            "cache, from which rejected tokens of single rows cannot be taken back. Use a model whose cache holds keys "
            "and values alone."
        )
    try:
        find_layout(model)
    except ValueError as error:
        raise ValueError(f"The {role} does not fit: {error}") from error
