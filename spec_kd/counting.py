"""How drafts are sampled, and what engines count of them: words that need no tensors."""

from dataclasses import dataclass

DRAFT_SAMPLINGS = ("stochastic", "greedy")
REPLAY_SAMPLINGS = (*DRAFT_SAMPLINGS, "matching")
"""How a draft is sampled where it is replayed: `"matching"` is a sample that the target's own sample has to equal."""


@dataclass(frozen=True)
class Counting:
    """Which rounds and tokens an engine counts; the defaults are those of the papers and of transformers.

    Args:
        first_round (`int`, *optional*, defaults to `0`):
            Token at which the first round begins: 1 where the prompt's pass writes the first token without a draft.
        reserved_tokens (`int`, *optional*, defaults to `1`):
            Tokens of the limit that no draft may take, 1 for the target's own token; `None` if drafts ignore the limit.
        counts_drafted_past_end (`bool`, *optional*, defaults to `False`):
            Whether a draft goes on after the end of the text and all of its tokens are counted as drafted.
        end (`str`, *optional*, defaults to `"counted"`):
            What an accepted EOS counts for: `"counted"`, one accepted token, the round's last; `"if_last"`, the same,
            but only if the draft ends with it; `"passed"`, one of the round's tokens, and those accepted after it are
            counted too.
        cuts_refused (`bool`, *optional*, defaults to `False`):
            Whether a draft is cut before its first token that a grammar refuses, and what is cut is not counted.
        draft_ends_at_eos (`bool`, *optional*, defaults to `False`):
            Whether a draft ends at an EOS of its own. The expected number of drafted tokens is then an upper bound,
            since what a draft writes after its first refused token is not known.
        counts_last_round (`bool`, *optional*, defaults to `True`):
            Whether the drafted and accepted tokens of the round that ends the text are counted.
    """

    first_round: int = 0
    reserved_tokens: int | None = 1
    counts_drafted_past_end: bool = False
    end: str = "counted"
    cuts_refused: bool = False
    draft_ends_at_eos: bool = False
    counts_last_round: bool = True


PAPER_COUNTING = Counting()
