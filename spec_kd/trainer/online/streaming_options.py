"""Options of `OnlineGKDConfig(mode="streaming")`."""

from dataclasses import dataclass

from spec_kd.acceptance import check_num_assistant_tokens, check_sampling
from spec_kd.checks import check_choice, check_int
from spec_kd.losses import SignalSpec
from spec_kd.options import document_options, option
from spec_kd.trainer.online.request_server import TRAINED_POSITIONS


@document_options
@dataclass
class StreamingOptions:
    """Options of learning from served requests (Online Speculative Decoding, arXiv 2310.07177)."""

    update_interval: int | None = option(
        "Requests that each process serves between two updates: a multiple of `per_device_train_batch_size`, which "
        "sets `gradient_accumulation_steps`. By default these two decide.",
        default=None,
    )
    num_assistant_tokens: int = option("Number of tokens drafted in a round (gamma).", default=5)
    draft_sampling: str = option(
        "Sampling rule of the draft: 'stochastic', the rule of the papers, or 'greedy', as most servers draft at any "
        "temperature.",
        default="stochastic",
    )
    trained_positions: str = option(
        "Tokens that the loss is over: 'rejected', where the target corrected the draft, or 'all'.",
        default="rejected",
    )
    served_signal: str = option(
        "Part of the target's distribution that is kept at each token: a method of `generate_responses(..., "
        "teacher_signal=...)` that serves the divergence.",
        default="sampled_logprobs",
    )
    served_signal_size: int | None = option(
        "Number of draws or of most likely ids that `served_signal` keeps; the method's own number by default.",
        default=None,
    )

    def build_signal_spec(self) -> SignalSpec:
        """What `served_signal` and `served_signal_size` ask for; raises `ValueError` if they do not go together."""
        return SignalSpec(self.served_signal).sparse_method.build_spec(self.served_signal_size)

    def check_streaming(self, temperature: float, batch_size: int) -> None:
        """Raises `ValueError` for an option out of its range.

        Args:
            temperature (`float`): Sampling temperature.
            batch_size (`int`): Requests of a batch, which `update_interval` must be a multiple of.
        """
        check_num_assistant_tokens(self.num_assistant_tokens)
        check_sampling(temperature, self.draft_sampling)
        check_choice("trained_positions", self.trained_positions, TRAINED_POSITIONS)
        check_int("update_interval", self.update_interval, is_optional=True)
        check_int("served_signal_size", self.served_signal_size, is_optional=True)
        self.build_signal_spec()
        if self.update_interval is not None and self.update_interval % batch_size:
            raise ValueError(
                f"`update_interval={self.update_interval}` is not a multiple of `per_device_train_batch_size="
                f"{batch_size}`, and requests are learned in such batches. Change one of them."
            )
