"""What a black-box step costs on a CPU, made comparable with what it costs on a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch


@contextmanager
def project_loss_positions_only() -> Iterator[None]:
    """TRL's head projects the positions of the loss alone, as it does on GPUs, and not the prompts' as well.

    Without Triton it projects them all, so that tiles keep their shape for a compiler. There is no compiler here: 250
    black-box steps in Chinese would take 465 s instead of 81 s for the same loss, white-box ones take about 200 s, and
    comparisons at equal wall-clock would be about that.

    Raises:
        `AttributeError`: TRL has moved the function that decides.
    """
    with patch("trl.trainer.utils._use_triton", lambda device: True):
        yield
