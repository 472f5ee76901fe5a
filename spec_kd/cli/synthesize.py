"""`spec-kd synthesize`: the target writes the queries that it is then asked."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from spec_kd.cli.parsing import Parser
from spec_kd.cli.prompt_sets import PRODUCTS, check_test_fraction, hold_out, save_prompts
from spec_kd.cli.rows import check_exists, load_rows
from spec_kd.cli.steps import Workspace, list_options
from spec_kd.cli.target import GROUP, TargetArguments
from spec_kd.open_types import Arguments, JsonObject

if TYPE_CHECKING:
    from spec_kd.prompts.filters import TextFilter
    from spec_kd.prompts.synthesis.options import SynthesisOptions

DESCRIPTION = (
    "Lets an aligned target write what users might ask it (Magpie, arXiv 2406.08464), filters it, and says what became "
    "of it. A killed job continues."
)
COMMON = ("target", "num_queries", "output_dir", "system_prompts", "languages", "test_fraction", "engine")
CONTINUES = ("num_queries", "max_asked", "test_fraction")


@dataclass
class SynthesizeArguments:
    r"""
    Options of [`~spec_kd.synthesize_queries`].

    Args:
        output_dir (`str`): For `train.arrow`, `test.arrow` and the work.
        test_sets (`list[str]`, *optional*): Prompts that must not be written again: files, folders or Hub names.
        test_fraction (`float`, *optional*, defaults to `0.05`): Share of queries held out for testing.
        min_tokens, max_tokens, max_repetition, languages: As of [`~spec_kd.prompts.filters.TextFilter`].
        others: As of [`~spec_kd.synthesize_queries`]; lists where it takes one value or several.
    """

    _argument_group_name = "queries"

    num_queries: int = field(metadata={"help": "How many queries to keep."})
    output_dir: str = field(metadata={"help": "Folder for train.arrow, test.arrow and the work."})
    test_fraction: float = field(default=0.05, metadata={"help": "Share of the queries held out for testing."})
    system_prompts: list[str] = field(
        default_factory=list, metadata={"help": "System prompts that steer into a domain; one is drawn for each query."}
    )
    keep_system_prompt: bool = field(
        default=False, metadata={"help": "Whether it belongs to the prompt, as one of the deployment does."}
    )
    tool_catalog: str | None = field(
        default=None, metadata={"help": "File with schemas of tools (YAML, JSON or JSON lines) to draw from."}
    )
    num_tools: list[int] = field(
        default_factory=lambda: [3], metadata={"help": "Tools of a query; of several numbers one is drawn."}
    )
    num_turns: list[int] = field(
        default_factory=lambda: [1], metadata={"help": "Turns of the user; of several numbers one is drawn."}
    )
    temperature: list[float] = field(
        default_factory=lambda: [1.0], metadata={"help": "Of the sampling; several are gone through in turn."}
    )
    top_p: list[float] = field(
        default_factory=lambda: [1.0], metadata={"help": "Mass of the most likely ids; goes along with temperature."}
    )
    max_new_tokens: int = field(default=256, metadata={"help": "Most tokens of a query; a longer one is dropped."})
    max_completion_tokens: int = field(default=512, metadata={"help": "Most tokens of an answer between turns."})
    chat_template_kwargs: Arguments | str | None = field(
        default=None, metadata={"help": "Variables of the chat template, such as enable_thinking=false."}
    )
    min_tokens: int = field(default=3, metadata={"help": "Fewest tokens of a query."})
    max_tokens: int | None = field(default=None, metadata={"help": "Most tokens of a query that is kept."})
    max_repetition: float = field(default=0.3, metadata={"help": "Largest share of repeated 4-grams; 1 is off."})
    languages: list[str] | None = field(default=None, metadata={"help": "Codes of the languages to keep, such as en."})
    near_duplicate_threshold: float | None = field(
        default=0.8, metadata={"help": "Similarity from which on queries are the same; none keeps duplicates."}
    )
    test_sets: list[str] | None = field(
        default=None, metadata={"help": "Prompts that must not be written again: files, folders or Hub names."}
    )
    max_asked: int | None = field(default=None, metadata={"help": "Most conversations to begin: ten per query."})
    round_size: int = field(default=256, metadata={"help": "Most conversations to begin at a time."})
    batch_size: int | None = field(default=None, metadata={"help": "Prompts at a time: 8 for transformers."})
    seed: int = field(default=0, metadata={"help": "Of the sampling, and of what is drawn for each query."})

    def __post_init__(self) -> None:
        check_test_fraction(self.test_fraction)

    def build_options(self) -> "SynthesisOptions":
        """What is asked, with the tools that there are.

        Raises:
            ValueError: For an option out of its range, or options that do not fit each other.
            OSError: For a catalog that is not there.
        """
        from spec_kd.prompts.synthesis.options import SynthesisOptions

        if self.tool_catalog is not None:
            check_exists("tool_catalog", self.tool_catalog)
        self.build_filter()
        return SynthesisOptions(**{one.name: getattr(self, one.name) for one in fields(SynthesisOptions)})

    def build_filter(self) -> "TextFilter":
        """Which queries are kept; raises `ValueError` for a limit out of its range."""
        from spec_kd.prompts.filters import TextFilter

        return TextFilter(self.min_tokens, self.max_tokens, self.max_repetition, self.languages)


SynthesizeCall = tuple[SynthesizeArguments, TargetArguments]


def build_parser() -> Parser:
    """The options of the command."""
    return Parser("synthesize", DESCRIPTION, {"synthesis": SynthesizeArguments, GROUP: TargetArguments}, COMMON)


def parse(argv: Sequence[str]) -> SynthesizeCall:
    """The command line."""
    return build_parser().parse(argv)


def run(call: SynthesizeCall) -> JsonObject:
    """The command."""
    return synthesize(*call, Workspace())


def synthesize(arguments: SynthesizeArguments, target: TargetArguments, workspace: Workspace) -> JsonObject:
    """The step: queries of the target in `output_dir`, and their yield."""
    options = check_synthesis(arguments, target)
    sources = [*(arguments.test_sets or ()), *([arguments.tool_catalog] if arguments.tool_catalog else [])]
    for source in sources:
        check_exists("test_sets", source)
    inputs = {
        "target": target.list_inputs(workspace.fingerprints),
        "sources": [workspace.fingerprints.of_data(source) for source in sources],
        "options": list_options(arguments, ("output_dir", "test_sets", "tool_catalog")),
    }

    def work() -> JsonObject:
        from spec_kd.prompts.synthesis.synthesis import synthesize_queries

        model, processing_class = target.load()
        queries = synthesize_queries(
            model,
            options,
            processing_class=processing_class,
            text_filter=arguments.build_filter(),
            test_set=load_conversations(arguments.test_sets or ()) or None,
            output_dir=arguments.output_dir,
        )
        report = queries.report.to_dict()
        if not len(queries.dataset):
            reasons = ", ".join(f"{reason}: {count}" for reason, count in report["dropped"].items() if count)
            raise ValueError(
                f"None of {report['asked']} queries was kept ({reasons}). Look at the filters and the target."
            )
        saved = save_prompts(arguments.output_dir, *hold_out(queries.dataset, arguments.test_fraction, arguments.seed))
        return {**saved, "yield": report}

    return workspace.do(arguments.output_dir, "synthesize", inputs, PRODUCTS, work, CONTINUES)


def check_synthesis(arguments: SynthesizeArguments, target: TargetArguments) -> "SynthesisOptions":
    """The options of a synthesis, checked without weights.

    Raises:
        ValueError: For options out of their range, a chat template that does not show what it is given, or sampling
            that the engine does not do.
        OSError: For what is not there.
        ImportError: For an engine that is not installed.
    """
    from spec_kd.engines.base import check_untruncated
    from spec_kd.prompts.synthesis.synthesis import derive_pre_queries
    from spec_kd.sampling.options import SamplingOptions

    options = arguments.build_options()
    target.check()
    derive_pre_queries(options, target.load_processing_class())
    if target.engine != "transformers":
        for temperature, top_p in options.samplings:
            check_untruncated(SamplingOptions(arguments.max_new_tokens, temperature, top_p=top_p), target.engine)
    return options


def load_conversations(sources: Iterable[str]) -> list[Any]:
    """The prompts of several sets, as lists of messages."""
    from spec_kd.data.arrow_padding import iterate_rows

    sets = [load_rows(source, "test", option="test_sets", allow_empty=True) for source in sources]
    prompts = [row["prompt"] for rows in sets for row in iterate_rows(rows)]
    return [[{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt for prompt in prompts]
