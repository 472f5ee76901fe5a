"""One model over a batch of texts that grow unevenly: its cache takes tokens back row by row."""

import torch
from transformers import DynamicCache, PreTrainedModel

# What keeps one key and one value a token, so that a token can be taken back by leaving it out. A recurrent state has
# already mixed it with the others.
REVERSIBLE_LAYERS = ("DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer")


class RaggedModel:
    """A model and what it has read of each of B rows.

    The cache looks at all times as if every row had been left-padded and read in one piece: tokens end in the last
    slot and have no gaps, so a plain 2D mask describes them. A row that takes tokens back is moved to the right.
    Masking such tokens where they are would spare the move, but attention windows count slots, and the gaps would come
    to take several times the memory and the time of the text.

    Args:
        model (`PreTrainedModel`): In eval mode; see [`check_reversible`].
        padding (`torch.Tensor`): Padding on the left of each row of the first ids to be read, int64 `(B,)`.
        vocab_size (`int`): Columns of the logits that count.
        device (`torch.device`): Where the logits are wanted.
    """

    def __init__(self, model: PreTrainedModel, padding: torch.Tensor, vocab_size: int, device: torch.device):
        self._model = model
        self._padding = padding.to(model.get_input_embeddings().weight.device)
        self._vocab_size = vocab_size
        self._device = device
        self._last_position = _find_last_position(model)
        # Without the config, which would let windowed layers drop what a row that takes tokens back still needs.
        self._cache = DynamicCache()

    def read(self, ids: torch.Tensor, num_logits: int = 1) -> torch.Tensor:
        """Reads the next tokens of every row and returns the logits at the last `num_logits` of them.

        Args:
            ids (`torch.Tensor`): int64 `(B, F)`.
            num_logits (`int`): At most F.

        Returns:
            `torch.Tensor`: float32 `(B, num_logits, vocab_size)`.

        Raises:
            `ValueError`: If the model does not write to the cache it is given.
        """
        num_new, padding = ids.shape[1], self._padding[:, None]
        slots = torch.arange(self._cache.get_seq_length() + num_new, device=padding.device)  # (S,)
        output = self._model(
            input_ids=ids.to(padding.device),
            attention_mask=(slots >= padding).long(),  # (B, S)
            # a row close to its limit also reads drafted tokens that it cannot use
            position_ids=(slots[-num_new:] - padding).clamp(0, self._last_position),  # (B, F)
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
        """Forgets the last tokens of every row, and all but some rows altogether.

        Args:
            counts (`torch.Tensor`): Tokens that each row forgets, int64 `(B,)`.
            rows (`list[int]`): The rows to go on with, ascending, at least one.
        """
        padding, counts = self._padding[rows], counts[rows].to(self._padding.device)
        lengths = self._cache.get_seq_length() - padding - counts
        width = int(lengths.max())
        self._padding = width - lengths
        # What lands in the padding is masked, but must be finite: any slot will do.
        source = torch.arange(width, device=padding.device) + (padding - self._padding)[:, None]  # (B, S)
        source = source.clamp(min=0)
        for layer in self._cache.layers:
            if layer.keys is not None:
                layer.keys, layer.values = (_select(states, rows, source) for states in (layer.keys, layer.values))


def _select(states: torch.Tensor, rows: list[int], source: torch.Tensor) -> torch.Tensor:
    """Of keys or values `(B, H, S, D)` some rows, with slot `source[r, w]` of the r-th in slot w, `(R, H, W, D)`."""
    index = torch.tensor(rows, device=states.device)[:, None], source.to(states.device)
    # several times faster than gathering along the slots, which looks up an index for every single number
    return states.transpose(1, 2)[index].transpose(1, 2)


def check_reversible(model: PreTrainedModel, role: str) -> None:
    """Raises `ValueError` if the model keeps a state that tokens cannot be taken out of (Mamba, linear attention)."""
    layers = {type(layer).__name__ for layer in DynamicCache(config=model.config).layers}
    if not layers <= set(REVERSIBLE_LAYERS):
        raise ValueError(
            f"The {role} ({type(model).__name__}) keeps {', '.join(sorted(layers - set(REVERSIBLE_LAYERS)))} in its "
            "cache. Rejected tokens of single rows cannot be taken out of that: a batch needs a model with keys and "
            "values alone."
        )


def check_positions(model: PreTrainedModel, role: str, prompts_ids: list[list[int]], max_new_tokens: int) -> None:
    """Raises `ValueError` if a prompt leaves no room for `max_new_tokens` in the model's positions."""
    last_position = _find_last_position(model)
    longest = max(range(len(prompts_ids)), key=lambda i: len(prompts_ids[i]))
    # the last token written is not read any more
    if last_position is not None and len(prompts_ids[longest]) + max_new_tokens - 2 > last_position:
        raise ValueError(
            f"Prompt {longest} has {len(prompts_ids[longest])} tokens, which leaves no room for "
            f"`max_new_tokens={max_new_tokens}` in the {role}'s {last_position + 1} positions. Remove prompts that are "
            "as long, or lower `max_new_tokens`."
        )


def _find_last_position(model: PreTrainedModel) -> int | None:
    count = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return None if count is None else count - 1
