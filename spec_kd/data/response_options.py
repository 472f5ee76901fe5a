"""Options of `generate_responses` and `score_completions`."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, ClassVar

from spec_kd.options import check_choice, check_int, check_number, check_text, document_options, option
from spec_kd.sampling.options import SamplingOptions

if TYPE_CHECKING:
    from spec_kd.losses import SignalSpec

SIGNAL_HELP = (
    "What to keep of the target's distribution at every token: a name of `spec_kd.losses.SPARSE_METHODS`, such as "
    "`sampled_logprobs`."
)
# What is kept is compared as a whole, and the other two change no row that is there.
NO_SETTINGS = ("teacher_signal", "num_draws", "signal_top_k", "on_unidentified_token", "on_unusable_prompt")


@dataclass(frozen=True)
class SignalOptions:
    """What generating and scoring have in common."""

    is_scored: ClassVar[bool]
    """Whether the completions exist already, and were sampled in ways that this run does not decide."""

    teacher_signal: str | None = option(f"{SIGNAL_HELP} Without it nothing is kept.", default=None)
    num_draws: int | None = option("Draws per token of the two sampled signals; 50 there if not set.", default=None)
    signal_top_k: int | None = option("Most likely ids per token of `top_k_tail`; 16 there if not set.", default=None)
    batch_size: int | None = option(
        "Prompts that the engine gets at a time; if not set, 8 for transformers, and a whole shard for engines that "
        "batch on their own.",
        default=None,
    )
    shard_size: int = option("Responses between two savings, rounded to whole batches.", default=512)
    on_unidentified_token: str = option(
        "Treatment of completions whose exact ids a server does not tell: `raise` stops the job and keeps the finished "
        "shards, `drop` leaves these rows out with a warning.",
        default="raise",
    )
    on_unusable_prompt: str = option(
        "Treatment of prompts that the target cannot take, such as those that are too long: `raise` an error, or "
        "`skip` these rows with a warning.",
        default="raise",
    )

    def __post_init__(self) -> None:
        check_int("batch_size", self.batch_size, is_optional=True)
        check_int("shard_size", self.shard_size)
        check_choice("on_unidentified_token", self.on_unidentified_token, ("raise", "drop"))
        check_choice("on_unusable_prompt", self.on_unusable_prompt, ("raise", "skip"))
        _ = self.signal

    @property
    def signal(self) -> "SignalSpec | None":
        """What to keep, with the method's defaults filled in.

        Raises:
            ValueError: For an unknown method, or a number that it has no use for.
        """
        if self.teacher_signal is None:
            for name in ("num_draws", "signal_top_k"):
                if getattr(self, name) is not None:
                    raise ValueError(f"`{name}` belongs to a `teacher_signal`, which is not set.")
            return None
        from spec_kd.losses import SignalSpec

        return SignalSpec(self.teacher_signal, self.num_draws, self.signal_top_k).complete()

    def list_settings(self) -> dict[str, object]:
        """What the rows of a run depend on, for its manifest, besides the signal."""
        unused = () if getattr(self, "is_truncated", True) else ("top_k", "top_p")
        return {name: value for name, value in asdict(self).items() if name not in NO_SETTINGS + unused}


@document_options
@dataclass(frozen=True)
class ResponseOptions(SignalOptions, SamplingOptions):
    """How the target completes prompts, and what is kept of its distribution.

    Raises `ValueError` for an option out of its range, an unknown `teacher_signal`, a number that it has no use for,
    and a signal of completions that are sampled from a part of the softmax.
    """

    is_scored = False

    def __post_init__(self) -> None:
        SamplingOptions.__post_init__(self)
        SignalOptions.__post_init__(self)
        if self.is_truncated and self.teacher_signal is not None:
            raise ValueError(
                f"`teacher_signal={self.teacher_signal!r}` is of the whole distribution, and completions sampled with "
                f"`top_k={self.top_k}` and `top_p={self.top_p}` are not drawn from it. Leave one of them out, or add "
                "the signal afterwards with `score_completions`."
            )

    @property
    def sampling_temperature(self) -> float:
        """The temperature, by the name that it has where completions exist already."""
        return self.temperature


@document_options
@dataclass(frozen=True)
class ScoreOptions(SignalOptions):
    """How completions that exist already get a teacher signal.

    Raises `ValueError` for an option out of its range, an unknown `teacher_signal`, or a number that it has no use for.
    """

    is_scored = True

    teacher_signal: str | None = option(SIGNAL_HELP, default="sampled_logprobs")
    sampling_temperature: float | None = option(
        "Temperature that the completions were sampled at, 0 for greedy; unknown by default. What depends on it (exact "
        "replay, the written token as a draw from the target) is then refused later.",
        default=None,
    )
    max_new_tokens: int | None = option(
        "Limit that the completions were written under, for replay; unknown by default.", default=None
    )
    seed: int = option("Seed of the signal's draws.", default=0)

    def __post_init__(self) -> None:
        check_text("teacher_signal", self.teacher_signal)
        check_number("sampling_temperature", self.sampling_temperature, 0, is_optional=True, reason="0 is greedy.")
        check_int("max_new_tokens", self.max_new_tokens, is_optional=True)
        check_int("seed", self.seed, None)
        super().__post_init__()
