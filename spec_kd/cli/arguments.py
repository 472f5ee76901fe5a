"""What the commands read: one dataclass of options for each of their groups that no function of the package has."""

from dataclasses import dataclass
from typing import cast

from trl import ModelConfig

from spec_kd.open_types import Arguments
from spec_kd.options import check_int, check_number, check_text, document_options, option, refuse, suggest
from spec_kd.serving import SERVING_ENGINES, find_serving_engine

ENGINES = ("transformers", "vllm", "server")
SCENARIOS = {
    "historical": "logs of what users asked the target",
    "curated": "questions of a dataset",
    "synthetic": "prompts that the target writes itself",
}


@document_options
@dataclass(frozen=True)
class InitArguments:
    """The models and the prompts of a recipe, and where to write it."""

    target: str = option("Target: a folder or a name on the Hub.")
    draft: str | None = option(
        "Draft: a folder or a name on the Hub. By default the recipe plans a shape and makes one.", default=None
    )
    prompts: str | None = option(
        "Logs (files, globs or folders), or a dataset of prompts; by default the target writes the prompts.",
        default=None,
        takes_address=True,
    )
    scenario: str | None = option(
        "Origin of the prompts: 'historical', 'curated' or 'synthetic'; by default 'historical' with `prompts`, "
        "'synthetic' without.",
        default=None,
    )
    serving_engine: str = option(
        f"Engine that will serve the draft: {', '.join(SERVING_ENGINES)}.", default="transformers"
    )
    output: str = option("File for the recipe. An existing file is not overwritten.", default="recipe.yaml")

    def __post_init__(self) -> None:
        find_serving_engine(self.serving_engine)
        if self.scenario is not None and self.scenario not in SCENARIOS:
            raise ValueError(f"`scenario` is {self.scenario!r}.{suggest(self.scenario, SCENARIOS)}")
        if (self.find_scenario() == "synthetic") != (self.prompts is None):
            raise ValueError(
                f"`scenario={self.scenario}` reads {SCENARIOS[self.find_scenario()]}. "
                + ("Give `--prompts`." if self.prompts is None else "Leave `--prompts` out.")
            )

    def find_scenario(self) -> str:
        """The scenario that is given, or the one that goes with the prompts."""
        return self.scenario or ("synthetic" if self.prompts is None else "historical")


@document_options
@dataclass(frozen=True)
class RunArguments:
    """The recipe to run."""

    recipe: str = option("Recipe, a YAML file; also as the first argument, without `--recipe`.")
    only_check: bool = option("Check the recipe, its files and its models, and do nothing else.", default=False)
    quick: bool = option(
        "Run with the small budgets of the recipe's section `quick`, in a folder of their own.", default=False
    )


@document_options
@dataclass(frozen=True)
class InitDraftFiles:
    """What `spec-kd init-draft` reads and writes."""

    target: str = option("Target: a folder or a name on the Hub.")
    output_dir: str = option("Folder for the draft.")
    donor: str | None = option(
        "Model that the draft is made from: a folder or a name on the Hub; the target by default.", default=None
    )
    responses: str | None = option(
        "Responses of the target, the sample text that decides which layers, heads and directions are kept; none by "
        "default.",
        default=None,
        takes_address=True,
    )
    temperature: float = option("Temperature that the responses were sampled at; 0 is greedy.", default=0.0)
    costs: str | None = option(
        "JSON file with costs of a draft of this shape, for the cost of its step in the result; none by default.",
        default=None,
    )

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, 0)


@document_options
@dataclass(frozen=True)
class PlanDraftFiles:
    """What `spec-kd plan-draft` reads and writes."""

    target: str = option("Target: a folder or a name on the Hub.")
    output_dir: str = option("Folder for the plan, where a stopped measurement continues.")
    responses: str | None = option(
        "Responses of the target, which `run_minutes` needs: a file, a folder, an address or a name on the Hub; none "
        "by default.",
        default=None,
        takes_address=True,
    )
    costs: str | None = option(
        "JSON file with the costs of each shape, in the order of the shapes, as `spec-kd measure-costs` writes them; "
        "by default costs are measured.",
        default=None,
    )


