"""All that a white-box loss and its trainer read of a teacher: a live model, stored columns, or what serving left."""

from typing import Protocol

import torch
from transformers import PreTrainedModel

from spec_kd.losses import Divergence, TokenLoss
from spec_kd.losses.selected import TokenTargets
from spec_kd.open_types import JsonObject


class Targets(Protocol):
    """The target's distribution at the tokens of one batch."""

    @property
    def alpha_metric(self) -> str | None:
        """Name of the metric that the loss's alpha is: exact, or an upper bound; `None` if alpha is unknown."""

    @property
    def head_parameters(self) -> list[torch.nn.Parameter]:
        """Parameters that the loss reads, and ZeRO-3 therefore has to gather; none by default."""
        return []

    def select(self, mask: torch.Tensor) -> TokenTargets:
        """The tokens of the loss.

        Args:
            mask (`torch.Tensor`): bool `(B, T - 1)`, true where the *next* token belongs to the loss.
        """

    def compute_tail_mass(self, labels: torch.Tensor) -> torch.Tensor | None:
        """Probability outside of the ids that are kept, float32 `(N,)`; `None`, the default, where all of it is kept.

        Args:
            labels (`torch.Tensor`): int64 `(B, T)`, -100 outside of the N tokens of the loss.
        """
        return None

    def explain_non_finite(self, loss: TokenLoss) -> str | None:
        """Why a loss over these targets is NaN or infinite, as sentences; `None`, the default, if they are no cause."""
        return None


class Teacher(Protocol):
    """Where the target's distribution over a batch comes from.

    Attributes:
        name (`str`, *optional*): The target's path or Hub id.
        model (`PreTrainedModel`, *optional*): The target, prepared for the devices; `None` without a live one.
        columns (`tuple[str, ...]`): Columns of the dataset that are read.
    """

    name: str | None
    model: PreTrainedModel | None
    columns: tuple[str, ...]

    def compute_targets(self, inputs: JsonObject) -> Targets:
        """The target's distribution over a batch; columns of the teacher are taken out of `inputs`.

        Args:
            inputs (`dict[str, torch.Tensor]`): What the draft is called with, and the teacher's columns.
        """

    def describe_service(self, divergence: Divergence) -> str:
        """How this teacher serves a divergence, for the model card; empty if it gives the whole distribution."""
        return ""
