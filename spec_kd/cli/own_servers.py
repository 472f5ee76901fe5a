"""Two `llama-server` of a recipe's own, with the draft and without it, for as long as they are observed."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from spec_kd.cli.fingerprints import Fingerprints
from spec_kd.open_types import Arguments, JsonObject
from spec_kd.options import check_int, document_options, option
from spec_kd.serving.llama_cpp import LLAMA_CPP
from spec_kd.serving.llama_server import run_llama_server


@document_options
@dataclass(frozen=True)
class OwnServerOptions:
    """How the servers of `observe` are started where it has no `url`."""

    server: str | None = option(
        "Program `llama-server`; by default the one in the `llama_cpp_dir` of `export`.", default=None
    )
    server_flags: str | None = option("More flags of both servers, such as '-ngl 99'; none by default.", default=None)
    context_length: int = option("Most tokens of a prompt with its completion.", default=2048)

    def __post_init__(self) -> None:
        check_int("context_length", self.context_length)
        try:
            shlex.split(self.server_flags or "")
        except ValueError as error:
            raise ValueError(f"`server_flags` is {self.server_flags!r}, which no shell could read: {error}.") from error


@dataclass(frozen=True)
class OwnServers:
    """The servers of one observation.

    Args:
        options (`OwnServerOptions`): How they are started, with `server` filled in.
        draft (`str`), target (`str`): Their GGUF files.
        num_assistant_tokens (`int`): Tokens drafted in a round.
        concurrency (`int`): Requests at a time.
        threshold (`float`, *optional*, defaults to `0.0`): Probability below which a draft ends.
    """

    options: OwnServerOptions
    draft: str
    target: str
    num_assistant_tokens: int
    concurrency: int
    threshold: float = 0.0

    def describe(self, fingerprints: Fingerprints) -> JsonObject:
        """What an observation of these servers depends on."""
        return {
            "draft": fingerprints.of_data(self.draft),
            "target": fingerprints.of_data(self.target),
            "num_assistant_tokens": self.num_assistant_tokens,
            **({"threshold": self.threshold} if self.threshold else {}),
            "server_flags": self.options.server_flags,
        }

    @contextmanager
    def run(self, logs: Path) -> Iterator[tuple[str, str]]:
        """Starts both; yields their addresses, the one with the draft first.

        Args:
            logs (`Path`): Folder for what they print.

        Raises:
            LlamaServerError: One did not start.
        """
        common: Arguments = {"parallel": self.concurrency, "context_length": self.options.context_length}
        # without it a server does not tell its rounds
        flags = ["--metrics", *shlex.split(self.options.server_flags or "")]
        early_ends = [word for flag in LLAMA_CPP.list_threshold_flags(self.threshold) for word in shlex.split(flag)]
        program, target = str(self.options.server), Path(self.target)
        with (
            run_llama_server(program, target, logs / "plain.log", flags=flags, **common) as plain,
            run_llama_server(
                program,
                target,
                logs / "draft.log",
                draft=Path(self.draft),
                num_draft_tokens=self.num_assistant_tokens,
                flags=flags + early_ends,
                **common,
            ) as drafting,
        ):
            yield drafting.url, plain.url
