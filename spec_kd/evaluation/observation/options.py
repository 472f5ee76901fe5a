"""How a running server is observed: the options of [`~spec_kd.observe_serving`] and of its command."""

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, cast

from spec_kd.open_types import Arguments, JsonObject
from spec_kd.options import check_choice, check_int, check_text, document_options, option, resolve_options
from spec_kd.sampling.options import SamplingOptions
from spec_kd.sampling.response_format import GRAMMAR_HELP, JSON_SCHEMA_HELP, JsonSchema, ResponseFormat
from spec_kd.serving import SERVING_ENGINES, THRESHOLD_HELP, ServingEngine, find_serving_engine
from spec_kd.serving.observer import Observer

if TYPE_CHECKING:
    from spec_kd.engines.server.connection import ServerOptions

OBSERVED_ENGINES = [name for name, engine in SERVING_ENGINES.items() if engine.observer is not None]


@document_options
@dataclass(frozen=True)
class ObservationOptions:
    """What a running server is asked.

    Raises:
        ValueError: If a value is out of its range.
    """

    serving_engine: str = option("Engine of the server: `vllm`, `sglang` or `llama.cpp`.", default="vllm")
    model: str | None = option(
        "Name of the target on the server. By default the first one that the server lists.", default=None
    )
    max_new_tokens: int = option("Maximum number of tokens in a completion, its EOS included.", default=256)
    temperature: float = option("Temperature that the target samples at; 0 is greedy.", default=0.0)
    seed: int = option("Sampling seed, from which each prompt gets its own.", default=0)
    concurrency: int = option(
        "Number of requests at a time. With 1, requests with and without the draft alternate.", default=1
    )
    num_assistant_tokens: int | None = option(
        "Number of tokens drafted in a round, as the server was started. By default what the server tells.",
        default=None,
    )
    assistant_confidence_threshold: float = option(
        THRESHOLD_HELP,
        default=0.0,
    )
    server_kwargs: Arguments | str | None = option(
        "Options of `ServerOptions`, such as timeout=600; the defaults of that class by default, and a timeout of 600.",
        default=None,
    )

    json_schema: JsonSchema = option(JSON_SCHEMA_HELP, default=None)
    grammar: str | None = option(GRAMMAR_HELP, default=None)

    def __post_init__(self) -> None:
        check_choice("serving_engine", self.serving_engine, OBSERVED_ENGINES)
        check_text("model", self.model, is_optional=True)
        check_int("concurrency", self.concurrency)
        check_int("num_assistant_tokens", self.num_assistant_tokens, is_optional=True)
        self.engine.check_threshold(self.assistant_confidence_threshold)
        self.sampling, self.response_format  # noqa: B018  # check their own fields
        if self.server_kwargs and self.server.is_text_only:
            raise ValueError("`is_text_only` gives text without ids, of which nothing can be replayed. Leave it out.")

    @property
    def engine(self) -> ServingEngine:
        """What is known of `serving_engine`."""
        return find_serving_engine(self.serving_engine)

    @property
    def observer(self) -> Observer:
        """How this engine is asked."""
        return cast(Observer, self.engine.observer)

    @property
    def sampling(self) -> SamplingOptions:
        """How the target samples."""
        return SamplingOptions(max_new_tokens=self.max_new_tokens, temperature=self.temperature, seed=self.seed)

    @property
    def response_format(self) -> ResponseFormat | None:
        """What completions are held to; `None` for free text."""
        return ResponseFormat.of_options(self.json_schema, self.grammar)

    @property
    def server(self) -> "ServerOptions":
        """How the server is asked."""
        from spec_kd.engines.server.connection import ServerOptions

        given = {"timeout": 600.0, **cast(Arguments, self.server_kwargs or {})}
        return replace(resolve_options(ServerOptions, None, given), max_concurrency=self.concurrency)

    def list_values(self) -> JsonObject:
        """What the metrics depend on, beside the server and what it is sent, as JSON values."""
        # The engine describes what it sends of the first three, and formats are those of the rows
        left_out = (
            "model",
            "num_assistant_tokens",
            "assistant_confidence_threshold",
            "server_kwargs",
            "json_schema",
            "grammar",
        )
        values = {name: value for name, value in asdict(self).items() if name not in left_out}
        return {**values, "temperature": float(self.temperature)}
