"""From a model in training to a folder that every engine loads as a draft."""

import copy
import os
import shutil
from pathlib import Path
from typing import cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from spec_kd.checks import check_int, read_path
from spec_kd.files import explain_full_disk
from spec_kd.finite import check_finite_weights
from spec_kd.heads import unwrap_peft
from spec_kd.hub.card import carry_model_card
from spec_kd.loading import find_processing_class, load_model, load_tokenizer
from spec_kd.model_folders import STAGING, finish_replacement, replace_model
from spec_kd.vocabulary import ProcessingClass, align_vocabulary, count_real_ids


def export_draft(
    draft: PreTrainedModel | PeftModel | str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    processing_class: ProcessingClass | None = None,
    target_vocab_size: int | None = None,
    merge_adapter: bool = True,
) -> Path:
    """Saves a draft in the form that servers take: one model, no adapter, as many vocabulary rows as the target.

    The model given is left as it is: merging and aligning happen on a copy. Files are written to a hidden folder in
    `output_dir` and moved to their places once they are whole: weights first, then the configuration; weights of an
    earlier save are removed last, other files stay. A call that was killed in between loses nothing: the next one with
    this folder, as `draft` or as `output_dir`, finishes the move or removes what was not whole. The model card of
    `draft` comes with it; without one, one is started.

    Args:
        draft (`PreTrainedModel`, `PeftModel` or path):
            The trained draft. A folder with an `adapter_config.json` is loaded as an adapter on its base model.
        output_dir (`str` or `os.PathLike`): Created if needed; may be the folder that `draft` was loaded from.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*):
            Saved beside the weights; give the target's, since the draft will read the target's ids. Loaded from `draft`
            if that is a path.
        target_vocab_size (`int`, *optional*):
            Rows of the target's head (`target.config.vocab_size`); the draft's are padded or cut to it, see
            [`align_vocabulary`].
        merge_adapter (`bool`): `False` saves a PEFT draft as an adapter.

    Returns:
        `Path`: `output_dir`.

    Raises:
        `ValueError`: Before anything is written: no processing class to align by, an adapter to be aligned but not
            merged, an adapter whose base is the model in `output_dir`, a quantized base to be merged into, partitioned
            (ZeRO-3) weights, real ids beyond the target's rows.
        `OSError`: `output_dir` cannot be created, or there is no room for the files.
    """
    output_dir = read_path("output_dir", output_dir)
    check_int("target_vocab_size", target_vocab_size, is_optional=True)
    is_ours = isinstance(draft, str | os.PathLike)  # loaded here, so nobody minds if it changes
    finish_replacement(output_dir)
    source = None
    if is_ours:
        source = Path(read_path("draft", draft))
        draft, processing_class = _load(source, processing_class)
    elif not isinstance(draft, torch.nn.Module):
        raise ValueError(f"`draft` is {draft!r:.80}, but must be a model or its path.")
    if any(hasattr(parameter, "ds_id") for parameter in draft.parameters()):
        raise ValueError(
            "The draft's weights are partitioned by ZeRO-3. Save it with the trainer, then export it from that path."
        )
    check_finite_weights(draft, "draft")
    adapter = draft if isinstance(draft, PeftModel) else None
    if target_vocab_size is not None and processing_class is None:
        raise ValueError("`target_vocab_size` needs `processing_class`, to know which rows are in use.")
    if adapter is not None and merge_adapter and getattr(unwrap_peft(adapter), "is_quantized", False):
        raise ValueError(
            "The adapter sits on a quantized base, and merging into that would round it. Save the adapter and export "
            "it from its path, which loads the base in its own precision."
        )
    if adapter is not None and not merge_adapter and target_vocab_size is not None:
        raise ValueError("`target_vocab_size` needs `merge_adapter=True`: rows of an adapter's base cannot be aligned.")
    output_dir = Path(output_dir)
    if adapter is not None and not merge_adapter:
        _check_base_stays(adapter, output_dir)
    staging = output_dir / STAGING
    try:
        staging.mkdir(parents=True)
    except OSError as error:
        raise OSError(f"`output_dir={str(output_dir)!r}` cannot be written to ({error}).") from error
    try:
        if adapter is not None and merge_adapter:
            draft = _merge(adapter if is_ours else copy.deepcopy(adapter))
            is_ours = True
        if target_vocab_size is not None and processing_class is not None:
            draft = cast(PreTrainedModel, draft if is_ours else copy.deepcopy(draft))
            align_vocabulary(draft, target_vocab_size, count_real_ids(processing_class))
        with explain_full_disk(output_dir, "what was there before is whole"):
            draft.save_pretrained(str(staging))
            if processing_class is not None:
                processing_class.save_pretrained(staging)
            replace_model(output_dir)
    except BaseException:
        shutil.rmtree(output_dir / STAGING, ignore_errors=True)
        raise
    carry_model_card(source, output_dir)
    return output_dir


def _load(path: Path, processing_class: ProcessingClass | None) -> tuple[PreTrainedModel | PeftModel, ProcessingClass]:
    if not path.is_dir():
        raise ValueError(f"`draft={str(path)!r}` is neither a model nor a folder.")
    finish_replacement(path)
    if processing_class is None:
        processing_class = find_processing_class(path) or load_tokenizer(path)
    return load_model(path, dtype="auto", device_map=None), processing_class


def _merge(draft: PeftModel) -> PreTrainedModel:
    base = unwrap_peft(draft)
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    if isinstance(head, BaseTunerLayer) or isinstance(embedding, BaseTunerLayer):
        # Merged into a tied matrix, an update of the head would reach the embedding too, and the other way round.
        layer = cast(torch.nn.Linear, head.get_base_layer() if isinstance(head, BaseTunerLayer) else head)
        layer.weight = torch.nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    merged = draft.merge_and_unload()
    if merged.get_output_embeddings().weight is not merged.get_input_embeddings().weight:
        # Loaded as tied, one of the two would be lost.
        merged.config.get_text_config().tie_word_embeddings = merged.config.tie_word_embeddings = False
    return merged


def _check_base_stays(draft: PeftModel, output_dir: Path) -> None:
    """Raises `ValueError` for an adapter that would replace the weights it sits on."""
    base = draft.peft_config[draft.active_adapter].base_model_name_or_path
    if base and Path(base).is_dir() and output_dir.is_dir() and Path(base).samefile(output_dir):
        raise ValueError(
            f"The adapter's base model is the one in `{output_dir}`, which saving the adapter there would remove. "
            "Choose another `output_dir`, or merge the adapter."
        )
