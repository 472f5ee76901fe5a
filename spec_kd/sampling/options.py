"""Options of sampling, and their checks."""

from dataclasses import dataclass

from spec_kd.options import check_int, check_number, document_options, option


@document_options
@dataclass(frozen=True)
class SamplingOptions:
    """How completions are sampled: from the softmax of the logits at a temperature, cut to its most likely ids.

    Raises `ValueError` for an option out of its range.
    """

    max_new_tokens: int = option("Maximum number of tokens in a completion, its EOS included.", default=512)
    temperature: float = option("Temperature of the softmax; 0 is greedy.", default=1.0)
    top_k: int = option("Number of most likely ids to sample from; 0 samples from all.", default=0)
    top_p: float = option("Probability mass of the most likely ids to sample from; 1.0 samples from all.", default=1.0)
    seed: int = option("Sampling seed.", default=0)

    def __post_init__(self) -> None:
        check_int("max_new_tokens", self.max_new_tokens)
        check_number("temperature", self.temperature, 0, reason="0 is greedy.")
        check_truncation(self.top_k, self.top_p)
        check_int("seed", self.seed, None)
        for name in ("temperature", "top_p"):  # 1 and 1.0 are one setting, also where settings are stored and compared
            object.__setattr__(self, name, float(getattr(self, name)))

    @property
    def is_truncated(self) -> bool:
        """Whether only a part of the softmax is sampled from."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1)


def check_truncation(top_k: int, top_p: float) -> None:
    """Raises `ValueError` for a `top_k` below 0 or a `top_p` outside (0, 1]."""
    check_int("top_k", top_k, 0)
    check_number("top_p", top_p, above=0, maximum=1, reason="1.0 samples from all ids.")
