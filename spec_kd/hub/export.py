"""Exports a trained draft to a folder that every serving engine can load."""

import copy
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from spec_kd.files import STAGING, explain_full_disk, finish_replacement, replace_model
from spec_kd.finite import check_finite_weights
from spec_kd.heads import unwrap_peft
from spec_kd.hub.card import carry_model_card
from spec_kd.loading import find_processing_class, load_model, load_tokenizer
from spec_kd.options import check_int, read_path, refuse
from spec_kd.serving import find_serving_engine
from spec_kd.serving.check import check_saved_form
from spec_kd.vocabulary import ProcessingClass, align_vocabulary, count_real_ids

logger = logging.getLogger(__name__)


def export_draft(
    draft: PreTrainedModel | PeftModel | str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    processing_class: ProcessingClass | None = None,
    target_vocab_size: int | None = None,
    merge_adapter: bool = True,
    target: PreTrainedModel | PeftModel | str | os.PathLike[str] | None = None,
    serving_engines: Sequence[str] = (),
    refuse_findings: bool = True,
) -> Path:
    """Saves a draft as servers need it: one model without an adapter, with as many vocabulary rows as the target.

    The model that is passed is not changed: the adapter is merged and the vocabulary aligned in a copy. Files are
    written to a hidden folder in `output_dir`, and moved to their places when they are complete. Weights of an earlier
    save are removed last, and other files stay. If the call is killed, the next call with this folder, as `draft` or as
    `output_dir`, finishes the move or removes incomplete files. The model card of `draft` is copied too; a draft that
    has none gets a new one.

    Args:
        draft (`PreTrainedModel`, `PeftModel` or path):
            The trained draft. A folder with an `adapter_config.json` is loaded as an adapter on its base model.
        output_dir (`str` or `os.PathLike`):
            Folder for the files; created if it does not exist. It may be the folder from which `draft` is loaded.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*):
            Saved with the weights. Give the target's, because the draft will read the target's ids. By default it is
            loaded from `draft` if that is a path, and otherwise none is saved.
        target_vocab_size (`int`, *optional*):
            Number of rows of the target's head (`target.config.vocab_size`). The draft's head is padded or cut to it,
            see [`align_vocabulary`]; by default it stays as it is.
        merge_adapter (`bool`, *optional*, defaults to `True`):
            Whether the adapter of a PEFT draft is merged into its base model. `False` saves it as an adapter.
        target (`PreTrainedModel`, `PeftModel` or path, *optional*):
            The target, which `serving_engines` needs; a model must know the folder of its tokenizer.
        serving_engines (`Sequence[str]`, *optional*, defaults to `()`):
            Engines that will serve the draft. [`check_serving`] runs for each on the model that is to be saved, and the
            model card shows what it found.
        refuse_findings (`bool`, *optional*, defaults to `True`):
            Whether a finding that makes the draft of no use in an engine is an error. Others are logged.

    Returns:
        `Path`: `output_dir`.

    Raises:
        ValueError: Before anything is written: there is no processing class to align by, an adapter is to be aligned
            but not merged, the base model of an adapter that is not merged is in `output_dir`, an adapter is to be
            merged into a quantized base model, the weights are partitioned by ZeRO-3, tokens of the processing class
            have ids beyond the target's rows, or an engine cannot serve the draft.
        OSError: `output_dir` cannot be created, or there is no room for the files.
    """
    output_dir = Path(read_path("output_dir", output_dir))
    check_int("target_vocab_size", target_vocab_size, is_optional=True)
    for engine in serving_engines:
        find_serving_engine(engine)
    if serving_engines and target is None:
        raise ValueError("`serving_engines` needs `target`, the model that the draft will be served with.")
    finish_replacement(output_dir)
    source, is_ours = None, isinstance(draft, str | os.PathLike)  # a model that is loaded here may be changed
    if isinstance(draft, str | os.PathLike):
        source = Path(read_path("draft", draft))
        draft, processing_class = _load(source, processing_class)
    elif not isinstance(draft, torch.nn.Module):
        raise ValueError(f"`draft` is {draft!r:.80}, but must be a model or its path.")
    adapter = draft if isinstance(draft, PeftModel) else None
    is_adapter_kept = adapter is not None and not merge_adapter
    refuse(
        (
            any(hasattr(parameter, "ds_id") for parameter in draft.parameters()),
            "The draft's weights are partitioned by ZeRO-3. Save it with the trainer, then export it from that path.",
        ),
        (
            target_vocab_size is not None and processing_class is None,
            "`target_vocab_size` needs `processing_class`, to know which rows are in use.",
        ),
        (
            adapter is not None and merge_adapter and getattr(unwrap_peft(adapter), "is_quantized", False),
            "The adapter has a quantized base model, and merging into it would round the adapter. Save the adapter and "
            "export it from its path, which loads the base model in its own precision.",
        ),
        (
            is_adapter_kept and target_vocab_size is not None,
            "`target_vocab_size` needs `merge_adapter=True`: rows of an adapter's base model cannot be aligned.",
        ),
        (
            is_adapter_kept and adapter is not None and _is_base_in(adapter, output_dir),
            f"The adapter's base model is in `{output_dir}`, and saving the adapter there would remove it. Choose "
            "another `output_dir`, or merge the adapter.",
        ),
    )
    check_finite_weights(draft, "draft")
    staging = output_dir / STAGING
    try:
        staging.mkdir(parents=True)
    except OSError as error:
        raise OSError(f"`output_dir={str(output_dir)!r}` cannot be written to ({error}).") from error
    try:
        if adapter is not None and merge_adapter:
            draft, is_ours = _merge(adapter if is_ours else copy.deepcopy(adapter)), True
        if target_vocab_size is not None and processing_class is not None:
            draft = cast(PreTrainedModel, draft if is_ours else copy.deepcopy(draft))
            align_vocabulary(draft, target_vocab_size, count_real_ids(processing_class))
        findings = []
        if target is not None and serving_engines:
            findings = check_saved_form(
                draft, processing_class, output_dir, target, serving_engines, refuse_errors=refuse_findings
            )
            for finding in findings:
                logger.warning("%s", finding)
        with explain_full_disk(output_dir, "what was there before is complete"):
            draft.save_pretrained(str(staging))
            if processing_class is not None:
                processing_class.save_pretrained(staging)
            replace_model(output_dir)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    carry_model_card(source, output_dir, checked=(serving_engines, findings))
    return output_dir


