"""The options of [`~spec_kd.export_draft`] and of its command."""

from dataclasses import dataclass

from spec_kd.hub.gguf import QUANTIZATIONS
from spec_kd.options import check_choice, check_int, check_number, document_options, option, refuse
from spec_kd.serving import SERVING_ENGINES, find_serving_engine


@document_options
@dataclass(frozen=True)
class ExportOptions:
    """The form in which a draft is saved, and the engines that it is saved for.

    Raises:
        ValueError: If a value is out of its range, or GGUF files are asked for without llama.cpp.
    """

    target_vocab_size: int | None = option(
        "Number of rows of the target's head (its `config.vocab_size`). The draft's head is padded or cut to it, see "
        "`align_vocabulary`; by default it stays as it is.",
        default=None,
    )
    merge_adapter: bool = option(
        "Whether the adapter of a PEFT draft is merged into its base model. `False` saves it as an adapter.",
        default=True,
    )
    serving_engines: list[str] = option(
        f"Engines that will serve the draft: {', '.join(SERVING_ENGINES)}. `check_serving` runs for each, and "
        "`serving.json` and the model card say how they serve it; none by default.",
        default_factory=list,
    )
    refuse_findings: bool = option(
        "Whether a finding that makes the draft of no use in an engine is an error. Others are logged.", default=True
    )
    num_assistant_tokens: int = option("Number of tokens drafted in a round, for the engines' commands.", default=5)
    assistant_confidence_threshold: float = option(
        "Probability below which a draft ends, for the commands of engines that have it (`--spec-draft-p-min` of "
        "llama.cpp). By default 0.0: drafts end nowhere.",
        default=0.0,
    )
    llama_cpp_dir: str | None = option(
        "Folder of llama.cpp, whose tools write GGUF files of the draft and the target into `gguf` below the draft's "
        "folder, see `export_gguf`; no GGUF files by default.",
        default=None,
    )
    quantization: str = option(f"Type of the weights in GGUF: {', '.join(QUANTIZATIONS)}.", default="f16")

    def __post_init__(self) -> None:
        check_int("target_vocab_size", self.target_vocab_size, is_optional=True)
        check_int("num_assistant_tokens", self.num_assistant_tokens)
        check_number("assistant_confidence_threshold", self.assistant_confidence_threshold, 0, 1)
        check_choice("quantization", self.quantization, QUANTIZATIONS)
        engines = [find_serving_engine(name) for name in self.serving_engines]
        refuse(
            (
                self.assistant_confidence_threshold > 0 and all(engine.early_end is None for engine in engines),
                f"`assistant_confidence_threshold` is {self.assistant_confidence_threshold:g}, but no engine of "
                "`serving_engines` ends drafts early. Leave it out, or add one that does, such as llama.cpp.",
            ),
            (
                self.llama_cpp_dir is not None and "llama.cpp" not in self.serving_engines,
                "`llama_cpp_dir` writes GGUF files for llama.cpp. Add it to `serving_engines`.",
            ),
            (
                self.llama_cpp_dir is not None and not self.merge_adapter,
                "`llama_cpp_dir` needs `merge_adapter=True`: llama.cpp reads no draft that is an adapter.",
            ),
        )
