"""The target and the engine that runs it, for every command that asks the target something."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from spec_kd.cli.fingerprints import Fingerprints
from spec_kd.cli.model_checks import check_engine_package, check_loading_options, check_model, naming_model
from spec_kd.cli.rows import check_exists
from spec_kd.open_types import Arguments, JsonObject
from spec_kd.options import document_options, option, suggest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from spec_kd.engines import Engine
    from spec_kd.vocabulary import ProcessingClass

ENGINES = ("transformers", "vllm", "server")
GROUP = "target"


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
        if self.engine not in ENGINES:
            raise ValueError(f"`engine` is {self.engine!r}.{suggest(str(self.engine), ENGINES)}")
        is_server = self.engine == "server"
        if is_server and self.base_url is None:
            raise ValueError("`engine=server` needs `base_url`, such as http://localhost:8000/v1.")
        for name in ("base_url", "served_model_name"):
            if not is_server and getattr(self, name) is not None:
                raise ValueError(f"`{name}` is of a server, but `engine` is {self.engine!r}. Set `engine: server`.")

    @property
    def init_kwargs(self) -> Arguments:
        """The `engine_kwargs` as a dictionary."""
        return dict(cast(Arguments, self.engine_kwargs or {}))

    def check(self) -> None:
        """Checks the target and the engine without weights.

        Raises:
            ValueError: The target is missing, its files are damaged, or the engine does not know an option.
            FileNotFoundError: The target's folder does not exist.
            ImportError: The engine is not installed.
        """
        if self.target is None:
            raise ValueError("`target` is missing: a folder, or a name on the Hub.")
        check_exists("target", self.target)
        check_engine_package(self.engine)
        if self.engine == "server":
            self.load()  # asks the server nothing
            return
        check_model("target", self.target, self.init_kwargs)
        if self.engine == "transformers":
            check_loading_options(self.target, self.init_kwargs)

    def list_inputs(self, fingerprints: Fingerprints) -> JsonObject:
        """What the target's completions depend on; not the address of a server, which may move."""
        return {
            "model": fingerprints.of_model(self.target),
            "engine": self.engine,
            "served_model_name": self.served_model_name,
            "engine_kwargs": self.init_kwargs,
        }

    def load_processing_class(self) -> "ProcessingClass":
        """Loads the target's tokenizer."""
        from spec_kd.loading import load_tokenizer

        name = cast(str, self.target)
        with naming_model("tokenizer of the target", name):
            return load_tokenizer(name, self.init_kwargs if self.engine != "server" else {})

    def load(self) -> "tuple[PreTrainedModel | Engine, ProcessingClass]":
        """Loads the target as [`~spec_kd.generate_responses`] takes it, and its processing class.

        Raises:
            ValueError: The target cannot be loaded, or an option does not fit.
            OSError: The target does not exist or cannot be reached.
            ImportError: The engine is not installed.
        """
        processing_class, target = self.load_processing_class(), cast(str, self.target)
        if self.engine == "server":
            from spec_kd.engines import ServerEngine

            name, base_url = self.served_model_name or target, cast(str, self.base_url)
            try:
                return ServerEngine(name, processing_class, base_url, **self.init_kwargs), processing_class
            except TypeError as error:
                raise ValueError(f"`engine_kwargs` does not fit: {error}") from error
        with naming_model("target", target):
            if self.engine == "vllm":
                from spec_kd.engines import VLLMEngine

                return VLLMEngine(target, **self.init_kwargs), processing_class
            from spec_kd.engines import TransformersEngine

            return TransformersEngine(target, processing_class, init_kwargs=self.init_kwargs), processing_class