def _load(path: Path, processing_class: ProcessingClass | None) -> tuple[PreTrainedModel | PeftModel, ProcessingClass]:
    if not path.is_dir():
        raise ValueError(f"`draft={str(path)!r}` is neither a model nor a folder.")
    finish_replacement(path)
    processing_class = processing_class or find_processing_class(path) or load_tokenizer(path)
    return load_model(path, dtype="auto", device_map=None), processing_class


def _merge(draft: PeftModel) -> PreTrainedModel:
    base = unwrap_peft(draft)
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    if isinstance(head, BaseTunerLayer) or isinstance(embedding, BaseTunerLayer):
        # If head and embedding share a matrix, merging the update of one would change the other.
        layer = cast(torch.nn.Linear, head.get_base_layer() if isinstance(head, BaseTunerLayer) else head)
        layer.weight = torch.nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    merged = draft.merge_and_unload()
    if merged.get_output_embeddings().weight is not merged.get_input_embeddings().weight:
        # If they were loaded as one matrix, one of the two would be lost.
        merged.config.get_text_config().tie_word_embeddings = merged.config.tie_word_embeddings = False
    return merged


def _is_base_in(draft: PeftModel, folder: Path) -> bool:
    """Whether the base model of an adapter is in this folder."""
    base = draft.peft_config[draft.active_adapter].base_model_name_or_path
    return bool(base and Path(base).is_dir() and folder.is_dir() and Path(base).samefile(folder))
