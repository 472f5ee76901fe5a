"""What is known of an engine that serves a draft: all that evaluation, cards and commands read of it."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class ServingEngine:
    """An engine that serves a target with a standalone draft.

    Args:
        name (`str`): The engine.
        draft_sampling (`str`):
            What the draft proposes where the target samples: `"stochastic"`, a sample, or `"greedy"`, its most likely
            token; see [`~spec_kd.evaluation.response_replay`]. With greedy decoding all engines accept the same tokens.
        rule (`str`): How a drafted token is proposed and accepted, in words.
        source (`str`): Where the rule is stated, with the version that was read.
        vocabulary (`str`): What the engine asks of the draft's vocabulary, in words.
        counters (`str`): Where the engine shows how many drafted tokens it accepted, in words.
        default_num_draft_tokens (`int`, *optional*): Tokens drafted in a round by default; `None` if it must be given.
        command_language (`str`): `"bash"` or `"python"`.
        write_command (`Callable`):
            Writes the command from the draft's and the target's folder or Hub id and the number of drafted tokens.
    """

    name: str
    draft_sampling: str
    rule: str
    source: str
    vocabulary: str
    counters: str
    default_num_draft_tokens: int | None
    command_language: str
    write_command: Callable[[str, str, int], str]
