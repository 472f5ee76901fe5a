"""Scores of a reference draft as a column: AdaSPEC without the reference in memory."""

from collections.abc import Sequence
from typing import cast

import torch
from datasets import Dataset, Features, List, Value, concatenate_datasets
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from spec_kd.data.token_columns import REFERENCE_COLUMN
from spec_kd.heads import LogitHead, compute_last_hidden_states, evaluation_mode, find_input_device
from spec_kd.losses import ForwardKL, fused_linear_divergence
from spec_kd.open_types import JsonObject
from spec_kd.options import check_dataset, check_int, check_number
from spec_kd.probes import check_padding, check_plain_head
from spec_kd.progress import RowProgress
from spec_kd.stored_sets import check_stored_set


def add_reference_scores(
    dataset: Dataset,
    ref_model: PreTrainedModel,
    teacher_model: PreTrainedModel,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    batch_size: int = 8,
    show_progress: bool = True,
) -> Dataset:
    """Adds the column `reference_forward_kl`: KL(p‖q_ref) at every completion token, for `token_selection="adaspec"`.

    Args:
        dataset (`Dataset`): Responses with `prompt_ids` and `completion_ids`.
        ref_model (`PreTrainedModel`): A draft that was distilled before, whose head is a plain matrix.
        teacher_model (`PreTrainedModel`): The target.
        vocab_size (`int`): Number of real ids (`spec_kd.vocabulary.count_real_ids(tokenizer)`).
        temperature (`float`, *optional*, defaults to `1.0`): Loss temperature of the later training.
        batch_size (`int`, *optional*, defaults to `8`): Rows at a time.
        show_progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.

    Returns:
        `Dataset`: The rows with the column: float32, one entry per completion token.

    Raises:
        ValueError: If the dataset has no ids, or has the column already.
    """
    check_dataset("dataset", dataset)
    check_int("vocab_size", vocab_size)
    check_int("batch_size", batch_size)
    check_number("temperature", temperature, above=0)
    if not {"prompt_ids", "completion_ids"} <= set(dataset.column_names):
        raise ValueError(
            f"The dataset has the columns {dataset.column_names}; scores belong to ids. Create it with "
            "`spec_kd.generate_responses`, which keeps `prompt_ids` and `completion_ids`."
        )
    if REFERENCE_COLUMN in dataset.column_names:
        raise ValueError(f"The dataset has `{REFERENCE_COLUMN}` already. Remove the column to score it again.")
    check_stored_set(dataset)
    models = (ref_model, teacher_model)
    check_plain_head(ref_model, "reference")
    for role, model in zip(("reference", "target"), models, strict=True):
        check_padding(model, role)
    lengths = [len(p) + len(c) for p, c in zip(dataset["prompt_ids"], dataset["completion_ids"], strict=True)]
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    scores: list[list[float]] = [[]] * len(order)
    with RowProgress(len(order), "Reference scores", show_progress) as progress, evaluation_mode(*models):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = [dataset[i] for i in rows]
            values = _score(models, batch, vocab_size, temperature).cpu()
            for i, part in zip(rows, values.split([len(row["completion_ids"]) for row in batch]), strict=True):
                scores[i] = part.tolist()
            progress.advance(len(values), len(rows))
    features = Features({REFERENCE_COLUMN: List(Value("float32"))})
    return concatenate_datasets([dataset, Dataset.from_dict({REFERENCE_COLUMN: scores}, features=features)], axis=1)


def _score(
    models: Sequence[PreTrainedModel], batch: list[JsonObject], vocab_size: int, temperature: float
) -> torch.Tensor:
    """KL(p‖q_ref) of the batch's N completion tokens, row after row, float32 `(N,)`."""
    ids = pad_sequence([torch.tensor(row["prompt_ids"] + row["completion_ids"]) for row in batch], batch_first=True)
    positions = torch.arange(ids.shape[1])
    starts = torch.tensor([len(row["prompt_ids"]) for row in batch])[:, None]
    ends = starts + torch.tensor([len(row["completion_ids"]) for row in batch])[:, None]
    predicts = (positions >= starts - 1) & (positions < ends - 1)  # (B, T)
    hidden = []
    for model in models:
        device = find_input_device(model)
        inputs = {"input_ids": ids.to(device), "attention_mask": (positions < ends).long().to(device)}
        states = compute_last_hidden_states(model, model.get_output_embeddings(), **inputs)  # (B, T, H)
        hidden.append(states[predicts.to(device)])  # (N, H)
    reference, head = LogitHead.of(models[0], vocab_size), LogitHead.of(models[1], vocab_size)
    weight = cast(torch.Tensor, reference.module.weight)
    device = weight.device
    return fused_linear_divergence(
        hidden[0].to(device),
        weight,
        lambda chunk: head(hidden[1][chunk]).to(device),
        ids.roll(-1, dims=1)[predicts].to(device),
        divergence=ForwardKL(),
        bias=getattr(reference.module, "bias", None),
        temperature=temperature,
        logit_scale=reference.transform.scale,
        softcap=reference.transform.softcap,
        vocab_size=vocab_size,
    ).divergence
