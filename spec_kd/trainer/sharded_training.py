"""Training a draft whose parameters the processes share (FSDP2)."""

from torch.distributed.fsdp import StateDictType
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from spec_kd.heads import is_whole
from spec_kd.open_types import Argument
from spec_kd.sharding import check_fsdp
from spec_kd.trainer.checkpoint_sums import is_checkpoint_name


class ShardedTraining(Trainer):
    """A base class of a trainer, before its others: refuses FSDP1, and saves a whole model from one that is sharded.

    A model is sharded when training begins, so that `evaluate` and `predict` before that are refused.

    A checkpoint has the form that `fsdp_state_dict_type` says.
    """

    def create_accelerator_and_postprocess(self) -> None:
        """As `Trainer.create_accelerator_and_postprocess`; raises `ValueError` for FSDP1."""
        super().create_accelerator_and_postprocess()
        check_fsdp(self.accelerator)

    def evaluation_loop(self, *args: Argument, **kwargs: Argument) -> EvalLoopOutput:  # type: ignore[explicit-any]  # its fields
        """As `Trainer.evaluation_loop`; raises `ValueError` under FSDP2 before training has sharded the model."""
        if self.is_fsdp_enabled and self.model is not None and is_whole(self.model):
            raise ValueError(
                "Accelerate shards a model together with its optimizer, which `train` makes, so FSDP2 cannot evaluate "
                "before it. Set `eval_on_start=True` to evaluate before the first step, or evaluate in a run without "
                "FSDP2."
            )
        return super().evaluation_loop(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`; outside of checkpoints always with the weights, as one model."""
        output_dir = str(self.args.output_dir if output_dir is None else output_dir)
        if not self.is_fsdp_enabled or is_checkpoint_name(output_dir):
            return super().save_model(output_dir, _internal_call)
        plugin = self.accelerator.state.fsdp_plugin
        chosen, plugin.state_dict_type = plugin.state_dict_type, StateDictType.FULL_STATE_DICT
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            plugin.state_dict_type = chosen
