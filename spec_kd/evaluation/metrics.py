"""The metrics of one evaluation: sums per prompt, and what is derived from them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np

from spec_kd.counting import Counting
from spec_kd.evaluation.statistics import Interval, bootstrap_ratio
from spec_kd.open_types import Argument, Array

if TYPE_CHECKING:
    import torch

    from spec_kd.acceptance import Rounds


def name_temperature(temperature: float) -> str:
    """`"greedy"` for 0.0, else `"t1"`, `"t0.7"`, ...: the name of the setting in reports and metrics."""
    return "greedy" if temperature == 0 else f"t{temperature:g}"


@dataclass(frozen=True, kw_only=True)
class AcceptanceMetrics:
    """What speculative decoding did, or would do, on P prompts.

    Args:
        tokens (`np.ndarray`):
            Emitted tokens `(P,)`, EOS included; without the first one where the prompt's pass writes it alone.
        target_calls (`np.ndarray`):
            Target forward passes `(P,)`, without such a pass; an expectation where it was replayed.
        accepted (`np.ndarray`): Accepted drafted tokens `(P,)`, as the serving engine counts them.
        drafted (`np.ndarray`): Drafted tokens `(P,)`, as the serving engine counts them.
        drafting_rounds (`np.ndarray`): Rounds that drafted at least one token `(P,)`.
        accepted_by_position (`np.ndarray`): Rounds in which drafted token k was accepted `(P, gamma)`.
        temperature (`float`): Sampling temperature, 0.0 for greedy.
        num_assistant_tokens (`int`): gamma.
        draft_sampling (`str`): `"stochastic"` or `"greedy"`.
        method (`str`): `"replay"` or `"assisted"`.
        alpha_sum (`np.ndarray`, *optional*): Sum of alpha over the positions of the target's completion `(P,)`.
        alpha_tokens (`np.ndarray`, *optional*): Tokens of these completions `(P,)`.
    """

    tokens: Array
    target_calls: Array
    accepted: Array
    drafted: Array
    drafting_rounds: Array
    accepted_by_position: Array
    temperature: float
    num_assistant_tokens: int
    draft_sampling: str
    method: str
    alpha_sum: Array | None = None
    alpha_tokens: Array | None = None

    @classmethod
    def of(
        cls, rounds: "Rounds", lengths: "torch.Tensor", counting: Counting, **facts: Argument
    ) -> "AcceptanceMetrics":
        """The metrics of replayed rounds on responses of these `lengths`, with the other fields as `facts`."""
        return cls(
            tokens=(lengths - counting.first_round).numpy(),  # the prompt's pass writes the others, without a draft
            target_calls=rounds.target_calls.numpy(),
            accepted=rounds.accepted.numpy(),
            drafted=rounds.drafted.numpy(),
            drafting_rounds=rounds.drafting_rounds.numpy(),
            accepted_by_position=rounds.accepted_by_position.numpy(),
            **facts,
        )

    @property
    def alpha(self) -> Interval | None:
        """Expected acceptance of one drafted token, mean over positions; `None` if it was not measured."""
        return None if self.alpha_sum is None else bootstrap_ratio(self.alpha_sum, cast(Array, self.alpha_tokens))

    @property
    def acceptance_rate(self) -> Interval:
        """Accepted over drafted tokens; NaN if nothing was drafted."""
        return bootstrap_ratio(self.accepted, self.drafted)

    @property
    def block_efficiency(self) -> Interval:
        """Tokens emitted per target forward pass, the bonus token included."""
        return bootstrap_ratio(self.tokens, self.target_calls)

    @property
    def block_efficiency_by_prompt(self) -> Array:
        """Tokens per target pass of each prompt `(P,)`; 1 where the prompt's own pass wrote everything."""
        return np.divide(self.tokens, self.target_calls, out=np.ones(len(self.tokens)), where=self.target_calls > 0)

    @property
    def mean_acceptance_length(self) -> Interval:
        """1 + accepted tokens / drafting rounds, as serving engines print it; NaN if nothing was drafted."""
        return Interval(*(1 + value for value in bootstrap_ratio(self.accepted, self.drafting_rounds)))

    @property
    def acceptance_rate_per_position(self) -> list[Interval]:
        """Share of the drafting rounds in which drafted token k = 1..gamma was accepted."""
        return [bootstrap_ratio(column, self.drafting_rounds) for column in self.accepted_by_position.T]

    def to_metrics(self, prefix: str = "eval", suffix: str = "") -> dict[str, float]:
        """The values without intervals, for a log. alpha always carries its setting (`eval_alpha_t1`).

        Args:
            prefix (`str`, *optional*, defaults to `"eval"`): Prefix of every name.
            suffix (`str`, *optional*, defaults to `""`): Suffix of every name but alpha's, such as `"_t1"`.
        """
        metrics = {
            f"{prefix}_acceptance_rate{suffix}": self.acceptance_rate.value,
            f"{prefix}_block_efficiency{suffix}": self.block_efficiency.value,
        }
        for k, rate in enumerate(self.acceptance_rate_per_position, start=1):
            metrics[f"{prefix}_acceptance_rate_pos_{k}{suffix}"] = rate.value
        if self.alpha is not None:
            metrics = {f"{prefix}_alpha_{name_temperature(self.temperature)}": self.alpha.value, **metrics}
        return metrics
