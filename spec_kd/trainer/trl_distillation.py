"""What scripts of TRL's `GKDTrainer` and `DistillationTrainer` say, in the words of `OnlineGKDConfig`."""

from dataclasses import MISSING, dataclass, field, fields

from spec_kd.open_types import JsonObject

# Options of TRL's two configurations that mean something else here, or nothing: what to use instead.
INSTEAD = {
    "seq_kd": "Set `sample_from='target'` with `lmbda=1.0`: the target writes every completion.",
    "min_p": "Text is drawn with `top_k` and `top_p` alone.",
    "repetition_penalty": "Text is drawn from the model's own distribution, `top_k` and `top_p` of it.",
    "generation_kwargs": "Text is drawn with `generation_temperature`, `top_k` and `top_p` alone.",
    "chat_template_kwargs": "Add a `chat_template_kwargs` column to the dataset.",
    "cache_implementation": "Use `use_transformers_continuous_batching=True` or `use_vllm=True` to generate faster.",
    "max_tool_calling_iterations": "Tools are not called; put their results into the prompts.",
}
DEFAULTS_OF_TRL = "`GKDConfig` has beta=0.5 and temperature=0.9; `DistillationConfig` beta=1.0 and learning_rate=1e-06"


@dataclass
class TRLDistillationOptions:
    r"""
    Options by the names that TRL's `GKDConfig` and `DistillationConfig` have for them.

    Args:
        max_completion_length (`int`, *optional*): The same as `max_new_tokens`.
        teacher_model_revision (`str`, *optional*): The same as `teacher_model_init_kwargs={"revision": ...}`.
        disable_dropout (`bool`, *optional*, defaults to `False`): Whether the draft is trained without its dropout.
        seq_kd (`bool`, *optional*, defaults to `False`):
            Refused: `sample_from="target"` with `lmbda=1.0` is what it means.
    """

    max_completion_length: int | None = field(default=None, metadata={"help": "The same as `max_new_tokens`."})
    teacher_model_revision: str | None = field(
        default=None, metadata={"help": "The same as `revision` in `teacher_model_init_kwargs`."}
    )
    disable_dropout: bool = field(default=False, metadata={"help": "Whether the draft is trained without its dropout."})
    seq_kd: bool = field(default=False, metadata={"help": "Refused; use sample_from='target' with lmbda=1."})

    def read_lengths(self, default: int) -> None:
        """Sets `max_new_tokens` from `max_completion_length`.

        Args:
            default (`int`): What `max_new_tokens` is where nobody set it.

        Raises:
            ValueError: If both are set and differ, and for `seq_kd=True`.
        """
        if self.seq_kd:
            raise ValueError(f"`seq_kd=True` is an option of TRL's GKD. {INSTEAD['seq_kd']}")
        if self.max_completion_length is None:
            return
        if self.max_new_tokens not in (default, self.max_completion_length):
            raise ValueError(
                f"`max_completion_length={self.max_completion_length}` and `max_new_tokens={self.max_new_tokens}` are "
                "the same option. Set one of them."
            )
        self.max_new_tokens = self.max_completion_length

    def read_revision(self) -> None:
        """Adds `teacher_model_revision` to `teacher_model_init_kwargs`; raises `ValueError` if that has another one."""
        if self.teacher_model_revision is None:
            return
        options = dict(self.teacher_model_init_kwargs or {})
        if options.setdefault("revision", self.teacher_model_revision) != self.teacher_model_revision:
            raise ValueError(
                f"`teacher_model_revision={self.teacher_model_revision!r}` and the revision "
                f"{options['revision']!r} in `teacher_model_init_kwargs` differ. Set one of them."
            )
        self.teacher_model_init_kwargs = options


def translate_options(values: JsonObject, source: type, known: set[str]) -> JsonObject:
    """Options of TRL's `GKDConfig` or `DistillationConfig` as those of `OnlineGKDConfig`.

    Both sample at the temperature that divides the logits of the loss; ours has an option for each.

    Args:
        values (`dict[str, Any]`): By their names there.
        source (`type`): The configuration class; the options of any other one are returned as they are.
        known (`set[str]`): Names of ours.

    Raises:
        ValueError: For an option that has no meaning here and is not at its default; names what to use instead.
    """
    names = {each.__name__ for each in source.__mro__}
    if not names & {"GKDConfig", "DistillationConfig"}:
        return values
    values = {**values, "generation_temperature": values["temperature"]}
    if "DistillationConfig" in names:
        values["lmbda"] = 1.0  # it always trains on what the draft writes
    defaults = {
        option.name: option.default_factory() if option.default is MISSING else option.default
        for option in fields(source)
        if option.default is not MISSING or option.default_factory is not MISSING
    }
    for name in [name for name in values if name not in known]:
        value = values.pop(name)
        if value not in (defaults.get(name), None):
            raise ValueError(
                f"`{name}={value!r}` of {source.__name__} has no meaning here. "
                + INSTEAD.get(name, "Leave it out, or see `OnlineGKDConfig` for what there is.")
            )
    return values
