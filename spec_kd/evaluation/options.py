"""What an evaluation measures: the options of [`~spec_kd.evaluate_draft`], of its command and of a recipe."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from spec_kd.counting import REPLAY_SAMPLINGS, Counting
from spec_kd.evaluation.metrics import name_temperature
from spec_kd.options import check_flag, check_int, check_ints, check_numbers, document_options, option
from spec_kd.sampling.options import check_truncation
from spec_kd.sampling.response_format import GRAMMAR_HELP, JSON_SCHEMA_HELP, JsonSchema, ResponseFormat
from spec_kd.serving import SERVING_ENGINE_HELP, THRESHOLD_HELP, ServingEngine, find_serving_engine

if TYPE_CHECKING:
    from spec_kd.evaluation.cost import ServingCosts

    Costs = str | list[ServingCosts] | None
else:
    Costs = str  # the form that a command line and a recipe can give

MEASURE, NONE = "measure", "none"
DEFAULT_TEMPERATURES = (0.0, 1.0)
DEFAULT_MAX_NEW_TOKENS = 256


@dataclass(frozen=True)
class Setting:
    """One way of sampling that is measured.

    Args:
        name (`str`): `"greedy"`, `"t1"`, `"t0.7_k20_p0.9"`, `"t1_greedy_draft"`, ...
        temperature (`float`): Sampling temperature of the responses, 0.0 for greedy.
        draft_sampling (`str`): `"stochastic"` or `"greedy"`.
    """

    name: str
    temperature: float
    draft_sampling: str


@document_options
@dataclass(frozen=True)
class EvaluationOptions:
    """What is measured of a draft, and on which responses of the target.

    Raises:
        ValueError: If a value is out of its range, or two options exclude each other.
    """

    serving_engine: str = option(
        SERVING_ENGINE_HELP,
        default="transformers",
    )
    draft_samplings: list[str] | None = option(
        "How the draft is sampled: one or several of `stochastic`, `greedy` and `matching`. The rule of "
        "`serving_engine` by default.",
        default=None,
    )
    temperatures: list[float] | None = option(
        "Temperatures that the target writes at, 0 for greedy. By default 0 and 1, or those of stored responses.",
        default=None,
    )
    top_k: int = option(
        "Number of most likely ids that both models sample from at temperatures above 0; 0 for all ids. Penalties for "
        "repetition depend on the text before a token and are not covered.",
        default=0,
    )
    top_p: float = option(
        "Probability mass of the most likely ids that both models sample from at temperatures above 0; 1.0 for all.",
        default=1.0,
    )
    num_assistant_tokens: int = option("Number of tokens drafted in a round (gamma) for the headline.", default=5)
    gammas: list[int] = option("Numbers of drafted tokens to report.", default_factory=lambda: list(range(1, 17)))
    max_new_tokens: int | None = option(
        "Most tokens of a response. By default 256, or the limit of stored responses.", default=None
    )
    group_by: str | list[str] = option(
        "Columns of the prompts to break the metrics down by, such as `scenario`.", default_factory=list
    )
    costs: Costs = option(
        "Costs of a round, from which the speed-up is predicted: `measure` those of this machine, which needs the "
        "target as a transformers model; `none`; a JSON file with the costs of your engine; in Python also a list of "
        "`ServingCosts`. The report says which costs could not be measured, and why.",
        default=MEASURE,
    )
    batch_sizes: list[int] = option("Batch sizes at which costs are measured.", default_factory=lambda: [1])
    num_assisted_prompts: int = option(
        "Number of prompts on which real assisted generation is run as a cross-check of replay, with its speed. It is "
        "slow, times its rounds on up to six further prompts, and samples the draft: greedy drafts at a temperature "
        "above 0 are not checked.",
        default=0,
    )
    num_shown_prompts: int = option("Number of worst prompts to show token by token.", default=5)
    show_prompt_text: bool = option("Whether to show the text of these prompts beside their completions.", default=True)
    batch_size: int = option("Number of responses that a model reads or writes at a time.", default=8)
    seed: int = option("Sampling seed of the responses.", default=0)
    json_schema: JsonSchema = option(JSON_SCHEMA_HELP, default=None)
    grammar: str | None = option(GRAMMAR_HELP, default=None)

    def __post_init__(self) -> None:
        from spec_kd.acceptance import check_sampling

        find_serving_engine(self.serving_engine)
        if not self.samplings:
            raise ValueError("`draft_samplings` is empty. Give 'stochastic', 'greedy' or both.")
        if self.temperatures is not None:
            check_numbers("temperatures", self.temperatures, minimum=0)
        for sampling in self.samplings:
            check_sampling(1.0, sampling, REPLAY_SAMPLINGS)
        check_truncation(self.top_k, self.top_p)
        minima = {"num_assistant_tokens": 1, "num_assisted_prompts": 0, "num_shown_prompts": 0, "batch_size": 1}
        for name, minimum in {**minima, "seed": None}.items():
            check_int(name, getattr(self, name), minimum)
        check_int("max_new_tokens", self.max_new_tokens, is_optional=True)
        check_ints("gammas", self.gammas)
        check_ints("batch_sizes", self.batch_sizes)
        check_flag("show_prompt_text", self.show_prompt_text)
        self.read_costs()
        if self.response_format is not None:
            self.check_structured_output()
        is_ever_checked = "stochastic" in self.samplings or 0.0 in (self.temperatures or DEFAULT_TEMPERATURES)
        if self.num_assisted_prompts and not is_ever_checked:
            raise ValueError(
                "`num_assisted_prompts` runs assisted generation, which samples the draft where the target samples and "
                "has nothing to say on greedy drafts. Set it to 0, or add 0.0 to `temperatures` or 'stochastic' to "
                "`draft_samplings`."
            )

    @property
    def engine(self) -> ServingEngine:
        """What is known of `serving_engine`."""
        return find_serving_engine(self.serving_engine)

    @property
    def response_format(self) -> ResponseFormat | None:
        """What completions are held to; `None` for free text."""
        return ResponseFormat.of_options(self.json_schema, self.grammar)

    def check_structured_output(self) -> None:
        """Raises `ValueError` for what cannot be measured where completions are held to a format."""
        self.engine.check_structured_output(
            max(self.temperatures or DEFAULT_TEMPERATURES) > 0 and (self.top_k > 0 or self.top_p < 1)
        )
        if self.num_assisted_prompts:
            raise ValueError(
                "`num_assisted_prompts` runs assisted generation, which writes free text. Set it to 0, or leave out "
                "the JSON schema or grammar."
            )

    @property
    def samplings(self) -> tuple[str, ...]:
        """How the draft is sampled: `draft_samplings`, or the rule of the serving engine."""
        if self.draft_samplings is None:
            return (self.engine.draft_sampling,)
        return tuple(self.draft_samplings)

    @property
    def all_gammas(self) -> list[int]:
        """`gammas` and `num_assistant_tokens`, ascending."""
        return sorted({*self.gammas, self.num_assistant_tokens})

    @property
    def columns(self) -> list[str]:
        """`group_by` as a list."""
        return [self.group_by] if isinstance(self.group_by, str) else list(self.group_by)

    def list_settings(self) -> list[Setting]:
        """The settings of the report, in its order; without `temperatures`, those of the default temperatures."""
        return [
            Setting(
                self.name_sampling(temperature) + ("" if sampling == "stochastic" else f"_{sampling}_draft"),
                temperature,
                sampling,
            )
            for temperature in self.temperatures or DEFAULT_TEMPERATURES
            for sampling in (self.samplings if temperature > 0 else ("stochastic",))  # at 0 both are one
        ]

    def name_sampling(self, temperature: float) -> str:
        """Name of the target's sampling: `"greedy"`, `"t0.7"`, `"t0.7_k20_p0.9"`."""
        truncation = (f"_k{self.top_k}" if self.top_k else "") + (f"_p{self.top_p:g}" if self.top_p < 1 else "")
        return name_temperature(temperature) + (truncation if temperature > 0 else "")

    def read_costs(self) -> "list[ServingCosts] | None":
        """The costs that are given, from `costs` or its file; empty for `none`, `None` where they are to be measured.

        Raises:
            ValueError: If `costs` is none of what its text says, or the file holds no costs.
        """
        from spec_kd.evaluation.cost_files import read_costs

        if self.costs is None or self.costs == NONE:
            return []
        if self.costs == MEASURE:
            return None
        if isinstance(self.costs, Sequence) and not isinstance(self.costs, str):
            return list(self.costs)
        if not isinstance(self.costs, str) or not Path(self.costs).is_file():
            raise ValueError(
                f"`costs` is {self.costs!r}, but must be 'measure', 'none', a JSON file with the arguments of "
                "`ServingCosts`, or a list of these."
            )
        return read_costs(self.costs)

    def check_target(self, is_here: bool) -> None:
        """Raises `ValueError` for an option that needs the target as a transformers model in this process.

        Args:
            is_here (`bool`): Whether the target is one.
        """
        for names, is_given in (
            ("`top_k` and `top_p` need", self.top_k > 0 or self.top_p < 1),
            ("`num_assisted_prompts` needs", self.num_assisted_prompts > 0),
        ):
            if is_given and not is_here:
                raise ValueError(
                    f"{names} the target as a transformers model. Leave them at their defaults, or pass one."
                )

    def check_columns(self, columns: Sequence[str]) -> None:
        """Raises `ValueError` for names in `group_by` that are not among the columns of the prompts."""
        if missing := [name for name in self.columns if name not in columns]:
            raise ValueError(f"`group_by` names {missing}, but the prompts have the columns {list(columns)}.")

    def fill_in(self, temperatures: Sequence[float] = (), max_new_tokens: int | None = None) -> "EvaluationOptions":
        """The options with temperatures and limit of stored responses, or the defaults, where none are given."""
        return replace(
            self,
            temperatures=list(self.temperatures or temperatures or DEFAULT_TEMPERATURES),
            max_new_tokens=self.max_new_tokens or max_new_tokens or DEFAULT_MAX_NEW_TOKENS,
        )


