"""`OnlineGKDTrainer` and its two peers in TRL, set alike: on-policy distillation of the same draft on the same prompts.

What differs is what a trainer does by itself: ours and `DistillationTrainer` generate the completions of all micro
batches of an optimizer step at once, GKD those of each micro batch. On a CPU `DistillationTrainer` projects padded
completion positions too; GKD makes all logits, of the prompts too, and divides its loss by the number of tokens of the
dataset's completions, which changes what gradient clipping does and nothing else under Adam.
"""

from dataclasses import asdict, dataclass
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, Trainer
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer

from spec_kd import OnlineGKDConfig, OnlineGKDTrainer

OURS, DISTILLATION, GKD = "OnlineGKDTrainer", "TRL DistillationTrainer", "TRL GKDTrainer"
TRAINERS = (OURS, DISTILLATION, GKD)

# What TRL's documentation advises for speed is vLLM, which needs a GPU; on a CPU there is transformers' `generate` for
# all three. Gradient checkpointing and bf16 are the defaults of all three; both are off, as they slow a CPU down.
COMMON = {
    "lr_scheduler_type": "constant",
    "bf16": False,
    "gradient_checkpointing": False,
    "logging_steps": 10,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}
# Order of the prompts, sampling from the draft's softmax at temperature 1, nothing from the dataset.
SEQUENTIAL = {"train_sampling_strategy": "sequential"}
OWN = {
    OURS: {**SEQUENTIAL, "lmbda": 1.0, "temperature": 1.0, "generation_temperature": 1.0, "max_length": None},
    DISTILLATION: {"shuffle_dataset": False, "temperature": 1.0, "top_k": 0, "top_p": 1.0},
    GKD: {**SEQUENTIAL, "lmbda": 1.0, "temperature": 1.0, "max_length": 2048},
}


@dataclass(frozen=True)
class EqualSettings:
    """What is the same for all trainers and differs between runs.

    Args:
        per_device_train_batch_size (`int`): Prompts of a micro batch.
        gradient_accumulation_steps (`int`): Micro batches of an optimizer step.
        max_new_tokens (`int`): Longest completion.
        max_steps (`int`): Optimizer steps.
        beta (`float`): Of the divergence: 0 is forward KL, 1 reverse KL, between them JSD.
        learning_rate (`float`): Constant.
        seed (`int`): Of the sampling.
    """

    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    max_new_tokens: int
    max_steps: int
    beta: float
    learning_rate: float
    seed: int

    @property
    def num_prompts(self) -> int:
        """Prompts of all steps, and of one more, so that no trainer comes to the end of an epoch."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * (self.max_steps + 1)

    def options(self, name: str) -> dict[str, Any]:
        """Arguments of a trainer's configuration."""
        options = {**COMMON, **asdict(self), **OWN[name]}
        if name == DISTILLATION:
            options["max_completion_length"] = options.pop("max_new_tokens")
        return options


def make_trainer(
    name: str,
    settings: EqualSettings,
    rows: list[dict],
    draft: str,
    target: str,
    tokenizer: PreTrainedTokenizerBase,
    folder: str,
) -> tuple[Trainer, PreTrainedModel]:
    """A trainer over a draft of its own, and its teacher.

    Args:
        name (`str`): One of `TRAINERS`.
        settings (`EqualSettings`): The run.
        rows (`list[dict]`): Messages, `prompt` and `completion`; the latter is a form that GKD asks for.
        draft, target (`str`): Folders.
        tokenizer (`PreTrainedTokenizerBase`): Of both.
        folder (`str`): The trainer's `output_dir`.
    """
    rows = rows[: settings.num_prompts]
    if len(rows) < settings.num_prompts:
        raise ValueError(f"{settings.num_prompts} training prompts are needed, but there are {len(rows)}.")
    if name == GKD:
        rows = [{"messages": row["prompt"] + row["completion"]} for row in rows]
    else:
        rows = [{"prompt": row["prompt"]} for row in rows]
    trainer_class, config_class = {
        OURS: (OnlineGKDTrainer, OnlineGKDConfig),
        DISTILLATION: (DistillationTrainer, DistillationConfig),
        GKD: (GKDTrainer, GKDConfig),
    }[name]
    teacher = AutoModelForCausalLM.from_pretrained(target)
    trainer = trainer_class(
        model=AutoModelForCausalLM.from_pretrained(draft),
        teacher_model=teacher,
        args=config_class(output_dir=folder, **settings.options(name)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    return trainer, teacher
