"""What is known of an engine that serves a draft: all that replay, evaluation, cards and commands read of it."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from spec_kd.counting import Counting
from spec_kd.escaping import quote_argument
from spec_kd.options import check_number
from spec_kd.serving.lookup import Lookup
from spec_kd.serving.observer import Observer
from spec_kd.serving.pair import PairCheck

WORDS = {
    "greedy": "the draft proposes its most likely token x, which is accepted with the target's probability p(x)",
    "stochastic": "the draft samples a token x, which is accepted with probability min(1, p(x) / q(x))",
    "matching": "the draft samples a token, which is accepted if the target samples the same",
}


@dataclass(frozen=True)
class DraftingRule:
    """One way in which an engine drafts and accepts where the target samples.

    Greedy decoding accepts the same tokens by every rule.

    Args:
        sampling (`str`): `"greedy"`, `"stochastic"` or `"matching"`, see `WORDS`.
        flags (`str`, *optional*, defaults to `""`): What chooses the rule in the engine; empty for its default.
        draft_top_k (`int`, *optional*):
            Number of most likely ids that a sampled draft chooses from at the same temperature, 0 for all of them. By
            default the draft is cut as the target is.
        counting (`Counting`, *optional*): What the engine counts by this rule, where it differs from the other rules.
    """

    sampling: str
    flags: str = ""
    draft_top_k: int | None = None
    counting: Counting | None = None

    @property
    def words(self) -> str:
        """The rule as a clause."""
        cuts = {None: "", 0: ", q being cut by temperature alone"}
        return WORDS[self.sampling] + cuts.get(
            self.draft_top_k, f", q being cut to its {self.draft_top_k} most likely ids"
        )


@dataclass(frozen=True)
class StructuredOutput:
    """What an engine does with a draft where a JSON schema or a grammar masks the target, as it does at every position.

    What is cut from a draft, and not counted, is said by [`Counting`][spec_kd.counting.Counting].

    Args:
        source (`str`): Where this is stated, with the version that was read.
        masks_draft (`bool`, *optional*, defaults to `False`):
            Whether the draft is masked too. Otherwise it proposes what it likes, and no refused token is accepted.
        samples_unmasked (`bool`, *optional*, defaults to `False`):
            Whether a token is sampled without the mask first, and again with it only if it is refused. By top-k or
            top-p this gives another distribution than a mask before them.
    """

    source: str
    masks_draft: bool = False
    samples_unmasked: bool = False


@dataclass(frozen=True)
class EarlyEnd:
    """How an engine ends a draft at a token that the draft model is not sure of.

    The probability is that of the draft model at temperature 1, or at the request's temperature where it samples.

    Args:
        flags (`str`): What sets the threshold in the engine, with `{threshold}` in its place.
        keeps_token (`bool`): Whether the first token below the threshold is drafted, as the last one.
        is_of_token (`bool`):
            Whether the probability is that of the drafted token. Otherwise it is that of the most likely one, which
            differs where the draft is sampled.
        top_k (`int`, *optional*):
            Number of most likely ids over which the probability is renormalized. By default those that a sampled draft
            chooses from, and all for a greedy one.
        note (`str`, *optional*, defaults to `""`): What else a reader must know of it, as a sentence.
    """

    flags: str
    keeps_token: bool
    is_of_token: bool
    top_k: int | None = None
    note: str = ""


class CommandWriter(Protocol):
    """Writes the command of an engine."""

    def __call__(self, draft: str, target: str, num_draft_tokens: int, flags: Sequence[str] = ()) -> str:
        """The command.

        Args:
            draft (`str`), target (`str`): Folders or Hub ids.
            num_draft_tokens (`int`): Number of drafted tokens.
            flags (`Sequence[str]`, *optional*): Further settings, in the engine's own form as [`DraftingRule`] has it.
        """


@dataclass(frozen=True)
class ServingEngine:
    """An engine that serves a target with a standalone draft.

    Args:
        name (`str`): The engine.
        title (`str`): The engine's name as its makers write it.
        rules (`tuple[DraftingRule, ...]`): How it drafts and accepts, the default first.
        counting (`Counting`): Which rounds and tokens it counts.
        source (`str`): Where rules and counting are stated, with the version that was read.
        is_observed (`bool`): Whether predictions were compared with a running engine, see `benchmarks/serving`.
        vocabulary (`str`): What the engine asks of the draft's vocabulary, in words.
        length (`str`): What happens where a text grows longer than the draft's context, in words.
        counters (`str`): Where the engine shows how many drafted tokens it accepted, in words.
        figures (`Mapping[str, str]`):
            The engine's names for what replay predicts, by attribute of
            [`AcceptanceMetrics`][spec_kd.evaluation.AcceptanceMetrics].
        default_num_draft_tokens (`int`, *optional*): Tokens drafted in a round by default; `None` if it must be given.
        command_language (`str`): `"bash"` or `"python"`.
        write_command (`CommandWriter`): Writes the command that serves the pair.
        write_parallel_command (`CommandWriter`, *optional*):
            Writes the command that serves a parallel draft; `None` where the engine takes none.
        write_synthetic_command (`Callable`, *optional*):
            Writes a command that accepts drafted tokens by chance, from draft, target and acceptance rates, to time the
            engine at these; `None` where it cannot.
        lookup (`Lookup`, *optional*): How it drafts without a draft model; `None` where it does not, or was not read.
        checks (`tuple[PairCheck, ...]`, *optional*, defaults to `()`):
            What a draft and its target must meet, and what the engine does with a pair that does not.
        observer (`Observer`, *optional*): How a running server is asked what it drafted; `None` for what is no server.
        structured_output (`StructuredOutput`, *optional*):
            What a draft does where a grammar masks the target; `None` where it was not read.
        early_end (`EarlyEnd`, *optional*):
            How it ends drafts where the draft model is not sure; `None` where it does not, or by a rule not modeled.
        block_flags (`str`, *optional*, defaults to `""`):
            What makes it verify a sampled draft as a block; empty where it cannot.
        batch_size_flags (`str`, *optional*, defaults to `""`):
            What sets the number of drafted tokens by batch size, with `{ranges}` in place of a JSON list of
            `[first batch size, last batch size, drafted tokens]`; empty where there is one number for all.
    """

    name: str
    title: str
    rules: tuple[DraftingRule, ...]
    counting: Counting
    source: str
    is_observed: bool
    vocabulary: str
    length: str
    counters: str
    default_num_draft_tokens: int | None
    command_language: str
    write_command: CommandWriter
    write_parallel_command: CommandWriter | None = None
    write_synthetic_command: Callable[[str, str, Sequence[float]], str] | None = None
    lookup: Lookup | None = None
    checks: tuple[PairCheck, ...] = ()
    observer: Observer | None = None
    structured_output: StructuredOutput | None = None
    early_end: EarlyEnd | None = None
    block_flags: str = ""
    batch_size_flags: str = ""
    figures: Mapping[str, str] = field(default_factory=dict)

    @property
    def draft_sampling(self) -> str:
        """Sampling of the default rule."""
        return self.rules[0].sampling

    @property
    def masked_models(self) -> tuple[str, ...]:
        """The models that a JSON schema or a grammar masks: `"target"`, and `"draft"` where the engine masks it."""
        return ("target", "draft") if self.structured_output and self.structured_output.masks_draft else ("target",)

    def check_structured_output(self, is_truncated: bool) -> None:
        """Raises `ValueError` where it is not known what the engine does with a draft under a grammar.

        Args:
            is_truncated (`bool`): Whether the target samples by top-k or top-p.
        """
        if self.structured_output is None:
            raise ValueError(
                f"What {self.title} does with a draft under a JSON schema or a grammar is not known. Choose another "
                "`serving_engine`."
            )
        if is_truncated and self.structured_output.samples_unmasked:
            raise ValueError(
                f"{self.title} cuts by `top_k` and `top_p` before it masks, which is not modeled under a JSON schema "
                "or a grammar. Leave them out, and send requests without them."
            )

    def check_threshold(self, threshold: float) -> None:
        """Raises `ValueError` for a confidence threshold out of [0, 1], or where drafts do not end early."""
        check_number("assistant_confidence_threshold", threshold, 0, 1)
        if threshold and self.early_end is None:
            raise ValueError(
                f"{self.title} does not end drafts early, and `assistant_confidence_threshold={threshold:g}` says that "
                "it did. Leave it out."
            )

    def list_threshold_flags(self, threshold: float) -> tuple[str, ...]:
        """What makes drafts end below this probability, as `flags` of a command; empty for 0 or without early ends."""
        if not threshold or self.early_end is None:
            return ()
        return (self.early_end.flags.format(threshold=f"{threshold:g}"),)

    def find_writer(self, is_parallel: bool) -> CommandWriter | None:
        """Writes the command for a draft; `None` for a parallel draft where the engine takes none."""
        return self.write_parallel_command if is_parallel else self.write_command

    def find_rule(self, draft_sampling: str) -> DraftingRule | None:
        """The rule with this sampling; `None` where the engine has no such rule."""
        return next((rule for rule in self.rules if rule.sampling == draft_sampling), None)

    def find_counting(self, draft_sampling: str) -> Counting:
        """What the engine counts by the rule with this sampling."""
        rule = self.find_rule(draft_sampling)
        return self.counting if rule is None or rule.counting is None else rule.counting

    def find_draft_top_k(self, draft_sampling: str) -> int | None:
        """`draft_top_k` of the rule with this sampling; `None` where the engine has no such rule."""
        rule = self.find_rule(draft_sampling)
        return None if rule is None else rule.draft_top_k


def check_acceptance_rates(rates: Sequence[float]) -> None:
    """Raises `ValueError` unless these are shares of rounds, none higher than the one before it."""
    if not rates or not all(0 <= after <= before <= 1 for before, after in itertools.pairwise((1.0, *rates))):
        raise ValueError(
            f"`acceptance_rates` is {list(rates)}, but must be shares from 0 to 1, one for each drafted token, none "
            "higher than the one before it: a token is accepted only after those before it."
        )


def write_flags(flags: Mapping[str, object]) -> str:
    """Flags of a command with their values, quoted for a shell."""
    return " ".join(f"{name} {quote_argument(str(value))}" for name, value in flags.items())
