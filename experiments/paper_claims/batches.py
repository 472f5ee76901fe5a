"""The order of rows in domains whose rows differ much in length, where half of a random batch would be padding."""

import numpy as np

GOLDEN_RATIO = (5**0.5 - 1) / 2
JITTER = 0.1  # of a length, so that another seed makes other batches


def order_by_length(lengths: list[int], batch_size: int, seed: int) -> list[int]:
    """An order in which a batch has rows of similar length, and any few batches in a row have all lengths.

    The second keeps training from going through the data from short to long, and a few steps as costly as many.
    transformers' `group_by_length` has neither, and needs `input_ids`, which the prompts of online trainers lack.

    Args:
        lengths (`list[int]`): Of the rows.
        batch_size (`int`): Rows of a batch; a last one that is not full comes last.
        seed (`int`): Of the jitter and of the batch that comes first.
    """
    rng = np.random.default_rng(seed)
    by_length = np.argsort(np.array(lengths) * np.exp(JITTER * rng.standard_normal(len(lengths))), kind="stable")
    num_full = len(lengths) // batch_size
    # Of which rows the short batch is made is left to chance, or it would always have the longest.
    left_over = rng.permutation(len(lengths))[num_full * batch_size :]
    batches = by_length[~np.isin(by_length, left_over)].reshape(num_full, batch_size)
    positions = (rng.random() + GOLDEN_RATIO * np.arange(num_full)) % 1  # a low-discrepancy sequence
    return [*batches[positions.argsort().argsort()].ravel().tolist(), *left_over.tolist()]
