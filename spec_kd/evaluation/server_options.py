"""How llama-server is timed: the options of [`~spec_kd.measure_server_costs`] and of its command."""

import shlex
from dataclasses import dataclass

from spec_kd.options import check_flag, check_int, check_ints, document_options, option

DEFAULT_ROUND_GAMMAS = (1, 2, 4, 8)
Rates = tuple[float, ...]
"""Shares of rounds in which drafted token k = 1, 2, ... is accepted; none for plain decoding."""
TimedSetting = Rates | None
"""Rates of a pair, or `None` for plain decoding by the draft alone."""


@document_options
@dataclass(frozen=True, kw_only=True)
class ServerTimingOptions:
    """How rounds are timed in llama-server.

    Raises:
        ValueError: If a value is out of its range.
    """

    server: str = option("Program `llama-server`: a path, or a name on the PATH.", default="llama-server")
    server_flags: str | None = option(
        "More flags of the server, those that it serves with; none by default. The command line needs an equals sign: "
        "`--server_flags='-ngl 99'`.",
        default=None,
    )
    batch_sizes: list[int] = option("Numbers of requests at a time.", default_factory=lambda: [1])
    context_length: int = option("Number of tokens of the prompt; give what is usual in your requests.", default=256)
    num_rounds: int = option("Number of rounds that are timed together.", default=16)
    repeats: int = option("Number of times that each setting is timed, in turn with the others.", default=5)
    keep_servers: bool = option(
        "Whether the servers of all settings run at once and take turns by requests, since the pace of a machine "
        "changes. `False` starts one after the other, for a GPU that has room for one.",
        default=True,
    )

    def __post_init__(self) -> None:
        check_ints("batch_sizes", self.batch_sizes)
        for name in ("context_length", "num_rounds", "repeats"):
            check_int(name, getattr(self, name))
        check_flag("keep_servers", self.keep_servers)
        try:
            shlex.split(self.server_flags or "")
        except ValueError as error:
            raise ValueError(f"`server_flags` is {self.server_flags!r}, which no shell could read: {error}.") from error
