"""Teachers that are columns of the dataset: what was stored when the target wrote, or what serving left of it."""

from dataclasses import dataclass

import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel

from spec_kd._private import get_config_model_id
from spec_kd.data.signal_checks import check_same_teacher
from spec_kd.data.teacher_signal import TeacherInfo
from spec_kd.data.token_columns import LOGPROB_COLUMN, SPARSE_COLUMN, SPARSE_TENSORS
from spec_kd.losses import Divergence, SignalSpec, SparseTensors, TokenLoss
from spec_kd.open_types import JsonObject
from spec_kd.options import refuse
from spec_kd.sampling.options import SamplingOptions
from spec_kd.trainer.arguments import AnyDataset
from spec_kd.trainer.teachers.live import LiveTeacher, Targets, Teacher
from spec_kd.vocabulary import ProcessingClass, VocabularyMismatchError, count_real_ids, fingerprint_tokenizer


@dataclass(frozen=True)
class StoredTargets(Targets):
    """The teacher's columns of a batch.

    Args:
        info (`TeacherInfo`): Describes the columns.
        columns (`dict[str, torch.Tensor]`): `teacher_token_logprobs` `(B, T)` or the tensors of `SPARSE_TENSORS`.
        input_ids (`torch.Tensor`): int64 `(B, T)`.
    """

    info: TeacherInfo
    columns: dict[str, torch.Tensor]
    input_ids: torch.Tensor

    @property
    def alpha_metric(self) -> str | None:
        """As [`Targets.alpha_metric`]: a coarsened teacher gives an upper bound, counts alone give nothing."""
        return self.info.sparse_method.alpha_metric

    def compute_tail_mass(self, labels: torch.Tensor) -> torch.Tensor | None:
        """As [`Targets.compute_tail_mass`], of a coarsened teacher."""
        log_p = self.columns.get(SPARSE_TENSORS["log_p"])
        return None if log_p is None else self.info.sparse_method.compute_tail_mass(log_p[labels != -100])

    def compute_token_log_p(self, mask: torch.Tensor, tokens: torch.Tensor, temperature: float) -> torch.Tensor:
        """As [`Targets.compute_token_log_p`]: the column, which is at the loss temperature."""
        return self.columns[LOGPROB_COLUMN][:, 1:].to(mask.device)[mask]

    def select(self, mask: torch.Tensor) -> SparseTensors:
        """As [`Targets.select`]."""
        columns = {name: tensor[:, 1:].to(mask.device)[mask] for name, tensor in self.columns.items()}
        method = self.info.sparse_method
        if method.keeps_ids:  # (N, K)
            return method.build_tensors(*(columns[SPARSE_TENSORS[name]] for name in ("id", "log_p", "weight")))
        ids = self.input_ids[:, 1:].to(mask.device)[mask][:, None]  # (N, 1)
        log_p = columns[LOGPROB_COLUMN][:, None]
        return method.build_tensors(ids, log_p, torch.ones_like(log_p))


class StoredTeacher(Teacher):
    """Reads the teacher's columns from batches.

    Args:
        info (`TeacherInfo`): Describes the columns of the training set.
        reads_confidence (`bool`, *optional*, defaults to `False`):
            Whether the target's log-probability of the written token is read besides what the signal keeps.
    """

    model: PreTrainedModel | None = None

    def __init__(self, info: TeacherInfo, reads_confidence: bool = False):
        self.info, self.name = info, info.target_name
        keeps_ids = info.sparse_method.keeps_ids
        logprobs = (LOGPROB_COLUMN,) if reads_confidence or not keeps_ids else ()
        self.columns = (*((SPARSE_COLUMN,) if keeps_ids else ()), *logprobs)
        self.tensor_names = (*(SPARSE_TENSORS.values() if keeps_ids else ()), *logprobs)

    def compute_targets(self, inputs: JsonObject) -> Targets:
        """Takes the columns out of `inputs`; raises `ValueError` if they are not there."""
        if not set(self.tensor_names) <= inputs.keys():
            raise ValueError(
                f"A batch comes without the teacher's signal ({self.info.method!r}), which this trainer learns from. "
                "Give `evaluate` a dataset that was made as the training set was: `generate_responses(..., "
                "teacher_signal=...)`."
            )
        return StoredTargets(self.info, {name: inputs.pop(name) for name in self.tensor_names}, inputs["input_ids"])

    def describe_service(self, divergence: Divergence) -> str:
        """As [`Teacher.describe_service`]: for instance `"unbiased from sampled_logprobs"`."""
        return f"{self.info.sparse_method.describe_service(divergence)} from {self.info.method}"


