from dataclasses import dataclass, field

from spec_kd.decoding.warpers import check_truncation
from spec_kd.trainer.on_policy import SOURCES
from spec_kd.trainer.white_box_distill_config import WhiteBoxDistillConfig


@dataclass
class OnlineGKDConfig(WhiteBoxDistillConfig):
    r"""
    Configuration of [`OnlineGKDTrainer`]: everything of [`WhiteBoxDistillConfig`], and:

    Args:
        mode (`str`, *optional*, defaults to `"on_policy"`):
            `"on_policy"`: completions are generated while the draft trains (GKD, arXiv 2306.13649).
        lmbda (`float`, *optional*, defaults to `0.5`):
            Probability, for each example at each visit, that its completion is generated. 0: the data set's
            completions only, as [`WhiteBoxDistillTrainer`]; 1: generated ones only, for which prompts are enough.
        sample_from (`str`, *optional*, defaults to `"draft"`):
            Who writes: `"draft"`, `"target"`, or `"mixed"`: each token from the draft with probability `mix`, else from
            the target (Online Speculative Decoding, arXiv 2310.07177).
        mix (`float`, *optional*, defaults to `0.5`):
            Probability of a token of the draft with `sample_from="mixed"`.
        generation_temperature (`float`, *optional*, defaults to `1.0`):
            Of the sampling, 0.0 for greedy. TRL's GKD calls it `temperature`, which here is the loss temperature.
        top_k (`int`, *optional*, defaults to `0`): Most likely ids to sample from; 0 for all.
        top_p (`float`, *optional*, defaults to `1.0`): Mass of the most likely ids to sample from.
        max_new_tokens (`int`, *optional*, defaults to `128`):
            Most tokens of a generated completion. `max_length` limits rows of the data set only.
        generation_batch_size (`int`, *optional*):
            Prompts generated at a time, of similar lengths; all of an optimizer step's on this process by default.
        num_iterations (`int`, *optional*, defaults to `1`):
            Optimizer steps in a row on the same completions. An epoch grows as many times; its last rows, fewer than an
            optimizer step takes, are visited once.
        log_completions (`bool`, *optional*, defaults to `False`):
            Whether to write the latest generated texts of process 0 to `completions/step-N.jsonl` in `output_dir`, at
            every logging step.
    """

    mode: str = field(
        default="on_policy", metadata={"help": "'on_policy': completions are generated while the draft trains."}
    )
    lmbda: float = field(
        default=0.5, metadata={"help": "Probability, per example, that its completion is generated; 0 = data set's."}
    )
    sample_from: str = field(
        default="draft", metadata={"help": "Who writes: 'draft', 'target' or 'mixed' (token by token, see `mix`)."}
    )
    mix: float = field(
        default=0.5, metadata={"help": "Probability that a token is the draft's with `sample_from='mixed'`."}
    )
    generation_temperature: float = field(
        default=1.0, metadata={"help": "Temperature of the sampling, 0 for greedy; `temperature` is that of the loss."}
    )
    top_k: int = field(default=0, metadata={"help": "Most likely ids to sample from; 0 for all."})
    top_p: float = field(default=1.0, metadata={"help": "Mass of the most likely ids to sample from."})
    max_new_tokens: int = field(default=128, metadata={"help": "Most tokens of a generated completion."})
    generation_batch_size: int | None = field(
        default=None, metadata={"help": "Prompts generated at a time; all of an optimizer step's by default."}
    )
    num_iterations: int = field(
        default=1, metadata={"help": "Optimizer steps in a row on the same generated completions."}
    )
    log_completions: bool = field(
        default=False, metadata={"help": "Whether to write generated texts to `completions/` at every logging step."}
    )

    def __post_init__(self):
        if self.mode == "streaming":
            raise ValueError(
                "`mode='streaming'` (learning from served requests) is not there yet. Use `mode='on_policy'`."
            )
        if self.mode != "on_policy":
            raise ValueError(f"`mode` is {self.mode!r}, but must be 'on_policy'.")
        for name in ("lmbda", "mix"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"`{name}` is {getattr(self, name)}, but is a probability: it must lie in [0, 1].")
        if self.sample_from not in SOURCES:
            raise ValueError(f"`sample_from` is {self.sample_from!r}, but must be one of {', '.join(SOURCES)}.")
        if self.generation_temperature < 0:
            raise ValueError(
                f"`generation_temperature` is {self.generation_temperature}, but must not be negative; 0 is greedy."
            )
        check_truncation(self.top_k, self.top_p)
        for name in ("max_new_tokens", "num_iterations", "generation_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` is {value}, but must be at least 1.")
        if self.lmbda > 0:
            self._check_rows()
        elif self.num_iterations > 1:
            raise ValueError(
                f"`num_iterations={self.num_iterations}` repeats generated completions, but `lmbda=0` generates none. "
                "Raise `num_train_epochs` to repeat those of the data set."
            )
        super().__post_init__()

    def _check_rows(self) -> None:
        for name in ("packing", "padding_free"):
            if getattr(self, name):
                raise ValueError(
                    f"`{name}=True` strings examples together, but `lmbda={self.lmbda}` gives single ones another "
                    f"completion. Set `{name}=False`, or `lmbda=0` to train on the data set's completions."
                )
        if self.assistant_only_loss:
            raise ValueError(
                f"`assistant_only_loss=True` trains on several turns of a row, but `lmbda={self.lmbda}` generates one "
                "completion behind a prompt. Make a row with `prompt` and `completion` of each turn."
            )
        if self.completion_only_loss is False:
            raise ValueError(
                f"`completion_only_loss=False` leaves no mark where the prompt ends, which `lmbda={self.lmbda}` needs "
                "to generate from there. Drop it."
            )
