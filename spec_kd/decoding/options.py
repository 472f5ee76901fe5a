"""Options of speculative decoding."""

from dataclasses import dataclass

from spec_kd.acceptance import check_num_assistant_tokens, check_sampling
from spec_kd.options import check_int, document_options, option


@document_options
@dataclass(frozen=True)
class SpeculationOptions:
    """How [`generate_speculatively`] writes completions.

    Raises `ValueError` for an option out of its range.
    """

    max_new_tokens: int = option("Maximum number of tokens in a completion, its EOS included.", default=512)
    temperature: float = option("Temperature of both models; 0 is greedy.", default=0.0)
    num_assistant_tokens: int = option("Number of tokens drafted in a round (gamma).", default=5)
    draft_sampling: str = option(
        "How the draft proposes tokens: `stochastic` samples them, as in the paper and in transformers; `greedy` takes "
        "the most likely ones at any temperature, as most servers do. The two are equal at temperature 0.",
        default="stochastic",
    )
    batch_size: int = option(
        "Number of prompts at a time, the longest first. A complete one makes room for the next.", default=16
    )
    seed: int = option("Sampling seed. The drawn completions depend on `batch_size` as well.", default=0)

    def __post_init__(self) -> None:
        check_num_assistant_tokens(self.num_assistant_tokens)
        check_sampling(self.temperature, self.draft_sampling)
        check_int("max_new_tokens", self.max_new_tokens)
        check_int("batch_size", self.batch_size)
        check_int("seed", self.seed, None)
