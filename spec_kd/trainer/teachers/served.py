"""The teacher of a streaming run: what speculative decoding left of the target's distribution while it served."""

from transformers import PreTrainedModel

from spec_kd._private import get_config_model_id
from spec_kd.data.teacher_signal import TeacherInfo
from spec_kd.losses import SignalSpec
from spec_kd.open_types import JsonObject
from spec_kd.sampling.options import SamplingOptions
from spec_kd.trainer.teachers.base import Targets
from spec_kd.trainer.teachers.live import LiveTeacher
from spec_kd.trainer.teachers.stored import StoredTeacher
from spec_kd.vocabulary import ProcessingClass, count_real_ids, fingerprint_tokenizer


class ServedTeacher(StoredTeacher):
    """For served completions, the signal that serving left; for any others (an evaluation set), the live target.

    Args:
        info (`TeacherInfo`): Describes the signal.
        live (`LiveTeacher`): The target.
    """

    def __init__(self, info: TeacherInfo, live: LiveTeacher):
        super().__init__(info)
        self._live = live
        self.model = live.model

    def compute_targets(self, inputs: JsonObject) -> Targets:
        """Takes the columns out of `inputs`, or runs the target over inputs without them."""
        has_columns = any(name in inputs for name in self.tensor_names)
        return super().compute_targets(inputs) if has_columns else self._live.compute_targets(inputs)


def describe_served_signal(
    target: PreTrainedModel,
    processing_class: ProcessingClass,
    options: SamplingOptions,
    signal: SignalSpec,
    temperature: float,
) -> TeacherInfo:
    """Describes what is kept of the target's distribution while it serves.

    Args:
        target (`PreTrainedModel`): The target.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`): Its tokenizer.
        options (`SamplingOptions`): How requests are served.
        signal (`SignalSpec`): What to keep.
        temperature (`float`): Temperature of the distribution that is kept: that of the loss.

    Raises:
        ValueError: For an unknown method, or a number out of its range.
    """
    signal = signal.complete()
    name = get_config_model_id(target.config)
    return TeacherInfo(
        target_name=name,
        target=name or type(target).__name__,
        tokenizer=fingerprint_tokenizer(processing_class),
        vocab_size=count_real_ids(processing_class),
        engine="speculative decoding",
        method=signal.method,
        num_draws=signal.num_draws,
        top_k=signal.top_k,
        sampling_temperature=options.temperature,
        max_new_tokens=options.max_new_tokens,
        logprobs_mode="processed",
        logprobs_temperature=temperature,
    )
