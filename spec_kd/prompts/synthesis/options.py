"""What a synthesis is asked for, and what that means for each of its conversations."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from spec_kd.checks import check_int, check_number
from spec_kd.prompts.tool_catalog import Tool, dump_tools, wrap_tool
from spec_kd.sampling.options import check_truncation

TOOLS_PLACEHOLDER = "{tools}"

Message = dict[str, object]


@dataclass(frozen=True)
class SynthesisOptions:
    """The settings of [`synthesize_queries`] that decide what is asked; described there.

    Raises:
        `ValueError`: A setting out of its range, or settings that do not go together.
    """

    system_prompts: tuple[str, ...]
    keep_system_prompt: bool
    tools: tuple[Tool, ...]
    num_tools: tuple[int, ...]
    num_turns: tuple[int, ...]
    temperature: tuple[float, ...]
    top_p: tuple[float, ...]
    max_new_tokens: int
    max_completion_tokens: int
    chat_template_kwargs: Mapping[str, object] | None
    seed: int

    def __post_init__(self) -> None:
        for name in ("num_tools", "num_turns", "temperature", "top_p"):
            if not getattr(self, name):
                raise ValueError(f"`{name}` is an empty list: give at least one value.")
        for name, values in (
            ("num_tools", self.num_tools),
            ("num_turns", self.num_turns),
            ("max_new_tokens", [self.max_new_tokens]),
            ("max_completion_tokens", [self.max_completion_tokens]),
        ):
            for value in values:
                check_int(name, value)
        for temperature in self.temperature:
            check_number("temperature", temperature, above=0, reason="Greedy queries are all the same.")
        check_int("seed", self.seed, None)
        for top_p in self.top_p:
            check_truncation(0, top_p)
        if self.tools and max(self.num_tools) > len(self.tools):
            raise ValueError(
                f"`num_tools` asks for {max(self.num_tools)} tools, but the catalog has {len(self.tools)}."
            )
        placed = [TOOLS_PLACEHOLDER in prompt for prompt in self.system_prompts]
        if any(placed) and not self.tools:
            raise ValueError("A system prompt has the place `{tools}`, but there is no `tool_catalog` to fill it from.")
        if any(placed) and not self.keep_system_prompt:
            raise ValueError(
                "A system prompt has the place `{tools}`, so it is where the target learns of its tools and belongs to "
                "the prompt: set `keep_system_prompt=True`."
            )

    @property
    def samplings(self) -> list[tuple[float, float]]:
        """The pairs of temperature and top-p that there are."""
        count = math.lcm(len(self.temperature), len(self.top_p))
        return sorted({self._get_sampling(index) for index in range(count)})

    def place_tools(self, system_prompt: str | None, tools: Sequence[Tool]) -> tuple[str | None, list[Tool]]:
        """The system prompt with the tools, where it has the place for them, and the tools that the template shows."""
        if system_prompt is not None and TOOLS_PLACEHOLDER in system_prompt:
            return system_prompt.replace(TOOLS_PLACEHOLDER, dump_tools(tools)), []
        return system_prompt, [wrap_tool(tool) for tool in tools]

    def plan(self, index: int) -> "Conversation":
        """The conversation with this number, before anything is written; the same whenever it is asked for."""
        generator = random.Random(f"{self.seed}:{index}")
        system_prompt = generator.choice(self.system_prompts) if self.system_prompts else None
        tools = generator.sample(self.tools, generator.choice(self.num_tools)) if self.tools else []
        system_prompt, tools = self.place_tools(system_prompt, tools)
        temperature, top_p = self._get_sampling(index)
        return Conversation(
            index=index,
            system_prompt=system_prompt,
            keeps_system_prompt=self.keep_system_prompt,
            tools=tools,
            num_turns=generator.choice(self.num_turns),
            temperature=temperature,
            top_p=top_p,
        )

    def _get_sampling(self, index: int) -> tuple[float, float]:
        return self.temperature[index % len(self.temperature)], self.top_p[index % len(self.top_p)]


@dataclass
class Conversation:
    """A conversation as it is being written.

    Args:
        index (`int`): Its number in the synthesis.
        system_prompt (`str`, *optional*): Under which the user's turns are written, its tools filled in.
        keeps_system_prompt (`bool`): Whether the target also answers under it.
        tools (`list[dict]`): That the chat template shows.
        num_turns (`int`): Of the user.
        temperature (`float`), top_p (`float`): At which the user's turns are sampled.
        turns (`list[dict]`): Messages so far, of user and assistant.
        fault (`str`, *optional*): Why it is dropped.
    """

    index: int
    system_prompt: str | None
    keeps_system_prompt: bool
    tools: list[Tool]
    num_turns: int
    temperature: float
    top_p: float
    turns: list[Message] = field(default_factory=list)
    fault: str | None = None

    @property
    def prompt(self) -> list[Message]:
        """What the target answers: the turns, and the system prompt where it is kept."""
        is_shown = self.system_prompt is not None and self.keeps_system_prompt
        return [*([{"role": "system", "content": self.system_prompt}] if is_shown else []), *self.turns]

    @property
    def is_complete(self) -> bool:
        """Whether the user has had all turns."""
        return sum(turn["role"] == "user" for turn in self.turns) == self.num_turns


def as_tuple(value: object) -> tuple:
    """A list as a tuple, and a single value, text included, as a tuple of one."""
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
