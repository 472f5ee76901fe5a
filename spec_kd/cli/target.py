"""Who runs the target, for every command that asks it something."""

import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from spec_kd.cli.fingerprints import Fingerprints, check_exists
from spec_kd.cli.model_checks import check_engine_package, check_loading_options, check_model, naming_model
from spec_kd.cli.parsing import read_pairs
from spec_kd.open_types import Arguments, JsonObject
from spec_kd.options import suggest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from spec_kd.engines import Engine
    from spec_kd.vocabulary import ProcessingClass

ENGINES = ("transformers", "vllm", "server")


@dataclass
class TargetArguments:
    r"""
    The target and the engine that runs it.

    Args:
        target (`str`, *optional*): Folder or name on the Hub; with a server its tokenizer is read from there.
        engine (`str`, *optional*, defaults to `"transformers"`): `"transformers"`, `"vllm"` or `"server"`.
        base_url (`str`, *optional*): Of an OpenAI-compatible server.
        served_model_name (`str`, *optional*): Under which the server has the target; `target` by default.
        engine_kwargs (`dict` or `str`, *optional*):
            Of `from_pretrained` (such as `revision`, `dtype`), of `vllm.LLM`, or of [`ServerEngine`] (such as
            `max_concurrency`, `logprobs_mode`).
    """

    _argument_group_name = "target"

    target: str | None = field(
        default=None, metadata={"help": "The target: a folder or a name on the Hub (its tokenizer, with a server)."}
    )
    engine: str = field(
        default="transformers", metadata={"help": "Who runs the target: 'transformers', 'vllm' or 'server'."}
    )
    base_url: str | None = field(
        default=None, metadata={"help": "Of an OpenAI-compatible server, such as http://localhost:8000/v1."}
    )
    served_model_name: str | None = field(
        default=None, metadata={"help": "Name under which the server has the target, if not that of `target`."}
    )
    engine_kwargs: Arguments | str | None = field(
        default=None,
        metadata={"help": "Of `from_pretrained`, `vllm.LLM` or `ServerEngine`, such as dtype=float16 revision=main."},
    )

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise ValueError(f"`engine` is {self.engine!r}.{suggest(str(self.engine), ENGINES)}")
        self.engine_kwargs = read_pairs(self.engine_kwargs, "engine_kwargs", "dtype=float16")
        is_server = self.engine == "server"
        if is_server and self.base_url is None:
            raise ValueError("`engine=server` needs `base_url`, such as http://localhost:8000/v1.")
        for name in ("base_url", "served_model_name"):
            if not is_server and getattr(self, name) is not None:
                raise ValueError(f"`{name}` is of a server, but `engine` is {self.engine!r}. Set `engine: server`.")

    def check(self) -> None:
        """Checks the target and the engine without weights.

        Raises:
            ValueError: For a missing target, one whose files are damaged, or options that the engine does not know.
            FileNotFoundError: For a folder that is not there.
            ImportError: For an engine that is not installed.
        """
        if self.target is None:
            raise ValueError("`target` is missing: a folder, or a name on the Hub.")
        check_exists(self.target)
        check_engine_package(self.engine)
        if self.engine == "server":
            self.load()  # asks the server nothing
            return
        check_model("target", self.target, self.engine_kwargs)
        if self.engine == "transformers":
            check_loading_options(self.target, self.engine_kwargs)

    def list_inputs(self, fingerprints: Fingerprints) -> JsonObject:
        """What answers depend on; not the address of a server, which may move."""
        return {
            "model": fingerprints.of_model(self.target),
            "engine": self.engine,
            "served_model_name": self.served_model_name,
            "engine_kwargs": self.engine_kwargs,
        }

    def load_processing_class(self) -> "ProcessingClass":
        """The target's tokenizer."""
        from spec_kd.loading import load_tokenizer

        with naming_model("tokenizer of the target", self.target):
            return load_tokenizer(self.target, self.engine_kwargs if self.engine != "server" else {})

    def load(self) -> "tuple[PreTrainedModel | Engine, ProcessingClass]":
        """The target as [`~spec_kd.generate_responses`] takes it, and its processing class.

        Raises:
            ValueError, OSError: For what cannot be loaded.
            ImportError: For an engine that is not installed.
        """
        processing_class = self.load_processing_class()
        if self.engine == "server":
            from spec_kd.engines import ServerEngine

            name = self.served_model_name or self.target
            try:
                inspect.signature(ServerEngine).bind(name, processing_class, self.base_url, **self.engine_kwargs)
            except TypeError as error:
                known = [option for option in inspect.signature(ServerEngine).parameters if option != "self"]
                wrong = next((option for option in self.engine_kwargs if option not in known), "")
                raise ValueError(f"`engine_kwargs` does not fit: {error}.{suggest(wrong, known)}") from error
            return ServerEngine(name, processing_class, self.base_url, **self.engine_kwargs), processing_class
        with naming_model("target", self.target):
            if self.engine == "vllm":
                from spec_kd.engines import VLLMEngine

                return VLLMEngine(self.target, **self.engine_kwargs), processing_class
            from spec_kd.engines import TransformersEngine

            return TransformersEngine(self.target, processing_class, init_kwargs=self.engine_kwargs), processing_class