@document_options
@dataclass(frozen=True)
class ConvertArguments:
    """What to convert."""

    path: str = option("YAML file or folder of an earlier version; also as the first argument, without `--path`.")


@document_options
@dataclass(frozen=True)
class TargetArguments:
    """The target and the engine that runs it."""

    target: str | None = option(
        "Target: a folder or a name on the Hub; no default. With a server only its tokenizer is read from there.",
        default=None,
    )
    engine: str = option("Engine that runs the target: 'transformers', 'vllm' or 'server'.", default="transformers")
    base_url: str | None = option(
        "Address of an OpenAI-compatible server, such as http://localhost:8000/v1; no default, and required "
        "with engine=server.",
        default=None,
    )
    served_model_name: str | None = option(
        "Name under which the server has the target; by default the one of `target`.", default=None
    )
    engine_kwargs: Arguments | str | None = option(
        "Arguments of `from_pretrained`, `vllm.LLM` or `ServerEngine`, such as dtype=float16 revision=main; none by "
        "default.",
        default=None,
    )

    def __post_init__(self) -> None:
        is_server = self.engine == "server"
        refuse(
            (self.engine not in ENGINES, f"`engine` is {self.engine!r}.{suggest(str(self.engine), ENGINES)}"),
            (
                is_server and self.base_url is None,
                "`engine=server` needs `base_url`, such as http://localhost:8000/v1.",
            ),
            *(
                (
                    not is_server and getattr(self, name) is not None,
                    f"`{name}` is of a server, but `engine` is {self.engine!r}. Set `engine: server`.",
                )
                for name in ("base_url", "served_model_name")
            ),
        )

    @property
    def init_kwargs(self) -> Arguments:
        """The `engine_kwargs` as a dictionary."""
        return dict(cast(Arguments, self.engine_kwargs or {}))


@document_options
@dataclass(frozen=True)
class LogFiles:
    """What `spec-kd prompts logs` reads and writes."""

    paths: list[str] = option(
        "Logs: files, globs and folders, or addresses of them.", aliases=("--logs",), takes_address=True
    )
    output_dir: str = option("Folder or address for train.arrow, test.arrow and a report.", takes_address=True)
    tokenizer: str | None = option(
        "Target, whose chat template must accept every prompt and whose tokens are counted. By default prompts are not "
        "rendered.",
        None,
    )


@dataclass(frozen=True, kw_only=True)
class PromptSetFiles:
    """The folder of a prompt set, and the share of its test prompts."""

    output_dir: str = option("Folder or address for train.arrow and test.arrow.", takes_address=True)
    test_fraction: float = option("Share of the prompts held out for testing, chosen by their text and `seed`.", 0.05)

    def __post_init__(self) -> None:
        check_number("test_fraction", self.test_fraction, 0, below=1)


@document_options
@dataclass(frozen=True, kw_only=True)
class CuratedFiles(PromptSetFiles):
    """What `spec-kd prompts curated` reads and writes."""

    dataset: str = option("Dataset: a file, a folder, an address or a name on the Hub.", takes_address=True)
    test_split: str | None = option(
        "Split of the dataset for the test prompts; by default `test_fraction` of `split` is held out.", None
    )


@document_options
@dataclass(frozen=True, kw_only=True)
class SynthesisFiles(PromptSetFiles):
    """What `spec-kd synthesize` reads and writes."""

    test_sets: list[str] | None = option(
        "Prompts that must not be written again: files, folders, addresses or names on the Hub; none by default.",
        None,
        takes_address=True,
    )


@document_options
@dataclass(frozen=True)
class MixFiles:
    """What `spec-kd prompts mix` reads and writes."""

    parts: dict[str, str] = option(
        "Prompt sets, each the folder or address that another command for prompts wrote to, with a name.",
        takes_address=True,
    )
    output_dir: str = option("Folder or address for train.arrow, test.arrow and a report of them.", takes_address=True)
    tokenizer: str | None = option(
        "Target, whose tokens the report counts. By default the report has no numbers of tokens.", None
    )


