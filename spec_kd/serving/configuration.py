"""Settings of a serving engine, with the command that has them."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class EngineConfiguration:
    """Settings of the serving engine.

    Args:
        title (`str`): What they are for, such as `"greedy decoding, batch size 1"`.
        serving_engine (`str`): The engine.
        num_assistant_tokens (`int`): Tokens drafted in a round.
        flags (`list[str]`): Other settings, in the engine's own form.
        command (`str`): The command or the code with all of them.
        language (`str`): `"bash"` or `"python"`.
    """

    title: str
    serving_engine: str
    num_assistant_tokens: int
    flags: list[str]
    command: str
    language: str
