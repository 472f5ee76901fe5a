"""Options of speculative decoding."""

from dataclasses import dataclass

from spec_kd.acceptance import check_num_assistant_tokens, check_sampling
from spec_kd.options import check_int, document_options, option
from spec_kd.sampling.options import SamplingOptions

# Texts of options that other groups of options have as well.
NUM_ASSISTANT_TOKENS_HELP = "Number of tokens drafted in a round (gamma)."
DRAFT_SAMPLING_HELP = (
    "How the draft proposes tokens: `stochastic` samples them, as in the papers and in transformers; `greedy` takes "
    "the most likely ones at any temperature, as most servers do. The two are equal at temperature 0."
)


@document_options
@dataclass(frozen=True)
class SpeculationOptions(SamplingOptions):
    """How [`generate_speculatively`] writes completions. Both models sample as [`SamplingOptions`] say.

    Raises `ValueError` for an option out of its range.
    """

    temperature: float = option("Temperature of both models; 0 is greedy.", default=0.0)
    num_assistant_tokens: int = option(NUM_ASSISTANT_TOKENS_HELP, default=5)
    draft_sampling: str = option(DRAFT_SAMPLING_HELP, default="stochastic")
    batch_size: int = option(
        "Number of prompts at a time, the longest first. A complete one makes room for the next. Sampled completions "
        "depend on it.",
        default=16,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_num_assistant_tokens(self.num_assistant_tokens)
        check_sampling(self.temperature, self.draft_sampling)
        check_int("batch_size", self.batch_size)
