"""All that a white-box loss and its trainer read of a teacher, and the teacher in memory.

It is loaded as TRL loads one, frozen, and asked for hidden states only.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from accelerate import Accelerator, DistributedType
from transformers import PreTrainedModel

from spec_kd._private import get_config_model_id
from spec_kd.heads import LogitHead, compute_last_hidden_states, count_rows
from spec_kd.loading import load_model
from spec_kd.losses import Divergence, TokenLoss
from spec_kd.losses.fused_linear import choose_chunk_tokens
from spec_kd.losses.selection import TokenTargets
from spec_kd.open_types import Argument, Chunk, JsonObject
from spec_kd.sharding import check_placement, prepare_frozen
from spec_kd.trainer.configs import InitKwargs, to_dict


class Targets(Protocol):
    """The target's distribution at the tokens of one batch."""

    @property
    def alpha_metric(self) -> str | None:
        """Name of the metric that the loss's alpha is: exact, or an upper bound; `None` if alpha is unknown."""

    @property
    def head_parameters(self) -> list[torch.nn.Parameter]:
        """Parameters that the loss reads, and ZeRO-3 therefore has to gather; none by default."""
        return []

    def select(self, mask: torch.Tensor) -> TokenTargets:
        """The tokens of the loss.

        Args:
            mask (`torch.Tensor`): bool `(B, T - 1)`, true where the *next* token belongs to the loss.
        """

    def compute_tail_mass(self, labels: torch.Tensor) -> torch.Tensor | None:
        """Probability outside of the ids that are kept, float32 `(N,)`; `None`, the default, where all of it is kept.

        Args:
            labels (`torch.Tensor`): int64 `(B, T)`, -100 outside of the N tokens of the loss.
        """
        return None

    def compute_token_log_p(self, mask: torch.Tensor, tokens: torch.Tensor, temperature: float) -> torch.Tensor:
        """Log p of the written tokens of the loss at the loss temperature, float32 `(N,)`.

        Args:
            mask (`torch.Tensor`): As for [`select`].
            tokens (`torch.Tensor`): Written tokens, int64 `(N,)`.
            temperature (`float`): Loss temperature.
        """

    def explain_non_finite(self, loss: TokenLoss) -> str | None:
        """Why a loss over these targets is NaN or infinite, as sentences; `None`, the default, if they are no cause."""
        return None


class Teacher(Protocol):
    """Where the target's distribution over a batch comes from.

    Attributes:
        name (`str`, *optional*): The target's path or Hub id.
        model (`PreTrainedModel`, *optional*): The target, prepared for the devices; `None` without a live one.
        columns (`tuple[str, ...]`): Columns of the dataset that are read.
    """

    name: str | None
    model: PreTrainedModel | None
    columns: tuple[str, ...]

    def compute_targets(self, inputs: JsonObject) -> Targets:
        """The target's distribution over a batch; columns of the teacher are taken out of `inputs`.

        Args:
            inputs (`dict[str, torch.Tensor]`): What the draft is called with, and the teacher's columns.
        """

    def describe_service(self, divergence: Divergence) -> str:
        """How this teacher serves a divergence, for the model card; empty if it gives the whole distribution."""
        return ""


class LiveLogits:
    """Logits of N tokens of the loss, chunk by chunk, from hidden states and a head.

    Args:
        hidden (`torch.Tensor`): The teacher's last hidden states, `(N, H_teacher)`.
        head (`LogitHead`): The teacher's head.
        device (`torch.device`): Device that the logits are returned on.
    """

    def __init__(self, hidden: torch.Tensor, head: LogitHead, device: torch.device):
        self.hidden, self.head, self.device = hidden, head, device
        self._buffer: torch.Tensor | None = None

    def __getitem__(self, mask: torch.Tensor) -> "LiveLogits":
        return LiveLogits(self.hidden[mask.to(self.hidden.device)], self.head, self.device)

    @torch.no_grad()
    def __call__(self, chunk: Chunk) -> torch.Tensor:
        """Logits `(n, vocab_size)` of a slice of the N tokens; the next call may overwrite them.

        They have the head's dtype where the head alone makes them: the loss is elementwise from there, so a float32
        copy would only be written and read.
        """
        rows = chunk.stop - chunk.start
        if self._buffer is None or len(self._buffer) < rows:
            self._buffer = self.hidden.new_empty(rows, count_rows(self.head.module))
        compute = self.head.project if self.head.transform.is_identity else self.head
        return compute(self.hidden[chunk], out=self._buffer[:rows]).to(self.device)


