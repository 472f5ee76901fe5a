"""The teacher of a white-box run: loaded as TRL loads one, frozen, and asked for hidden states only."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from transformers import PreTrainedModel
from trl.models import prepare_deepspeed, prepare_fsdp

from spec_kd.heads import LogitHead, compute_last_hidden_states, count_rows
from spec_kd.loading import load_model
from spec_kd.open_types import Argument, Arguments, JsonObject


class LiveLogits:
    """Logits of N tokens of the loss, chunk by chunk, from hidden states and a head.

    Args:
        hidden (`torch.Tensor`): Of the teacher, `(N, H_teacher)`.
        head (`LogitHead`): The teacher's.
        device (`torch.device`): Where the logits are wanted.
    """

    def __init__(self, hidden: torch.Tensor, head: LogitHead, device: torch.device):
        self.hidden, self.head, self.device = hidden, head, device
        self._buffer = None

    def __getitem__(self, mask: torch.Tensor) -> "LiveLogits":
        return LiveLogits(self.hidden[mask.to(self.hidden.device)], self.head, self.device)

    @torch.no_grad()
    def __call__(self, chunk: slice) -> torch.Tensor:
        """Logits `(n, vocab_size)` of a slice of the N tokens; they may share their memory with the next ones.

        In the head's dtype where that is all it takes: the loss is elementwise from there, so a float32 copy of them
        would only be written and read.
        """
        rows = chunk.stop - chunk.start
        if self._buffer is None or len(self._buffer) < rows:
            self._buffer = self.hidden.new_empty(rows, count_rows(self.head.module))
        compute = self.head.project if self.head.transform.is_identity else self.head
        return compute(self.hidden[chunk], out=self._buffer[:rows]).to(self.device)


@dataclass(frozen=True)
class LiveTargets:
    """What a live model says about a batch: hidden states, and the head that turns some of them into logits.

    Args:
        hidden (`torch.Tensor`): `(B, T, H_teacher)`, no gradient.
        head (`LogitHead`): The model's head.
    """

    hidden: torch.Tensor
    head: LogitHead

    def select(self, mask: torch.Tensor) -> LiveLogits:
        """The positions of the loss: `mask` is bool `(B, T - 1)`, true where the *next* token belongs to it."""
        return LiveLogits(self.hidden[:, :-1][mask.to(self.hidden.device)], self.head, mask.device)


@dataclass(frozen=True)
class DistillSignal:
    """All that the loss of a batch needs besides the draft.

    Args:
        teacher (`LiveTargets` or `StoredTargets`): Of the target: anything with `select`.
        reference (`LiveTargets` or `torch.Tensor`, *optional*):
            Of a reference draft, or what it once scored: KL(p‖q_ref) per token, `(B, T)`.
    """

    teacher: Any
    reference: LiveTargets | torch.Tensor | None = None


class LiveTeacher:
    """A frozen model in memory: the target, or a reference draft.

    Args:
        model (`PreTrainedModel`): Put in eval mode and frozen for good.
        accelerator (`Accelerator`): Prepares it with the rules TRL has for teachers (ZeRO, FSDP, device, precision).
        vocab_size (`int`): Number of real ids.
    """

    def __init__(self, model: PreTrainedModel, accelerator: Accelerator, vocab_size: int):
        model.eval().requires_grad_(False)
        self._is_apart = False
        self._head = LogitHead.of(model, vocab_size)
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            self.model = prepare_deepspeed(model, accelerator)
        elif accelerator.distributed_type == DistributedType.FSDP:
            self.model = prepare_fsdp(model, accelerator)
        else:
            # float16 weights do not mix with bfloat16: norms on a CPU refuse, and rounding once is enough
            self._is_apart = model.dtype == torch.float16 and accelerator.mixed_precision == "bf16"
            if self._is_apart:
                self.model = model.to(accelerator.device)
            else:
                self.model = accelerator.prepare_model(model, evaluation_mode=True)

    @torch.no_grad()
    def compute_signal(self, inputs: JsonObject) -> LiveTargets:
        """Runs the teacher over the draft's own inputs (ids, mask or position ids; labels are left out)."""
        inputs = {key: value for key, value in inputs.items() if key not in ("labels", "output_router_logits")}
        with torch.autocast(inputs["input_ids"].device.type, enabled=False) if self._is_apart else nullcontext():
            hidden = compute_last_hidden_states(self.model, self._head.module, **inputs)
        return LiveTargets(hidden, self._head)


def load_teacher(
    teacher_model: str | PreTrainedModel, init_kwargs: Arguments | None, is_distributed: bool, **defaults: Argument
) -> PreTrainedModel:
    """The teacher as a model: a path or Hub id is loaded ([`load_model`]), a model is returned as it is.

    Args:
        teacher_model (`str` or `PreTrainedModel`): What the user passed.
        init_kwargs (`dict`, *optional*): `teacher_model_init_kwargs`.
        is_distributed (`bool`): Whether several processes train; `device_map` must then be `None`.
        defaults: Arguments used unless `init_kwargs` has them.

    Raises:
        ValueError: If `init_kwargs` come with a model that is already there.
    """
    if not isinstance(teacher_model, str):
        if init_kwargs:
            raise ValueError(
                f"`teacher_model_init_kwargs` {sorted(init_kwargs)} came with a `teacher_model` that is already a "
                "model. Pass the teacher's path, or drop the arguments."
            )
        return teacher_model
    kwargs = {**defaults, **(init_kwargs or {})}
    if is_distributed:
        kwargs["device_map"] = None
    return load_model(teacher_model, **kwargs)