class ServedTeacher(StoredTeacher):
    """For served completions, the signal that serving left; for any others (an evaluation set), the live target.

    Args:
        info (`TeacherInfo`): Describes the signal.
        live (`LiveTeacher`): The target.
    """

    def __init__(self, info: TeacherInfo, live: LiveTeacher):
        super().__init__(info)
        self._live, self.model = live, live.model

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
        signal (`SignalSpec`): What to keep, complete.
        temperature (`float`): Temperature of the distribution that is kept: that of the loss.
    """
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


def read_teacher_info(dataset: Dataset | IterableDataset | None) -> TeacherInfo | None:
    """Describes the teacher columns of a dataset (of a stream, by its first row); `None` if there are none.

    Raises:
        ValueError: If the dataset mixes signals of several kinds, or of several targets.
    """
    if dataset is None or "teacher_info" not in (dataset.column_names or next(iter(dataset))):
        return None
    stored = dataset.unique("teacher_info") if isinstance(dataset, Dataset) else [next(iter(dataset))["teacher_info"]]
    infos = [TeacherInfo.from_json(entry) for entry in stored]
    check_same_teacher(infos)
    return infos[0]


def find_target_name(dataset: AnyDataset | None) -> str | None:
    """The target that wrote a dataset, if its rows say so."""
    if not isinstance(dataset, Dataset):
        return None
    try:
        info = read_teacher_info(dataset)
    except ValueError:  # of several targets, or damaged, which the reader of the signal reports
        return None
    return info.target_name if info is not None else None


def check_stored_teacher(info: TeacherInfo, loss: TokenLoss, processing_class: ProcessingClass) -> None:
    """Checks, before any work, that the teacher's columns serve the loss.

    Raises:
        VocabularyMismatchError: If the dataset was made with another tokenizer.
        ValueError: If the method does not serve the divergence or the token selection, or if the log-probabilities
            belong to another temperature.
    """
    ids, fingerprint = count_real_ids(processing_class), fingerprint_tokenizer(processing_class)
    if info.vocab_size != ids or info.tokenizer != fingerprint:
        raise VocabularyMismatchError(
            f"The teacher signal was made with another tokenizer ({info.vocab_size} ids, hash {info.tokenizer}) "
            f"than the draft's ({ids} ids, {fingerprint}): its ids mean other tokens. Pass the target's tokenizer as "
            "`processing_class` with a draft of its family, or train on the completions with BlackBoxSFTTrainer."
        )
    sampled_at = info.sampling_temperature
    sampling = "of unknown sampling" if sampled_at is None else f"sampled at temperature {sampled_at}"
    refuse(
        (
            loss.temperature != info.logprobs_temperature,
            f"The teacher's log-probabilities are of its distribution at temperature {info.logprobs_temperature}, and "
            f"`temperature={loss.temperature}` would need the whole distribution. Set `temperature="
            f"{info.logprobs_temperature}`, or use a live `teacher_model`.",
        ),
        (
            not info.sparse_method.keeps_ids and sampled_at != info.logprobs_temperature,
            f"The only signal is the log-probability of the written token ({info.logprobs_mode}, at temperature "
            f"{info.logprobs_temperature}), but the completions are {sampling}: the tokens are not drawn from that "
            "distribution, and the loss would be biased. Use processed log-probabilities, a signal such as "
            "'sampled_logprobs' (`score_completions` adds it), or BlackBoxSFTTrainer, which needs no signal.",
        ),
    )
    loss.check_served_by(info.sparse_method)
