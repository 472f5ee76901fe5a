"""Which shapes are compared and how: the options of [`~spec_kd.plan_draft`] and of its command."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers import PretrainedConfig

from spec_kd.drafts.options import WIDTHS, DraftShapeOptions
from spec_kd.evaluation.server_options import DEFAULT_ROUND_GAMMAS
from spec_kd.hub.gguf import QUANTIZATIONS
from spec_kd.options import (
    check_choice,
    check_int,
    check_ints,
    check_number,
    check_numbers,
    document_options,
    option,
    refuse,
)

if TYPE_CHECKING:
    Shapes = list[str] | list[DraftShapeOptions] | None
else:
    Shapes = list[str] | None  # the form that a command line and a recipe can give

WIDTH_SHARES, DEPTHS = (1 / 4, 1 / 3, 1 / 2), (2, 4)
HEAD_WIDTH = 64
SHAPE = re.compile(r"(\d+)x(\d+)(-cut)?")
SHORT = dict(zip(WIDTHS[1:], ("ff", "h", "kv"), strict=True))
RUN_OPTIONS = ("run_minutes", "num_held_out", "learning_rate", "per_device_train_batch_size", "max_length")


@document_options
@dataclass(frozen=True, kw_only=True)
class DraftPlanOptions:
    """Candidate shapes of a draft, and what is measured of each.

    Raises:
        ValueError: If a value is out of its range.
    """

    shapes: Shapes = option(
        "Candidate shapes. `192x4` has the width 192 and 4 fresh layers; `576x4-cut` has 4 layers of a target of width "
        "576. In Python also `DraftShapeOptions`. By default a quarter, a third and half of the target's width, each "
        "with 2 and with 4 fresh layers.",
        default=None,
    )
    gammas: list[int] = option(
        "Numbers of drafted tokens to time; costs between them are interpolated.",
        default_factory=lambda: list(DEFAULT_ROUND_GAMMAS),
    )
    wished_speedup: float = option("Speed-up over plain decoding that the draft should reach.", default=1.5)
    reachable_alpha: float = option(
        "Acceptance of a drafted token that training can reach at most. A shape that needs more to break even cannot "
        "pay. The trained drafts in table 2 of arXiv 2211.17192 are accepted with 0.53 to 0.82.",
        default=0.8,
    )
    alphas: list[float] = option(
        "Acceptances at which the table and the picture show the predicted speed-up.",
        default_factory=lambda: [0.4, 0.6, 0.8],
    )
    llama_cpp_dir: str | None = option(
        "Folder of llama.cpp's source, with which rounds are timed in llama-server. By default bare passes of both "
        "models are timed in transformers: the costs of an engine without overhead.",
        default=None,
    )
    target_gguf: str | None = option(
        "GGUF file of the target for llama-server; by default the target is converted into `output_dir`.", default=None
    )
    quantization: str = option(
        f"Type of the GGUF weights that are timed: {', '.join(QUANTIZATIONS)}. Give that of `target_gguf` with it.",
        default="f16",
    )
    temperature: float = option("Temperature that the responses were sampled at; 0 is greedy.", default=0.0)
    run_minutes: float | None = option(
        "Minutes that each shape that can pay is trained on the responses, for the acceptance that it reaches in equal "
        "time. By default nothing is trained.",
        default=None,
    )
    num_held_out: int = option("Number of responses that this acceptance is measured on, and not trained on.", 64)
    learning_rate: float = option("Learning rate of these runs.", default=1e-3)
    per_device_train_batch_size: int = option("Number of responses in a batch of these runs.", default=8)
    max_length: int | None = option(
        "Tokens of a response, prompt included, that these runs read at most; all by default.", default=None
    )

    def __post_init__(self) -> None:
        for one in self.shapes or ():
            if not isinstance(one, DraftShapeOptions) and SHAPE.fullmatch(str(one)) is None:
                raise ValueError(f"`shapes` has {one!r}, which is no shape such as 192x4 or 576x4-cut.")
        check_ints("gammas", self.gammas)
        check_number("wished_speedup", self.wished_speedup, above=1)
        check_number("reachable_alpha", self.reachable_alpha, above=0, maximum=1)
        check_numbers("alphas", self.alphas, 0)
        check_choice("quantization", self.quantization, QUANTIZATIONS)
        check_number("temperature", self.temperature, 0)
        check_number("run_minutes", self.run_minutes, above=0, is_optional=True)
        check_int("num_held_out", self.num_held_out)
        check_number("learning_rate", self.learning_rate, above=0)
        check_int("per_device_train_batch_size", self.per_device_train_batch_size)
        check_int("max_length", self.max_length, 2, is_optional=True)
        refuse(
            (max(self.alphas) > 1, f"`alphas` is {self.alphas}, but an acceptance is at most 1."),
            (
                self.target_gguf is not None and self.llama_cpp_dir is None,
                "`target_gguf` is for llama-server. Give `llama_cpp_dir` too: drafts are converted with it.",
            ),
        )

    def list_shapes(self, config: PretrainedConfig) -> dict[str, DraftShapeOptions]:
        """The candidates by their names, which are those of `shapes` where these are text.

        Args:
            config (`PretrainedConfig`): Config of the target.

        Raises:
            ValueError: If `shapes` has a shape twice, or is empty.
        """
        given = list_default_shapes(config.hidden_size) if self.shapes is None else self.shapes
        shapes = [one if isinstance(one, DraftShapeOptions) else read_shape(one) for one in given]
        names = [name_shape(one, config) for one in shapes]
        if len(set(names)) < len(names) or not names:
            raise ValueError(f"`shapes` is {names}. Give one or more different shapes.")
        return dict(zip(names, shapes, strict=True))


def read_shape(text: str) -> DraftShapeOptions:
    """A shape from text such as `192x4` or `576x4-cut`."""
    width, layers, cut = SHAPE.fullmatch(text).groups()  # type: ignore[union-attr]  # checked with the options
    return DraftShapeOptions(hidden_size=int(width), num_hidden_layers=int(layers), fresh_layers=cut is None)


def name_shape(options: DraftShapeOptions, config: PretrainedConfig) -> str:
    """A short name of a shape, such as `192x4`, `576x4-cut` or `192x4-ff512-h3-kv1`."""
    layers = len(options.layers) if options.layers is not None else options.num_hidden_layers
    ties = {None: "", True: "-tied", False: "-untied"}
    parts = [f"-{short}{value}" for name, short in SHORT.items() if (value := getattr(options, name)) is not None]
    cut = "" if options.fresh_layers else "-cut"
    width = options.hidden_size or config.hidden_size
    return f"{width}x{layers or config.num_hidden_layers}{cut}{''.join(parts)}{ties[options.tie_word_embeddings]}"


def list_default_shapes(hidden_size: int) -> list[str]:
    """Shares of the target's width, in whole heads of 64, each with few layers: a deep draft takes longer per token."""
    unit = HEAD_WIDTH if hidden_size >= 2 * HEAD_WIDTH else 2
    widths = dict.fromkeys(max(unit, int(share * hidden_size) // unit * unit) for share in WIDTH_SHARES)
    return [f"{width}x{depth}" for width in widths for depth in DEPTHS]
