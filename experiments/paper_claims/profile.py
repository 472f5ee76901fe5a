"""A profile: everything that an experiment depends on, read from one YAML file."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from examples.made_up.language_model_training import Budget
from examples.made_up.models import ModelSize

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Role:
    """Which conversations play historical queries; the others of the domain play curated data.

    Args:
        pattern (`str`, *optional*): Regular expression that the last user message begins with.
        min_user_turns, max_user_turns (`int`): How many user messages there are.
    """

    pattern: str | None = None
    min_user_turns: int = 1
    max_user_turns: int | None = None

    def covers(self, prompt: list[dict]) -> bool:
        """Whether a conversation plays a historical query."""
        users = [message["content"] for message in prompt if message["role"] == "user"]
        return (
            self.min_user_turns <= len(users) <= (self.max_user_turns or len(users))
            and (self.pattern is None or re.match(self.pattern, users[-1]) is not None)
        )  # fmt: skip


@dataclass(frozen=True)
class Names:
    """Models that exist already, by path or Hub name.

    Args:
        generic_target, domain_target (`str`): The target before and after it was specialized.
        drafts (`dict[str, str]`): Generic drafts of the same tokenizer; `default` is the one of most cells.
    """

    generic_target: str
    domain_target: str
    drafts: dict[str, str]


@dataclass(frozen=True)
class Domain:
    """A domain.

    Args:
        historical (`Role`): Which of its conversations play historical queries.
        synthesis (`dict`): Options of `synthesize_queries`, `text_filter` as those of `TextFilter`; `tools_pattern`
            finds the tools in system prompts of the target's training data.
        num_synthetic (`int`): Queries that the target writes.
        models (`Names`, *optional*): Models of this domain, where none are built.
    """

    historical: Role
    num_synthetic: int
    synthesis: dict[str, Any] = field(default_factory=dict)
    models: Names | None = None


@dataclass(frozen=True)
class Build:
    """Small Llamas made on the spot.

    Args:
        vocab_size (`int`): Ids of the tokenizer that all share.
        max_length (`int`): Longest training row in ids; longer ones are left out and counted.
        target (`ModelSize`), drafts (`dict[str, ModelSize]`): Shapes; `default` is the draft of most cells.
        generic_target, domain_target, generic_draft (`Budget`): How long each is trained.
        general_share (`float`): Share of general rows in the domain targets' data.
        num_held_out (`int`): Test rows of each curve.
        seed (`int`): Of weights and order.
    """

    vocab_size: int
    max_length: int
    target: ModelSize
    drafts: dict[str, ModelSize]
    generic_target: Budget
    domain_target: Budget
    generic_draft: Budget
    general_share: float
    num_held_out: int
    seed: int = 0


@dataclass(frozen=True)
class Data:
    """Which conversations are used for what.

    Args:
        folder (`str`): With a folder of every domain and one named by `general`, each with train.jsonl and test.jsonl.
        share_for_target (`float`): Share of the conversations that targets are trained on; the rest asks questions.
        max_prompt_tokens, max_new_tokens (`int`): Longest prompt and answer.
        validation_fraction (`float`): Share of the historical queries held out for the search.
        num_validation, num_test (`int`): Prompts of either split at most.
        max_queries (`int`): Historical and curated queries at most, drawn at random; all of them are answered.
        general (`str`): Folder of the general conversations.
    """

    folder: str
    share_for_target: float
    max_prompt_tokens: int
    max_new_tokens: int
    validation_fraction: float
    num_validation: int
    num_test: int
    max_queries: int
    general: str = "general"


@dataclass(frozen=True)
class Training:
    """How cells are trained and measured.

    Args:
        steps (`int`): Optimizer steps of every cell with an equal number of steps.
        probe_steps (`int`): Steps that tell a cell's speed where wall-clock is to be equal; the first does not count.
        options (`dict`): Of the trainers' configuration.
        learning_rates (`dict[str, float]`): Of domains whose best is not that of `options`.
        online (`dict[str, dict]`): Options of `OnlineGKDConfig` by the method's name.
        signals (`dict[str, dict]`): `method`, `num_draws` and `top_k` of a `SignalSpec` by name, for cached teachers.
        adapters (`dict[str, dict]`): `peft` (options of `LoraConfig`) and a `learning_rate`, by name.
        num_assistant_tokens (`int`): gamma of the tables.
        num_timed_prompts (`int`): Prompts of real assisted generation, which the measured speed-up is of.
        gammas (`list[int]`): Numbers of drafted tokens that the best is chosen from.
        batch_size (`int`): Prompts answered or scored at a time.
        dtype (`str`): Of the targets.
        length_ordered (`list[str]`): Domains whose batches have rows of similar length; see `order_by_length`.
    """

    steps: int
    probe_steps: int
    options: dict[str, Any]
    online: dict[str, dict[str, Any]]
    signals: dict[str, dict[str, Any]]
    adapters: dict[str, dict[str, Any]]
    num_assistant_tokens: int
    num_timed_prompts: int
    gammas: list[int]
    batch_size: int
    dtype: str = "float32"
    learning_rates: dict[str, float] = field(default_factory=dict)
    length_ordered: list[str] = field(default_factory=list)

    def find_options(self, domain: str, method: str, changes: dict[str, Any]) -> dict[str, Any]:
        """Of a method's trainer: those of all, then the domain's learning rate, the online options, then `changes`."""
        rates = {"learning_rate": self.learning_rates[domain]} if domain in self.learning_rates else {}
        return {**self.options, **rates, **self.online.get(method, {}), **changes}


@dataclass(frozen=True)
class Plan:
    """Which cells there are.

    Args:
        seeds (`list[int]`): Of the headline and of the recipe's test.
        ablation_domain (`str`), ablation_seeds (`list[int]`): Of everything else.
        num_prompts (`int`): Historical queries of most cells.
        sizes (`list[int]`): Data sizes of the headline, smallest first.
        scenario_prompts (`int`): Queries of each scenario where they are compared.
        synthetic_sizes (`list[int]`): Data sizes of synthetic queries, in one domain.
        headline_online, more_online (`list[str]`): Methods of `Training.online`, in all domains and in one.
        learning_rates (`dict[str, list[float]]`): That every headline method tries on validation prompts, by domain.
        divergences, token_selections (`list[str]`): Compared with forward KL over all tokens.
        mixes (`dict[str, dict[str, float]]`): Weights of scenarios by name of the mix.
        search (`dict[str, list[dict]]`): For each axis, changes of the base cell to try; see `recipe_search`.
    """

    seeds: list[int]
    ablation_domain: str
    ablation_seeds: list[int]
    num_prompts: int
    sizes: list[int]
    scenario_prompts: int
    synthetic_sizes: list[int]
    headline_online: list[str]
    more_online: list[str]
    learning_rates: dict[str, list[float]]
    divergences: list[str]
    token_selections: list[str]
    mixes: dict[str, dict[str, float]]
    search: dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Estimates:
    """What the plan is estimated from before anything was measured.

    Args:
        prompt_tokens, completion_tokens (`dict[str, int]`): Means by domain.
        draft_training, target_training, target_reading, draft_writing, target_writing, serving (`float`): Tokens a
            second; `serving` is speculative decoding.
        evaluation_minutes (`float`): Of a cell.
        synthesis_yield (`float`): Share of the written queries that is kept.
    """

    prompt_tokens: dict[str, int]
    completion_tokens: dict[str, int]
    draft_training: float
    target_training: float
    target_reading: float
    draft_writing: float
    target_writing: float
    serving: float
    evaluation_minutes: float
    synthesis_yield: float


@dataclass(frozen=True)
class Profile:
    """A whole experiment.

    Args:
        name (`str`): Of the folders of its work and results.
        domains (`dict[str, Domain]`): By name of their folder.
        build (`Build`, *optional*): Where models are made; else every domain names its own.
    """

    name: str
    data: Data
    domains: dict[str, Domain]
    training: Training
    plan: Plan
    estimates: Estimates
    build: Build | None = None

    def __post_init__(self):
        for name, domain in self.domains.items():
            if (self.build is None) == (domain.models is None):
                raise ValueError(f"`{name}` needs either `models` of its own or the profile's `build`, one of both.")
        plan, online = self.plan, self.training.online
        if plan.ablation_domain not in self.domains:
            raise ValueError(
                f"`ablation_domain` is {plan.ablation_domain!r}, but the domains are {list(self.domains)}."
            )
        if self.training.probe_steps < 2:
            raise ValueError(
                f"`probe_steps` is {self.training.probe_steps}, but the first does not count: give 2 or more."
            )
        unknown = sorted({*plan.learning_rates, *self.training.learning_rates} - set(self.domains))
        if unknown:
            raise ValueError(f"`learning_rates` are of the domains {unknown}, but there are {list(self.domains)}.")
        unknown = sorted({*plan.headline_online, *plan.more_online} - set(online))
        if unknown:
            raise ValueError(f"`plan` has the online methods {unknown}, but `training.online` has {sorted(online)}.")


def read_profile(name: str, data_dir: str | None = None) -> Profile:
    """The profile of a file, or `"cpu"` or `"gpu"`.

    Args:
        name (`str`): Name of a profile beside this file, or a path.
        data_dir (`str`, *optional*): In place of the profile's `data.folder`.

    Raises:
        `FileNotFoundError`: No such profile.
        `ValueError`: An option that is missing or not known, named with its place in the file.
    """
    path = FOLDER / f"{name}.yaml" if "/" not in name and not name.endswith(".yaml") else Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"There is no profile {path}. Give `cpu`, `gpu` or the path of a YAML file.")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if data_dir is not None:
        content["data"]["folder"] = data_dir
    return make(Profile, content, path.name)


def make(wanted: Any, value: Any, place: str) -> Any:
    """`value` of a YAML file as the annotated type `wanted`; raises `ValueError` with `place` for unknown options."""
    options = [arg for arg in get_args(wanted) if is_dataclass(arg)]
    if is_dataclass(wanted) or (options and get_origin(wanted) is not dict):
        if value is None and options:
            return None
        return _make_dataclass(wanted if is_dataclass(wanted) else options[0], value, place)
    if get_origin(wanted) is dict and options:
        return {name: make(options[0], entry, f"{place}: {name}") for name, entry in value.items()}
    if wanted is float and isinstance(value, str):  # YAML reads 1e-3 as text
        return float(value)
    return value


def _make_dataclass(wanted: type, value: Any, place: str) -> Any:
    if not isinstance(value, Mapping):
        raise ValueError(f"{place} is {value!r}, but must be options of {wanted.__name__}.")
    hints = get_type_hints(wanted)
    unknown = sorted(set(value) - {field.name for field in fields(wanted)})
    if unknown:
        raise ValueError(f"{place} has the unknown options {unknown}; known are {sorted(hints)}.")
    try:
        return wanted(**{name: make(hints[name], entry, f"{place}: {name}") for name, entry in value.items()})
    except TypeError as error:  # an option without a default is missing
        raise ValueError(f"{place}: {error}") from error
