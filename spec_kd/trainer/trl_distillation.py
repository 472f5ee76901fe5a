"""Options of TRL's `GKDConfig` and `DistillationConfig` as those of `OnlineGKDConfig`."""

from dataclasses import MISSING, dataclass, fields

from spec_kd.open_types import Arguments, JsonObject
from spec_kd.options import document_options, option
from spec_kd.trainer.arguments import to_dict

# Options of TRL's two configurations that mean something else here, or nothing: what to use instead.
INSTEAD = {
    "seq_kd": "Set `sample_from='target'` with `lmbda=1.0`: the target then writes every completion.",
    "min_p": "Completions are sampled with `top_k` and `top_p` alone.",
    "repetition_penalty": "Completions are sampled from the plain softmax, cut by `top_k` and `top_p` alone.",
    "generation_kwargs": "Completions are sampled with `generation_temperature`, `top_k` and `top_p` alone.",
    "chat_template_kwargs": "Add a `chat_template_kwargs` column to the dataset.",
    "cache_implementation": "Use `use_transformers_continuous_batching=True` or `use_vllm=True` to generate faster.",
    "max_tool_calling_iterations": "Tools are not called; put their results into the prompts.",
}
DEFAULTS_OF_TRL = "`GKDConfig` has beta=0.5 and temperature=0.9; `DistillationConfig` beta=1.0 and learning_rate=1e-06"


@document_options
@dataclass
class TRLDistillationOptions:
    """Options by the names that TRL's `GKDConfig` and `DistillationConfig` have for them."""

    max_completion_length: int | None = option(
        "TRL's name of `max_new_tokens`, which is used by default.", default=None
    )
    teacher_model_revision: str | None = option(
        "Revision of the teacher, as in `teacher_model_init_kwargs={'revision': ...}`; its main one by default.",
        default=None,
    )
    disable_dropout: bool = option("Whether the draft is trained without its dropout.", default=False)
    seq_kd: bool = option(
        "Option of TRL's GKD, which is refused: set `sample_from='target'` with `lmbda=1.0`.", default=False
    )

    def resolve_length(self, max_new_tokens: int, default: int) -> int:
        """`max_new_tokens`, or `max_completion_length` if that is set.

        Args:
            max_new_tokens (`int`): Value of the option `max_new_tokens`.
            default (`int`): Default of that option.

        Raises:
            ValueError: If both are set and differ, and for `seq_kd=True`.
        """
        if self.seq_kd:
            raise ValueError(f"`seq_kd=True` is an option of TRL's GKD. {INSTEAD['seq_kd']}")
        if self.max_completion_length is None:
            return max_new_tokens
        if max_new_tokens not in (default, self.max_completion_length):
            raise ValueError(
                f"`max_completion_length={self.max_completion_length}` and `max_new_tokens={max_new_tokens}` are the "
                "same option. Set one of them."
            )
        return self.max_completion_length

    def resolve_init_kwargs(self, init_kwargs: Arguments | str | None) -> Arguments | str | None:
        """`teacher_model_init_kwargs` with `teacher_model_revision`; raises `ValueError` if they name two revisions."""
        if self.teacher_model_revision is None:
            return init_kwargs
        options = to_dict(init_kwargs)
        if options.setdefault("revision", self.teacher_model_revision) != self.teacher_model_revision:
            raise ValueError(
                f"`teacher_model_revision={self.teacher_model_revision!r}` and the revision "
                f"{options['revision']!r} in `teacher_model_init_kwargs` differ. Set one of them."
            )
        return options


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
        each.name: each.default if each.default_factory is MISSING else each.default_factory()
        for each in fields(source)
    }
    for name in [name for name in values if name not in known]:
        value = values.pop(name)
        if value not in (defaults.get(name), None):
            raise ValueError(
                f"`{name}={value!r}` of {source.__name__} has no meaning here. "
                + INSTEAD.get(name, "Leave it out, or see `OnlineGKDConfig` for what there is.")
            )
    return values
