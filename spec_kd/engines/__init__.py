"""Engines, which run the target. Each is imported when it is first used, because it needs a library of its own."""

from typing import TYPE_CHECKING

from spec_kd.engines.base import Completion, Engine, MissingCompletionsError, UnsupportedByEngineError
from spec_kd.lazy_imports import import_lazily
from spec_kd.sampling.prompts import UnusablePromptError

_MODULES = {
    "spec_kd.engines.ray.engine": ("RayEngine",),
    "spec_kd.engines.ray.options": ("RayOptions",),
    "spec_kd.engines.server.client": ("ServerRequestError",),
    "spec_kd.engines.server.connection": ("ServerOptions",),
    "spec_kd.engines.server.engine": ("ServerEngine",),
    "spec_kd.engines.server.logprobs": ("UnidentifiedTokensError",),
    "spec_kd.engines.transformers": ("TransformersEngine",),
    "spec_kd.engines.vllm": ("VLLMEngine",),
}

if TYPE_CHECKING:
    from spec_kd.engines.ray.engine import RayEngine
    from spec_kd.engines.ray.options import RayOptions
    from spec_kd.engines.server.client import ServerRequestError
    from spec_kd.engines.server.connection import ServerOptions
    from spec_kd.engines.server.engine import ServerEngine
    from spec_kd.engines.server.logprobs import UnidentifiedTokensError
    from spec_kd.engines.transformers import TransformersEngine
    from spec_kd.engines.vllm import VLLMEngine

__all__ = [
    "Completion",
    "Engine",
    "MissingCompletionsError",
    "RayEngine",
    "RayOptions",
    "ServerEngine",
    "ServerOptions",
    "ServerRequestError",
    "TransformersEngine",
    "UnidentifiedTokensError",
    "UnsupportedByEngineError",
    "UnusablePromptError",
    "VLLMEngine",
]

__getattr__, __dir__ = import_lazily(__name__, _MODULES)