@document_options
@dataclass(frozen=True)
class ResponseFiles:
    """What `spec-kd respond` reads and writes."""

    prompts: str = option(
        "Prompt set: a file, a folder, an address or a name on the Hub, with the column `prompt`.", takes_address=True
    )
    output_dir: str = option("Folder or address for the responses, where a stopped job continues.", takes_address=True)
    split: str = option("Split of the prompts, for a folder or a name on the Hub.", "train")
    num_prompts: int | None = option("Number of prompts to complete, the first ones; all by default.", None)

    def __post_init__(self) -> None:
        check_int("num_prompts", self.num_prompts, is_optional=True)


@document_options
@dataclass(frozen=True)
class CorpusFiles:
    """What `spec-kd score` reads and writes."""

    corpus: str = option(
        "Text that the target did not write: rows of text, conversations, or prompts with completions. A file, a "
        "folder, an address or a name on the Hub.",
        takes_address=True,
    )
    output_dir: str = option(
        "Folder or address for the scored rows, where a stopped job continues.", takes_address=True
    )
    split: str = option("Split of the corpus, for a folder or a name on the Hub.", "train")
    num_rows: int | None = option("Number of rows of the corpus to read, the first ones; all by default.", None)
    max_length: int | None = option("Maximum number of tokens of a scored row; longer text becomes several.", 1024)
    text_field: str = option("Column of plain text.", "text")

    def __post_init__(self) -> None:
        check_int("num_rows", self.num_rows, is_optional=True)
        check_int("max_length", self.max_length, 2, is_optional=True)
        check_text("text_field", self.text_field)


@document_options
@dataclass(frozen=True)
class TrainArguments:
    """What a training reads besides the trainer's own arguments."""

    responses: str = option(
        "Rows to learn from: what `spec-kd respond` wrote, or any of TRL's formats with the target's completions; for "
        "online_gkd with lmbda=1 prompts alone. A file, a folder, an address or a name on the Hub.",
        takes_address=True,
    )
    target: str | None = option(
        "Target, whose tokenizer the draft reads when it serves. Its weights are loaded if the responses have no "
        "teacher signal, and for online_gkd. By default the draft's tokenizer is used.",
        None,
    )
    split: str = option("Split of the responses, for a folder or a name on the Hub.", "train")
    num_held_out: int = option(
        "Number of rows for evaluation during training, at most 5 percent of all; used with an eval_strategy. "
        "Acceptance is measured on them too if the target's probabilities are known.",
        64,
    )
    eval_num_assistant_tokens: int = option("Number of tokens drafted in a round, for that acceptance.", 5)

    def __post_init__(self) -> None:
        check_int("num_held_out", self.num_held_out)
        check_int("eval_num_assistant_tokens", self.eval_num_assistant_tokens)


@dataclass
class DraftArguments(ModelConfig):
    """TRL's arguments of the model that is trained."""

    model_name_or_path: str | None = option(
        "Draft: a folder or a name on the Hub; required.", None, aliases=("--draft",)
    )


@document_options
@dataclass(frozen=True)
class EvaluationFiles:
    """What `spec-kd evaluate` reads and writes."""

    drafts: dict[str, str] = option(
        "Drafts as NAME=PATH, or as PATH, whose last folder is then the name. The first of several is the baseline.",
        aliases=("--draft",),
    )
    prompts: str = option(
        "Test prompts: a file, a folder, an address or a name on the Hub, with the column `prompt`.", takes_address=True
    )
    output_dir: str = option("Folder or address for the report.", takes_address=True)
    split: str = option("Split of the prompts, for a folder or a name on the Hub.", "test")
    num_prompts: int | None = option("Number of prompts to measure on, the first ones; all by default.", None)
    responses_dir: str | None = option(
        "Folder or address for the target's responses, which evaluations of other drafts can share; by default "
        "`output_dir/responses`.",
        None,
        takes_address=True,
    )
    fail_under: dict[str, float] | None = option(
        "Thresholds such as block_efficiency=2.5 alpha_t1=0.6. The exit status is 3 if a metric of the last draft lies "
        "below one; no thresholds by default.",
        None,
    )

    def __post_init__(self) -> None:
        check_int("num_prompts", self.num_prompts, is_optional=True)

    @property
    def gates(self) -> list[str]:
        """The thresholds as [`~spec_kd.check_gates`] takes them."""
        return [f"{name}={threshold}" for name, threshold in (self.fail_under or {}).items()]
