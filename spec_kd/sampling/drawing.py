"""Seeds, and drawing one id of each row."""

import hashlib

import torch

SEED_BITS = 56  # of the 64 bits of a torch generator's seed


def derive_seed(text: str, bits: int = SEED_BITS) -> int:
    """The first `bits` bits of the text's SHA-256: the same on every machine, whatever was drawn before."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest(), "big") >> (256 - bits)


def seed_generator(text: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A new generator on `device` with the seed of [`derive_seed`]; the global random state is not touched."""
    return torch.Generator(device).manual_seed(derive_seed(text))


def draw_ids(weights: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draws one id for each row.

    Args:
        weights (`torch.Tensor`): Weights of the ids, `(B, V)`, 0 or above. They need not sum to one.
        generator (`torch.Generator`): Generator on the device of the weights.

    Returns:
        `torch.Tensor`: int64 `(B,)`.
    """
    # `torch.multinomial` draws a number for every id. On a CPU that takes longer than the head of a small model.
    cumulated = weights.double().cumsum(dim=-1)
    draws = torch.rand(len(weights), 1, generator=generator, dtype=torch.double, device=weights.device)
    ids = torch.searchsorted(cumulated, draws * cumulated[:, -1:], right=True).squeeze(1)
    return ids.clamp(max=weights.shape[1] - 1)  # the product may be rounded up to the sum
