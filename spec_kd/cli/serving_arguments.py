"""What the commands around a serving engine read: check-serving, export, measure-costs and observe."""

from dataclasses import dataclass

from spec_kd.evaluation.server_options import DEFAULT_ROUND_GAMMAS
from spec_kd.options import check_int, check_ints, check_text, document_options, option
from spec_kd.serving import SERVING_ENGINES, find_serving_engine
from spec_kd.serving.engine import check_acceptance_rates


@document_options
@dataclass(frozen=True)
class CheckServingArguments:
    """What is checked for which engines."""

    draft: str = option("Draft: a folder or a name on the Hub.")
    target: str = option("Target: a folder or a name on the Hub.")
    serving_engine: list[str] = option(
        f"Engines that will serve the draft: {', '.join(SERVING_ENGINES)}.", default_factory=lambda: ["vllm"]
    )
    tensor_parallel_size: int = option("Cards that share each layer.", 1)
    max_length: int | None = option(
        "Tokens of the longest sequence, prompt and completion; by default all that the target can read.", None
    )
    num_assistant_tokens: int | None = option("Tokens drafted in a round; by default not considered.", None)

    def __post_init__(self) -> None:
        for engine in self.serving_engine:
            find_serving_engine(engine)
        check_int("tensor_parallel_size", self.tensor_parallel_size)
        check_int("max_length", self.max_length, is_optional=True)
        check_int("num_assistant_tokens", self.num_assistant_tokens, is_optional=True)


@document_options
@dataclass(frozen=True)
class ExportFiles:
    """What `spec-kd export` reads and writes."""

    draft: str = option("Trained draft: a folder. An adapter's base model is loaded from where it was trained from.")
    output_dir: str = option("Folder for the draft as servers load it; it may be the folder of `draft`.")
    target: str | None = option(
        "Target that it is served with: a folder or a name on the Hub; none by default, and required with "
        "`serving_engines`.",
        None,
    )
    report: str | None = option(
        "Report of `spec-kd evaluate` for one of the engines, whose acceptance `serving.json` then states; none by "
        "default.",
        None,
        takes_address=True,
    )

    def __post_init__(self) -> None:
        if self.report is not None and self.target is None:
            raise ValueError("`report` is for `serving.json`, which needs `target` and `serving_engines`. Give them.")


@document_options
@dataclass(frozen=True)
class ServerCostFiles:
    """What `spec-kd measure-costs` times and writes."""

    draft: str = option("Draft: a GGUF file.")
    target: str = option("Target: a GGUF file.")
    output_dir: str = option("Folder for costs.json, the timings and the server's logs.")
    gammas: list[int] = option("Numbers of drafted tokens to time.", default_factory=lambda: list(DEFAULT_ROUND_GAMMAS))
    acceptance_rates: list[float] | None = option(
        "Shares of the rounds in which drafted token 1, 2, ... is accepted, as a report has them. The server's speed "
        "at these is measured, and written to speed.json. By default costs are measured.",
        default=None,
    )

    def __post_init__(self) -> None:
        check_ints("gammas", self.gammas)
        if self.acceptance_rates is not None:
            check_acceptance_rates(self.acceptance_rates)


@document_options
@dataclass(frozen=True)
class ObservationFiles:
    """What `spec-kd observe` asks, reads and writes."""

    url: str = option("Address of the server with the draft, such as http://localhost:8000.")
    target: str = option("Target: a folder or a name on the Hub. Its tokenizer is read from there.")
    prompts: str = option(
        "Test prompts: a file, a folder, an address or a name on the Hub, with the column `prompt`.", takes_address=True
    )
    output_dir: str = option("Folder for the answers and the report; one for each server.")
    plain_url: str | None = option(
        "Address of a server with the same target and no draft, for the speed-up; none by default.", None
    )
    draft: str | None = option(
        "Draft that the server has: a folder or a name on the Hub, for what replay predicts; no prediction by default.",
        None,
    )
    report: str | None = option(
        "Report of `spec-kd evaluate` to add the observation to; none by default.", None, takes_address=True
    )
    responses: str | None = option(
        "Own responses to the same prompts, for how much of a difference comes from other tokens; none by default.",
        None,
        takes_address=True,
    )
    costs: str | None = option(
        "Costs of a round in this engine for the predicted speed-up, such as costs.json of `spec-kd measure-costs`; "
        "none by default.",
        None,
    )
    split: str = option("Split of the prompts, for a folder or a name on the Hub.", "test")
    num_prompts: int | None = option("Number of prompts to ask, the first ones; all by default.", None)

    def __post_init__(self) -> None:
        check_text("url", self.url)
        check_int("num_prompts", self.num_prompts, is_optional=True)
        for name in ("responses", "costs"):
            if self.draft is None and getattr(self, name) is not None:
                raise ValueError(
                    f"`{name}` is for a comparison with replay, which needs `draft`. Give it, or leave it out."
                )
