"""The options of `synthesize_queries`, and what they mean for each conversation that is written."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from spec_kd.open_types import JsonObject
from spec_kd.options import check_int, check_ints, check_number, document_options, option, refuse
from spec_kd.prompts.deduplication import check_threshold
from spec_kd.prompts.tool_catalog import Tool, dump_tools, load_tool_catalog, wrap_tool
from spec_kd.sampling.options import check_truncation

TOOLS_PLACEHOLDER = "{tools}"
LISTS = ("system_prompts", "num_tools", "num_turns", "temperature", "top_p")
# A folder is continued with another number of queries, and a catalog is the same if its tools are.
NOT_SETTINGS = {"num_queries", "max_asked", "tool_catalog"}
STORED_NAMES = {"max_completion_tokens": "max_answer_tokens"}  # so that folders of earlier versions are continued

Message = dict[str, object]
if TYPE_CHECKING:
    ToolCatalog = str | Path | Sequence[Mapping[str, object]]
else:
    ToolCatalog = str  # a command line names a file; only Python can give the schemas


@document_options
@dataclass(frozen=True)
class SynthesisOptions:
    """Options of [`synthesize_queries`]; where an option takes a list, a single value is a list of one.

    Raises:
        ValueError: An option is out of its range, two options do not fit each other, or the tool catalog cannot be
            read.
        FileNotFoundError: The tool catalog does not exist.
    """

    num_queries: int = option("Number of queries to keep.")
    system_prompts: list[str] = option(
        "System prompts under which the user's turns are written, to steer them into a domain; one is drawn for each "
        "conversation. By default the chat template's own, or none. `{tools}` in one stands for the conversation's "
        "tools as JSON, for targets whose template does not show tools.",
        default_factory=list,
    )
    keep_system_prompt: bool = option(
        "Whether the system prompt belongs to the prompt, as one of the deployment does. One that only steers ('the "
        "user asks about genetics') does not.",
        False,
    )
    tool_catalog: ToolCatalog | None = option(
        "File with the schemas of tools to draw from (YAML, JSON or JSON lines), in Python also the schemas, see "
        "`load_tool_catalog`; no tools by default. Tools are always kept in the prompt.",
        None,
    )
    num_tools: list[int] = option(
        "Number of tools drawn for a conversation; of several numbers one is drawn.", default_factory=lambda: [3]
    )
    num_turns: list[int] = option(
        "Number of turns of the user; of several numbers one is drawn. Between the turns the target writes its "
        "completions, greedily. A conversation with a bad turn is dropped as a whole.",
        default_factory=lambda: [1],
    )
    temperature: list[float] = option(
        "Sampling temperatures of the user's turns; several are used in turn.", default_factory=lambda: [1.0]
    )
    top_p: list[float] = option(
        "Probability mass of the most likely tokens to sample the user's turns from; several are used in turn, along "
        "with the temperatures. A value below 1 needs the transformers engine.",
        default_factory=lambda: [1.0],
    )
    max_new_tokens: int = option("Most tokens of a user's turn; a turn that has not ended by then is dropped.", 256)
    max_completion_tokens: int = option(
        "Most tokens of a completion between two turns; a conversation with a longer one is dropped.", 512
    )
    chat_template_kwargs: dict[str, object] | None = option(
        "Variables of the chat template, such as enable_thinking=false, also kept as a column of the dataset; none by "
        "default.",
        None,
    )
    near_duplicate_threshold: float | None = option(
        "Similarity from which queries count as the same, by what the user says in all turns together, see "
        "`NearDuplicateIndex`. `None` keeps duplicates.",
        0.8,
    )
    max_asked: int | None = option("Most conversations to begin; ten times `num_queries` by default.", None)
    round_size: int = option("Most conversations to begin at a time.", 256)
    batch_size: int | None = option(
        "Number of prompts handed to the engine at a time, as in `generate_responses`; 8 for transformers by default.",
        None,
    )
    seed: int = option("Seed of the sampling, and of what is drawn for each conversation.", 0)

    def __post_init__(self) -> None:
        for name in LISTS:
            object.__setattr__(self, name, _as_list(getattr(self, name)))
        for name in LISTS[1:]:
            if not getattr(self, name):
                raise ValueError(f"`{name}` is an empty list: give at least one value.")
        for name in ("num_queries", "max_new_tokens", "max_completion_tokens", "round_size"):
            check_int(name, getattr(self, name))
        for name in ("num_tools", "num_turns"):
            check_ints(name, getattr(self, name))
        for name in ("max_asked", "batch_size"):
            check_int(name, getattr(self, name), is_optional=True)
        for temperature in self.temperature:
            check_number("temperature", temperature, above=0, reason="Greedy queries are all the same.")
        check_int("seed", self.seed, None)
        check_threshold(self.near_duplicate_threshold, "near_duplicate_threshold", is_optional=True)
        for top_p in self.top_p:
            check_truncation(0, top_p)
        has_place = any(TOOLS_PLACEHOLDER in prompt for prompt in self.system_prompts)
        refuse(
            (
                self.tools and max(self.num_tools) > len(self.tools),
                f"`num_tools` asks for {max(self.num_tools)} tools, but the catalog has {len(self.tools)}.",
            ),
            (
                has_place and not self.tools,
                "A system prompt contains `{tools}`, but there is no `tool_catalog` to fill it from.",
            ),
            (
                has_place and not self.keep_system_prompt,
                "A system prompt contains `{tools}`, so it tells the target its tools and belongs to the prompt: set "
                "`keep_system_prompt=True`.",
            ),
        )

    @cached_property
    def tools(self) -> list[Tool]:
        """The tools of the catalog."""
        return [] if self.tool_catalog is None else load_tool_catalog(self.tool_catalog)

    @property
    def samplings(self) -> list[tuple[float, float]]:
        """The pairs of temperature and top-p that occur."""
        return sorted({self._get_sampling(i) for i in range(math.lcm(len(self.temperature), len(self.top_p)))})

    def describe(self) -> JsonObject:
        """The options on which the conversations depend, without the tools; they are noted in the folder of a run."""
        settings = asdict(self).items()
        return {STORED_NAMES.get(name, name): value for name, value in settings if name not in NOT_SETTINGS}

    def place_tools(self, system_prompt: str | None, tools: Sequence[Tool]) -> tuple[str | None, list[Tool]]:
        """The system prompt with the tools in the place of `{tools}`, and the tools that the template has to show."""
        if system_prompt is not None and TOOLS_PLACEHOLDER in system_prompt:
            return system_prompt.replace(TOOLS_PLACEHOLDER, dump_tools(tools)), []
        return system_prompt, [wrap_tool(tool) for tool in tools]

    def plan(self, index: int) -> "Conversation":
        """The conversation with this number, before anything is written; always the same for the same options."""
        generator = random.Random(f"{self.seed}:{index}")
        system_prompt = generator.choice(self.system_prompts) if self.system_prompts else None
        tools = generator.sample(self.tools, generator.choice(self.num_tools)) if self.tools else []
        system_prompt, tools = self.place_tools(system_prompt, tools)
        return Conversation(
            index=index,
            system_prompt=system_prompt,
            is_system_prompt_kept=self.keep_system_prompt,
            tools=tools,
            num_turns=generator.choice(self.num_turns),
            sampling=self._get_sampling(index),
        )

    def _get_sampling(self, index: int) -> tuple[float, float]:
        return self.temperature[index % len(self.temperature)], self.top_p[index % len(self.top_p)]


@dataclass
class Conversation:
    """A conversation while it is written.

    Args:
        index (`int`): Number of the conversation in the synthesis.
        system_prompt (`str`, *optional*): System prompt of the user's turns, with the tools filled in.
        is_system_prompt_kept (`bool`): Whether the target's completions are written under it as well.
        tools (`list[dict]`): Tools that the chat template shows.
        num_turns (`int`): Number of turns of the user.
        sampling (`tuple[float, float]`): Temperature and top-p of the user's turns.
        turns (`list[dict]`): Messages of user and assistant so far.
        fault (`str`, *optional*): Why the conversation is dropped; `None` as long as it is not.
    """

    index: int
    system_prompt: str | None
    is_system_prompt_kept: bool
    tools: list[Tool]
    num_turns: int
    sampling: tuple[float, float]
    turns: list[Message] = field(default_factory=list)
    fault: str | None = None

    @property
    def prompt(self) -> list[Message]:
        """The prompt of the next completion: the turns, after the system prompt where it is kept."""
        is_shown = self.system_prompt is not None and self.is_system_prompt_kept
        system: list[Message] = [{"role": "system", "content": self.system_prompt}] if is_shown else []
        return [*system, *self.turns]

    @property
    def is_complete(self) -> bool:
        """Whether the user has had all turns."""
        return sum(turn["role"] == "user" for turn in self.turns) == self.num_turns


def _as_list(value: object) -> list[object]:
    """A sequence as a list, a single value (also a text) as a list of one, `None` as an empty list."""
    if value is None:
        return []
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
