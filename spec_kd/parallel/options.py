"""Options of training a parallel draft."""

from dataclasses import dataclass, fields

from spec_kd.losses.block_weighting import BLOCK_WEIGHTINGS, DEFAULT_SMOOTHING, BlockWeighting, DPace, PositionWeights
from spec_kd.options import check_choice, check_int, check_number, document_options, option, refuse
from spec_kd.parallel.layout import compute_shares


@document_options
@dataclass
class ParallelOptions:
    """Options of training a draft that drafts several tokens in one pass (PARD, arXiv 2504.18583).

    The draft reads the text and K - 1 masks, and training appends masks for every place where a pass may begin.
    """

    num_parallel_tokens: int | None = option(
        "Number K of tokens that one pass of the draft drafts, at least 2: the draft is trained with K - 1 masks after "
        "the text. The saved draft's config has it. By default the draft is autoregressive.",
        default=None,
    )
    parallel_mask_token: str | None = option(
        "Token of the tokenizer that stands for a token not known yet, and that the target never writes. By default "
        "the draft's own, or else a reserved or special token that no text has.",
        default=None,
    )
    parallel_retention: float = option(
        "Rate r at which later positions are kept: position k of the K is trained in a share max(r^(k - 1), "
        "`parallel_retention_floor`) of the places where a pass may begin. 1 keeps all of them.",
        default=0.7,
    )
    parallel_retention_floor: float = option("Least share of the places that keeps a position.", default=0.2)
    parallel_weighting: str = option(
        "Weight of each position in the loss: 'position', fixed weights; 'expected_length', the gradient of the "
        "expected accepted length of the K tokens, with `divergence='tvd'`; 'd_pace' (arXiv 2605.18810), what each "
        "position contributes to that length, with any divergence; 'target_confidence' (PARD-2, arXiv 2605.08632), the "
        "target's probability of the tokens before it.",
        default=PositionWeights.name,
    )
    parallel_position_weights: list[float] | None = option(
        "K weights of the positions, for `parallel_weighting='position'`; equal by default.", default=None
    )
    d_pace_smoothing: float = option(
        "Smoothing s of 'd_pace': an acceptance a counts as (1 - s) a + s.", default=DEFAULT_SMOOTHING
    )

    def check_parallel(self) -> None:
        """Raises `ValueError` for options that are out of bounds, do not fit each other, or have no use."""
        check_int("num_parallel_tokens", self.num_parallel_tokens, 2, is_optional=True)
        check_number("parallel_retention", self.parallel_retention, above=0, maximum=1)
        check_number("parallel_retention_floor", self.parallel_retention_floor, 0, 1)
        check_number("d_pace_smoothing", self.d_pace_smoothing, 0, below=1)
        check_choice("parallel_weighting", self.parallel_weighting, tuple(BLOCK_WEIGHTINGS))
        weights, count = self.parallel_position_weights, self.num_parallel_tokens
        for weight in weights or ():
            check_number("parallel_position_weights", weight, 0)
        unused = [
            f"`{one.name}`"
            for one in fields(ParallelOptions)
            if count is None and getattr(self, one.name) != one.default
        ]
        refuse(
            (
                unused,
                f"{', '.join(unused)} belongs to parallel drafts. Set `num_parallel_tokens`, or leave it out.",
            ),
            (
                weights is not None and self.parallel_weighting != PositionWeights.name,
                f"`parallel_position_weights` has no use with `parallel_weighting={self.parallel_weighting!r}`, which "
                "decides the weights. Leave one of them out.",
            ),
            (
                self.d_pace_smoothing != DEFAULT_SMOOTHING and self.parallel_weighting != DPace.name,
                f"`d_pace_smoothing` has no use with `parallel_weighting={self.parallel_weighting!r}`. Leave it out.",
            ),
            (
                weights is not None and (len(weights) != count or not any(weights)),
                f"`parallel_position_weights` has {len(weights or ())} weights, but must have one for each of the "
                f"{count} positions, and not only zeros.",
            ),
        )

    @property
    def parallel_shares(self) -> list[float]:
        """Share of the places that keeps each position."""
        return compute_shares(self.num_parallel_tokens or 1, self.parallel_retention, self.parallel_retention_floor)

    def build_weighting(self) -> BlockWeighting | None:
        """The weighting that these options describe; `None` for an autoregressive draft."""
        if self.num_parallel_tokens is None:
            return None
        cls = BLOCK_WEIGHTINGS[self.parallel_weighting]
        if cls is PositionWeights:
            return PositionWeights(
                self.parallel_position_weights or [1.0] * self.num_parallel_tokens, self.parallel_shares
            )
        return DPace(self.d_pace_smoothing) if cls is DPace else cls()