@document_options
@dataclass(frozen=True)
class ReplayOptions:
    """How the responses were sampled, and how a draft is.

    Raises:
        ValueError: If a value is out of its range.
    """

    temperature: float = option("Temperature that the responses were sampled at; 0.0 is greedy. It has no default.")
    max_new_tokens: int | None = option(
        "Limit that the responses were written under. [`replay`] needs it.", default=None
    )
    vocab_size: int | None = option("Number of real ids. By default the rows that both heads have.", default=None)
    serving_engine: str = option(
        SERVING_ENGINE_HELP,
        default="transformers",
    )
    draft_sampling: str | None = option(
        "How the draft is sampled: `stochastic` is the lossless rule of the papers and of transformers; `greedy` "
        "drafts the most likely token at any temperature, as most servers do; `matching` drafts a sample, which the "
        "target's own sample has to equal. They are equal at temperature 0. The rule of `serving_engine` by default.",
        default=None,
    )
    top_k: int = option(
        "Number of most likely ids that responses and a stochastic draft are sampled from; 0 for all. Needs a target.",
        default=0,
    )
    top_p: float = option(
        "Probability mass of the most likely ids that responses and a stochastic draft are sampled from; 1.0 for all. "
        "Needs a target.",
        default=1.0,
    )
    assistant_confidence_threshold: float = option(
        THRESHOLD_HELP,
        default=0.0,
    )
    batch_size: int = option("Number of responses that a model reads at a time.", default=8)
    json_schema: JsonSchema = option(JSON_SCHEMA_HELP, default=None)
    grammar: str | None = option(GRAMMAR_HELP, default=None)

    def __post_init__(self) -> None:
        from spec_kd.acceptance import check_sampling

        check_sampling(self.temperature, self.sampling, REPLAY_SAMPLINGS)
        self.engine.check_threshold(self.assistant_confidence_threshold)
        check_truncation(self.top_k, self.top_p)
        check_int("batch_size", self.batch_size)
        check_int("max_new_tokens", self.max_new_tokens, is_optional=True)
        check_int("vocab_size", self.vocab_size, is_optional=True)
        if self.response_format is not None:
            self.check_structured_output()

    @property
    def response_format(self) -> ResponseFormat | None:
        """What completions are held to; `None` for free text."""
        return ResponseFormat.of_options(self.json_schema, self.grammar)

    def check_structured_output(self) -> None:
        """Raises `ValueError` where it is not known what the engine does with a draft under a grammar."""
        self.engine.check_structured_output(self.temperature > 0 and (self.top_k > 0 or self.top_p < 1))

    @property
    def engine(self) -> ServingEngine:
        """What is known of `serving_engine`."""
        return find_serving_engine(self.serving_engine)

    @property
    def counting(self) -> Counting:
        """What the serving engine counts."""
        # Greedy decoding is one rule, the default, however the draft would be sampled
        return self.engine.counting if self.temperature == 0 else self.engine.find_counting(self.sampling)

    @property
    def sampling(self) -> str:
        """`draft_sampling`, or that of the serving engine."""
        return self.engine.draft_sampling if self.draft_sampling is None else self.draft_sampling
