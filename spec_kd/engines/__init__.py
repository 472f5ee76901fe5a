"""Who runs the target. Imported when first used: each engine brings a library of its own."""

from importlib import import_module
from typing import TYPE_CHECKING

from spec_kd.engines.base import (
    Completion,
    Engine,
    MissingCompletionsError,
    UnsupportedByEngineError,
)
from spec_kd.sampling.prompt_batch import UnusablePromptError

_HOME = {
    "ServerEngine": "spec_kd.engines.server.engine",
    "ServerRequestError": "spec_kd.engines.server.client",
    "TransformersEngine": "spec_kd.engines.transformers",
    "UnidentifiedTokensError": "spec_kd.engines.server.logprobs",
    "VLLMEngine": "spec_kd.engines.vllm",
}

if TYPE_CHECKING:
    from spec_kd.engines.server.client import ServerRequestError
    from spec_kd.engines.server.engine import ServerEngine
    from spec_kd.engines.server.logprobs import UnidentifiedTokensError
    from spec_kd.engines.transformers import TransformersEngine
    from spec_kd.engines.vllm import VLLMEngine

__all__ = [
    "Completion",
    "Engine",
    "MissingCompletionsError",
    "ServerEngine",
    "ServerRequestError",
    "TransformersEngine",
    "UnidentifiedTokensError",
    "UnsupportedByEngineError",
    "UnusablePromptError",
    "VLLMEngine",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value
