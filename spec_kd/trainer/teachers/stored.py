"""The teacher of a white-box run as columns of the dataset: what it thought when it wrote, and no model."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from spec_kd.data.signal_checks import check_same_teacher
from spec_kd.data.teacher_signal import TeacherInfo
from spec_kd.data.token_columns import LOGPROB_COLUMN, SPARSE_COLUMN, SPARSE_TENSORS
from spec_kd.losses import SparseTensors, TokenLoss
from spec_kd.open_types import JsonObject
from spec_kd.vocabulary import VocabularyMismatchError, count_real_ids, fingerprint_tokenizer


@dataclass(frozen=True)
class StoredTargets:
    """The teacher's columns of a batch.

    Args:
        info (`TeacherInfo`): What they are of.
        columns (`dict[str, torch.Tensor]`): `teacher_token_logprobs` `(B, T)` or the tensors of `SPARSE_TENSORS`.
        input_ids (`torch.Tensor`): int64 `(B, T)`.
    """

    info: TeacherInfo
    columns: dict[str, torch.Tensor]
    input_ids: torch.Tensor

    def compute_tail_mass(self, labels: torch.Tensor) -> torch.Tensor | None:
        """Of a coarsened teacher: the probability outside of its ids at every token of the loss, `(N,)`."""
        if self.info.sparse_method.is_sampled:
            return None
        return 1.0 - self.columns[SPARSE_TENSORS["log_p"]][labels != -100].exp().sum(-1)

    def select(self, mask: torch.Tensor) -> SparseTensors:
        """The positions of the loss: `mask` is bool `(B, T - 1)`, true where the *next* token belongs to it."""
        columns = {name: tensor[:, 1:].to(mask.device)[mask] for name, tensor in self.columns.items()}
        method = self.info.sparse_method
        if method.name == "token_only":
            ids = self.input_ids[:, 1:].to(mask.device)[mask][:, None]  # (N, 1)
            log_p = columns[LOGPROB_COLUMN][:, None]
            return SparseTensors(method, ids, log_p, torch.ones_like(log_p))
        ids = columns[SPARSE_TENSORS["id"]].long()  # (N, K)
        log_p, weights = columns[SPARSE_TENSORS["log_p"]], columns[SPARSE_TENSORS["weight"]]
        if not method.is_sampled:
            return SparseTensors(method, ids, log_p)
        log_p = log_p.masked_fill(weights == 0, 0.0) if method.has_log_p else None
        return SparseTensors(method, ids, log_p, weights)


class StoredTeacher:
    """Reads the teacher's columns from batches.

    Args:
        info (`TeacherInfo`): Of the training set.
    """

    def __init__(self, info: TeacherInfo):
        self.info = info
        is_token_only = info.method == "token_only"
        self.columns = (LOGPROB_COLUMN,) if is_token_only else (SPARSE_COLUMN,)
        self.tensor_names = (LOGPROB_COLUMN,) if is_token_only else tuple(SPARSE_TENSORS.values())

    def compute_signal(self, inputs: JsonObject) -> StoredTargets:
        """Takes the columns out of `inputs`."""
        if not set(self.tensor_names) <= inputs.keys():
            raise ValueError(
                f"A batch comes without the teacher's signal ({self.info.method!r}), which this trainer learns from. "
                "Give `evaluate` a dataset made as the training set was: `generate_responses(..., "
                "teacher_signal=...)`."
            )
        return StoredTargets(self.info, {name: inputs.pop(name) for name in self.tensor_names}, inputs["input_ids"])


def read_teacher_info(dataset: Dataset | IterableDataset | None) -> TeacherInfo | None:
    """What the teacher columns of a dataset are of, or `None` if it has none.

    Raises:
        ValueError: If parts of it were made in ways that one loss cannot mean together. (A stream is known by its first
            row.)
    """
    if dataset is None or "teacher_info" not in (dataset.column_names or next(iter(dataset))):
        return None
    texts: Iterable[str] = dataset.unique("teacher_info") if isinstance(dataset, Dataset) else [_first(dataset)]
    infos = [TeacherInfo.from_json(text) for text in texts]
    check_same_teacher(infos)
    return infos[0]


def _first(dataset: IterableDataset) -> str:
    return next(iter(dataset))["teacher_info"]


def check_evaluation_signal(eval_dataset: Any, info: TeacherInfo) -> None:
    """Raises `ValueError` unless every evaluation set has a signal of the training set's kind."""
    datasets = eval_dataset if isinstance(eval_dataset, dict) else {"evaluation": eval_dataset}
    for name, dataset in datasets.items():
        found = read_teacher_info(dataset)
        if dataset is not None and (found is None or found.sparse_method != info.sparse_method):
            what = "no teacher signal" if found is None else f"a teacher signal of {found.method!r}"
            raise ValueError(
                f"The {name} dataset has {what}, the training set one of {info.method!r}. Make both the same way, or "
                "leave `eval_dataset` out and measure acceptance with `SpeculativeEvalCallback`."
            )


def check_stored_teacher(info: TeacherInfo, loss: TokenLoss, processing_class: PreTrainedTokenizerBase) -> None:
    """Raises before any work if the columns cannot serve the loss.

    Raises:
        VocabularyMismatchError: If the dataset was made with another tokenizer.
        ValueError: If the method does not serve the divergence or the token selection, or the log-probabilities are of
            a distribution at another temperature.
    """
    ids, fingerprint = count_real_ids(processing_class), fingerprint_tokenizer(processing_class)
    if info.vocab_size != ids or info.tokenizer != fingerprint:
        raise VocabularyMismatchError(
            f"The teacher signal was made with another tokenizer ({info.vocab_size} ids, hash {info.tokenizer}) "
            f"than the draft's ({ids} ids, {fingerprint}): its ids mean other tokens. Pass the target's tokenizer as "
            "`processing_class` with a draft of its family, or train on the text with BlackBoxSFTTrainer."
        )
    if loss.temperature != info.logprobs_temperature:
        raise ValueError(
            f"The teacher's log-probabilities are of its distribution at temperature {info.logprobs_temperature}, and "
            f"`temperature={loss.temperature}` would need the whole distribution. Set `temperature="
            f"{info.logprobs_temperature}`, or use a live `teacher_model`."
        )
    if info.method == "token_only" and info.sampling_temperature != info.logprobs_temperature:
        known = info.sampling_temperature is not None
        text = f"of temperature {info.sampling_temperature}" if known else "of unknown sampling"
        raise ValueError(
            f"The only signal is the log-probability of the written token ({info.logprobs_mode}, at temperature "
            f"{info.logprobs_temperature}), but the text is {text}: the token is then no draw from that distribution, "
            "and the loss would be biased. Needed are processed log-probabilities, or a signal such as "
            "'sampled_logprobs' (`score_completions` adds it), or BlackBoxSFTTrainer, which learns the text alone."
        )
    loss.check_served_by(info.sparse_method)