@dataclass(frozen=True)
class LiveTargets(Targets):
    """The distribution that a live model gives for a batch: hidden states, and the head that turns them into logits.

    Args:
        hidden (`torch.Tensor`): Last hidden states `(B, T, H_teacher)`, without gradient.
        head (`LogitHead`): The model's head.
    """

    hidden: torch.Tensor
    head: LogitHead

    alpha_metric = "alpha_on_data"

    @property
    def head_parameters(self) -> list[torch.nn.Parameter]:
        """As [`Targets.head_parameters`]."""
        return list(self.head.module.parameters())

    def select(self, mask: torch.Tensor) -> LiveLogits:
        """As [`Targets.select`]."""
        return LiveLogits(self.hidden[:, :-1][mask.to(self.hidden.device)], self.head, mask.device)

    @torch.no_grad()
    def compute_token_log_p(self, mask: torch.Tensor, tokens: torch.Tensor, temperature: float) -> torch.Tensor:
        """As [`Targets.compute_token_log_p`]."""
        logits, log_p = self.select(mask), torch.empty(len(tokens), device=mask.device)
        size = choose_chunk_tokens(len(tokens), self.head.vocab_size, mask.device.type)
        for start in range(0, len(tokens), size):
            chunk = slice(start, min(start + size, len(tokens)))
            of_all = (logits(chunk).float() / temperature).log_softmax(-1)
            log_p[chunk] = of_all.gather(-1, tokens[chunk, None])[:, 0]
        return log_p

    def explain_non_finite(self, loss: TokenLoss) -> str | None:
        """As [`Targets.explain_non_finite`]: hidden states or logits that overflow, or ids that are ruled out."""
        logits = self.head(self.hidden[:, :1])
        causes = (
            (
                not torch.isfinite(self.hidden).all(),
                f"The teacher's hidden states overflow in {self.hidden.dtype}, with weights that are finite. Load it "
                "in bfloat16 or float32 (`teacher_model_init_kwargs`).",
            ),
            (
                (logits == -math.inf).any(),
                f"The teacher gives some ids a logit of -inf, and {loss.divergence.name!r} has no finite value where "
                "only one of the two models rules an id out. Use 'forward_kl', 'jsd' or 'tvd', which are defined "
                "there.",
            ),
            (
                not torch.isfinite(logits).all(),
                "The teacher's logits overflow in its head's dtype. Load it in bfloat16 or float32.",
            ),
        )
        return next((words for is_it, words in causes if is_it), None)


class LiveTeacher(Teacher):
    """A frozen model in memory: the target, or a reference draft.

    Args:
        model (`PreTrainedModel`): The model, which is put in eval mode and frozen for good.
        accelerator (`Accelerator`): Prepares it (device, precision), and shards it in a run with ZeRO-3 or FSDP2.
        vocab_size (`int`): Number of real ids.
        name (`str`, *optional*): Its path or Hub id; read from its config by default.
    """

    columns = ()

    def __init__(self, model: PreTrainedModel, accelerator: Accelerator, vocab_size: int, name: str | None = None):
        model.eval().requires_grad_(False)
        self.name = name or get_config_model_id(model.config)
        self._head = LogitHead.of(model, vocab_size)
        # float16 weights do not mix with bfloat16: norms on a CPU refuse, and rounding once is enough
        self._has_own_precision = False
        is_sharded = accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP)
        if not is_sharded and model.dtype == torch.float16 and accelerator.mixed_precision == "bf16":
            self._has_own_precision = True
            self.model = model.to(accelerator.device)
        else:
            self.model = prepare_frozen(model, accelerator)

    @torch.no_grad()
    def compute_targets(self, inputs: JsonObject) -> LiveTargets:
        """Runs the model over the draft's own inputs (ids, mask or position ids; labels are left out)."""
        inputs = {key: value for key, value in inputs.items() if key not in ("labels", "output_router_logits")}
        device = inputs["input_ids"].device.type
        with torch.autocast(device, enabled=False) if self._has_own_precision else nullcontext():
            hidden = compute_last_hidden_states(self.model, self._head.module, **inputs)
        return LiveTargets(hidden, self._head)


def load_teacher(
    teacher_model: str | PreTrainedModel, init_kwargs: InitKwargs, is_distributed: bool, **defaults: Argument
) -> PreTrainedModel:
    """The teacher as a model: a path or Hub id is loaded ([`load_model`]), a model is returned as it is.

    Args:
        teacher_model (`str` or `PreTrainedModel`): The model, its path or its Hub id.
        init_kwargs (`dict`, *optional*): Arguments of `from_pretrained` (`teacher_model_init_kwargs`).
        is_distributed (`bool`): Whether several processes train; each then loads it on its own device.
        defaults: Arguments of `from_pretrained` that `init_kwargs` may replace.

    Raises:
        ValueError: If `init_kwargs` come with a model that is already loaded, and as
            [`~spec_kd.sharding.check_placement`].
    """
    check_placement(None if isinstance(teacher_model, str) else teacher_model, to_dict(init_kwargs), is_distributed)
    if not isinstance(teacher_model, str):
        if init_kwargs:
            raise ValueError(
                f"`teacher_model_init_kwargs` {sorted(init_kwargs)} came with a `teacher_model` that is already a "
                "model. Pass the teacher's path, or drop the arguments."
            )
        return teacher_model
    kwargs = defaults | to_dict(init_kwargs) | ({"device_map": None} if is_distributed else {})
    return cast(PreTrainedModel, load_model(teacher_model, **kwargs))  # an adapter has its base's attributes
