"""`serving.json`, beside the weights of a draft: how engines serve it, what was checked, and what is expected."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from spec_kd.files import SERVING_FILE, read_json_object, write_text
from spec_kd.open_types import Arguments, JsonObject
from spec_kd.reports.numbers import Interval
from spec_kd.serving import find_serving_engine
from spec_kd.serving.pair import ServingFinding
from spec_kd.version import __version__

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class ServedDraft:
    """A draft in one engine.

    Args:
        source (`str`): Where the engine's rules are stated, with the version that was read.
        drafting (`str`): How the engine drafts and accepts by default.
        command (`str`): Command or Python code that serves the target with the draft, run in the folder of the draft.
        passed (`list[str]`): Names of the checks of [`check_serving`] that found nothing.
        findings (`list[dict]`): What the others found, as fields of [`ServingFinding`].
        expected (`dict[str, dict]`, *optional*):
            What [`EvaluationReport.expect`] says for each way of sampling, where no draft ends early; empty without a
            report for this engine.
    """

    source: str
    drafting: str
    command: str
    passed: list[str]
    findings: list[JsonObject]
    expected: dict[str, JsonObject] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ServingFile:
    """What `serving.json` holds; [`export_draft`] writes it.

    Args:
        draft (`str`), target (`str`): Names of the models, without folders of the machine.
        num_assistant_tokens (`int`): Tokens drafted in a round.
        engines (`dict[str, ServedDraft]`): The draft in each engine that it was exported for.
        files (`dict[str, str]`): SHA-256 of the model's files and GGUF files, by their paths in the folder.
        assistant_confidence_threshold (`float`, *optional*, defaults to `0.0`):
            Probability below which a draft ends, in the commands of engines that have it.
        quantization (`str`, *optional*): Type of the GGUF files; `None` without any.
        spec_kd (`str`, *optional*): Version of the package that wrote it; this one by default.
    """

    draft: str
    target: str
    num_assistant_tokens: int
    engines: dict[str, ServedDraft]
    files: dict[str, str]
    assistant_confidence_threshold: float = 0.0
    quantization: str | None = None
    spec_kd: str = __version__

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Writes `serving.json` into the folder of the draft."""
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=1, ensure_ascii=False, allow_nan=False)
        write_text(Path(folder, SERVING_FILE), text + "\n")

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> "ServingFile":
        """Reads `serving.json` of a draft's folder.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It is damaged, or of a later format.
        """
        path = Path(folder, SERVING_FILE)
        fix = "Export the draft again."
        values = read_json_object(path, fix, ("format",))
        if (number := values.pop("format")) != FORMAT:
            raise ValueError(f"`{path}` has format {number!r}, but this version reads {FORMAT}. Update spec_kd.")
        try:
            engines = {name: ServedDraft(**served) for name, served in values.pop("engines").items()}
            return cls(engines=engines, **values)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"`{path}` is damaged ({type(error).__name__}: {error}). {fix}") from error


def describe_engine(
    name: str,
    command: str,
    findings: Sequence[ServingFinding],
    expected: dict[str, JsonObject] | None = None,
) -> ServedDraft:
    """A draft in the engine of this name, with what [`check_serving`] found for all engines."""
    engine = find_serving_engine(name)
    own = [one for one in findings if one.engine == name]
    failed = {one.check for one in own}
    return ServedDraft(
        source=engine.source,
        drafting=engine.rules[0].words,
        command=command,
        passed=[check.name for check in engine.checks if check.name not in failed],
        findings=[asdict(one) for one in own],
        expected=expected or {},
    )


def read_interval(values: JsonObject) -> Interval:
    """An interval of `serving.json`, where an undefined number is null."""
    return Interval(*(float("nan") if values[name] is None else values[name] for name in Interval._fields))


def describe_serving(serving: ServingFile | None) -> Arguments:
    """The facts of a card that are those of `serving.json`, by name."""
    if serving is None:
        return {"serving_engines": (), "findings": (), "expected": {}, "gguf_files": ()}
    return {
        "target_name": serving.target,
        "num_assistant_tokens": serving.num_assistant_tokens,
        "serving_engines": list(serving.engines),
        "findings": [found for served in serving.engines.values() for found in served.findings],
        "expected": {name: served.expected for name, served in serving.engines.items() if served.expected},
        "gguf_files": [name for name in serving.files if name.endswith(".gguf")],
    }
