"""Options of training on completions that are generated while it runs."""

from dataclasses import MISSING, dataclass, fields

from spec_kd.open_types import Arguments, JsonObject
from spec_kd.options import check_choice, check_int, check_number, document_own_options, option, refuse
from spec_kd.sampling.options import SamplingOptions
from spec_kd.trainer.configs import WhiteBoxDistillConfig
from spec_kd.trainer.online.options import INSTEAD, StreamingOptions, TRLDistillationOptions, VLLMOptions
from spec_kd.trainer.online.writers import SOURCES

MODES = ("on_policy", "streaming")
# What options of on-policy runs have to be when requests are served
WHEN_STREAMING = {"lmbda": 1.0, "sample_from": "draft", "num_iterations": 1, "top_k": 0, "top_p": 1.0}


@document_own_options
@dataclass
class OnlineGKDConfig(WhiteBoxDistillConfig, VLLMOptions, StreamingOptions, TRLDistillationOptions):  # type: ignore[explicit-any]  # fields of TRL
    """Configuration of [`OnlineGKDTrainer`].

    It has the options of [`WhiteBoxDistillConfig`], [`VLLMOptions`], [`StreamingOptions`] and
    [`TRLDistillationOptions`], and those below.
    """

    _VALID_DICT_FIELDS = [  # noqa: RUF012 (TRL's name)
        *WhiteBoxDistillConfig._VALID_DICT_FIELDS,
        "transformers_continuous_batching_config",
    ]

    mode: str = option(
        "Source of completions: 'on_policy', generated while the draft trains (GKD, arXiv 2306.13649); or 'streaming', "
        "requests served by speculative decoding, from which the draft learns (arXiv 2310.07177).",
        default="on_policy",
    )
    lmbda: float = option(
        "Probability that an example gets a new completion, at each visit. At 0 the dataset's completions are used, as "
        "by `WhiteBoxDistillTrainer`; at 1 prompts are enough. 0.5 by default, and always 1 with `mode='streaming'`.",
        default=None,  # a number after `__post_init__`
    )
    sample_from: str = option(
        "Model that writes on policy: 'draft', 'target', or 'mixed', where each token is the draft's with probability "
        "`mix` and else the target's (arXiv 2310.07177). Served requests always get the target's distribution.",
        default="draft",
    )
    mix: float = option("Probability that a token is the draft's, with `sample_from='mixed'`.", default=0.5)
    generation_temperature: float = option(
        "Temperature of sampling; 0 is greedy. TRL's GKD calls it `temperature`, which is the loss temperature here.",
        default=1.0,
    )
    top_k: int = option("Number of most likely ids to sample from on policy; 0 samples from all.", default=0)
    top_p: float = option(
        "Probability mass of the most likely ids to sample from on policy; 1.0 samples from all.", default=1.0
    )
    max_new_tokens: int = option(
        "Maximum number of tokens in a generated completion; `max_length` limits rows of the dataset only.", default=128
    )
    generation_batch_size: int | None = option(
        "Number of prompts generated at a time, of similar lengths. By default all of an optimizer step on this "
        "process.",
        default=None,
    )
    num_iterations: int = option(
        "Number of optimizer steps in a row on the same completions. An epoch becomes as many times longer; its last "
        "rows, fewer than an optimizer step takes, are visited once.",
        default=1,
    )
    use_transformers_continuous_batching: bool = option(
        "Whether one model's completions on policy come from transformers' continuous batching over a paged cache, "
        "which is made for GPUs. Named as in TRL's GRPO.",
        default=False,
    )
    transformers_continuous_batching_config: Arguments | str | None = option(
        "Arguments of transformers' `ContinuousBatchingConfig`; its own defaults by default.", default=None
    )
    log_completions: bool = option(
        "Whether to write the latest completions of process 0 to `completions/step-N.jsonl` in `output_dir`, at every "
        "logging step.",
        default=False,
    )

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, MODES)
        if self.lmbda is None:
            self.lmbda = 1.0 if self.mode == "streaming" else 0.5
        for name in ("lmbda", "mix"):
            check_number(name, getattr(self, name), 0, 1, reason="It is a probability.")
        check_choice("sample_from", self.sample_from, SOURCES)
        check_number("generation_temperature", self.generation_temperature, 0, reason="0 is greedy.")
        self.max_new_tokens = self.resolve_length(self.max_new_tokens, type(self).max_new_tokens)
        self.build_sampling_options()
        check_int("num_iterations", self.num_iterations)
        check_int("generation_batch_size", self.generation_batch_size, is_optional=True)
        self.check_streaming(self.generation_temperature, self.per_device_train_batch_size)
        self.check_vllm(self.mode, self.lmbda, self.sample_from)
        self._check_rows()
        if self.num_parallel_tokens is not None:
            raise ValueError(
                f"`num_parallel_tokens={self.num_parallel_tokens}` is for drafts that learn from completions that "
                "exist. Use WhiteBoxDistillTrainer or BlackBoxSFTTrainer."
            )
        if self.mode == "streaming":
            self._set_up_streaming()
        super().__post_init__()
        self.teacher_model_init_kwargs = self.resolve_init_kwargs(self.teacher_model_init_kwargs)
        if self.mode == "streaming":
            self.build_signal_spec().sparse_method.check_serves(self.build_loss().divergence)

    def build_sampling_options(self) -> SamplingOptions:
        """How completions are sampled."""
        return SamplingOptions(
            max_new_tokens=self.max_new_tokens,
            temperature=self.generation_temperature,
            top_k=self.top_k,
            top_p=self.top_p,
        )

    def check_inputs(self, teacher_model: object, ref_model: object, is_stream: bool) -> None:
        """Raises `ValueError` unless there are live models to ask about completions, and a dataset that fits.

        Args:
            teacher_model (*optional*), ref_model (*optional*):
                Arguments of the trainer, in place of which these options may name a live target and reference draft.
            is_stream (`bool`): Whether the training set is an `IterableDataset`.
        """
        selection, needs_model = self.build_loss().selection, self.lmbda > 0 and self.ref_model_name_or_path is None
        refuse(
            (
                teacher_model is None and self.teacher_model_name_or_path is None,
                "OnlineGKDTrainer needs a live `teacher_model`: a stored signal belongs to the dataset's completions, "
                "not to generated ones. Pass the target as a model, a path or a Hub id, or use WhiteBoxDistillTrainer.",
            ),
            (
                needs_model and ref_model is None and selection is not None and selection.needs_reference,
                f"`token_selection={self.token_selection!r}` needs a live `ref_model` with `lmbda={self.lmbda}`: the "
                "scores of a `reference_forward_kl` column belong to the dataset's completions, not to generated ones. "
                "Pass `ref_model`, or set `lmbda=0`.",
            ),
            (
                self.num_iterations > 1 and is_stream,
                f"`num_iterations={self.num_iterations}` repeats the examples of an optimizer step, which needs a "
                "`Dataset` with a length. Set it to 1 for an `IterableDataset`.",
            ),
        )

    def _set_up_streaming(self) -> None:
        for name, only in WHEN_STREAMING.items():
            if (value := getattr(self, name)) != only:
                raise ValueError(
                    f"`{name}={value!r}` has no use with `mode='streaming'`: every request is served once, by "
                    "speculative decoding from the plain softmax. Leave it out."
                )
        self.train_sampling_strategy = "sequential"
        if self.update_interval is not None:
            self.gradient_accumulation_steps = self.update_interval // self.per_device_train_batch_size

    @classmethod
    def translate(cls, values: JsonObject, source: type) -> JsonObject:
        """As [`DraftConfig.translate`], of TRL's `GKDConfig` and `DistillationConfig`.

        Both sample at the temperature that divides the logits of the loss; ours has an option for each.

        Raises:
            ValueError: For an option that has no meaning here and is not at its default; names what to use instead.
        """
        names = {each.__name__ for each in source.__mro__}
        if not names & {"GKDConfig", "DistillationConfig"}:
            return values
        values = {**values, "generation_temperature": values["temperature"]}
        if "DistillationConfig" in names:
            values["lmbda"] = 1.0  # it always trains on what the draft writes
        for each in (each for each in fields(source) if each.name not in cls.__dataclass_fields__):
            value = values.pop(each.name, None)
            default = each.default if each.default_factory is MISSING else each.default_factory()
            if value not in (default, None):
                advice = INSTEAD.get(each.name, "Leave it out, or see `OnlineGKDConfig` for what there is.")
                raise ValueError(f"`{each.name}={value!r}` of {source.__name__} has no meaning here. {advice}")
        return values

    def describe(self) -> str:
        """One sentence with the settings that a script of TRL may expect to be different."""
        return (
            f"Divergence {self.divergence}{'' if self.beta is None else f' (beta={self.beta})'} at temperature "
            f"{self.temperature}, learning rate {self.learning_rate}; {self.lmbda:.0%} of the completions are "
            f"generated, at temperature {self.generation_temperature} and with at most {self.max_new_tokens} tokens "
            "(in TRL, `GKDConfig` has beta=0.5 and temperature=0.9; `DistillationConfig` beta=1.0 and "
            "learning_rate=1e-06)."
        )

    def _check_rows(self) -> None:
        """Raises `ValueError` for options that do not fit where the completions of the rows come from."""
        generates, share = self.lmbda > 0, f"`lmbda={self.lmbda}`"
        is_one_writer = self.mode == "on_policy" and self.sample_from != "mixed" and not self.use_vllm
        refuse(
            (
                self.use_transformers_continuous_batching and not is_one_writer,
                "`use_transformers_continuous_batching=True` is for completions that one model writes on policy, "
                "without `mode='streaming'`, `sample_from='mixed'` and `use_vllm`. Set it to False.",
            ),
            (
                self.mode != "streaming" and self.update_interval is not None,
                f"`update_interval={self.update_interval}` counts served requests, which only `mode='streaming'` has. "
                "Set `gradient_accumulation_steps`.",
            ),
            (
                not generates and self.num_iterations > 1,
                f"`num_iterations={self.num_iterations}` repeats generated completions, but `lmbda=0` generates none. "
                "Raise `num_train_epochs` to repeat those of the dataset.",
            ),
            *(
                (
                    generates and getattr(self, name),
                    f"`{name}=True` joins examples, but {share} gives single ones another completion. Set "
                    f"`{name}=False`, or `lmbda=0` to train on the dataset's completions.",
                )
                for name in ("packing", "padding_free")
            ),
            (
                generates and self.assistant_only_loss,
                f"`assistant_only_loss=True` trains on several turns of a row, but {share} generates one completion "
                "after a prompt. Make a row with `prompt` and `completion` of each turn.",
            ),
            (
                generates and self.completion_only_loss is False,
                f"`completion_only_loss=False` leaves no mark where the prompt ends, which {share} needs to generate "
                "from there. Drop it.",
            ),
        )
