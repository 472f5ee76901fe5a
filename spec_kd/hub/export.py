"""Exports a trained draft to a folder that every serving engine can load."""

import copy
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from spec_kd._private import get_config_model_id
from spec_kd.escaping import make_public_name
from spec_kd.files import (
    STAGING,
    compute_sum,
    explain_full_disk,
    finish_replacement,
    list_model_files,
    replace_model,
)
from spec_kd.finite import check_finite_weights
from spec_kd.heads import is_whole, unwrap_peft
from spec_kd.hub.card import carry_model_card
from spec_kd.hub.export_options import ExportOptions
from spec_kd.hub.gguf import export_gguf, find_tools
from spec_kd.hub.serving_file import ServingFile, describe_engine
from spec_kd.loading import find_processing_class, load_model, load_tokenizer
from spec_kd.open_types import Argument, JsonObject
from spec_kd.options import read_path, refuse, resolve_options
from spec_kd.parallel import is_parallel_draft
from spec_kd.serving import find_serving_engine
from spec_kd.serving.check import check_saved_form
from spec_kd.serving.pair import ServingFinding
from spec_kd.vocabulary import ProcessingClass, align_vocabulary, count_real_ids

logger = logging.getLogger(__name__)

GGUF_FOLDER = "gguf"  # below the draft's folder, where no engine takes it for other weights of the model


class ExpectingReport(Protocol):
    """What an export reads of an [`EvaluationReport`][spec_kd.EvaluationReport]."""

    @property
    def serving_engine(self) -> str:
        """The engine that it is for."""

    def expect(self, num_assistant_tokens: int) -> dict[str, JsonObject]:
        """The metrics with so many drafted tokens, by setting."""


def export_draft(
    draft: PreTrainedModel | PeftModel | str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    options: ExportOptions | None = None,
    *,
    processing_class: ProcessingClass | None = None,
    target: PreTrainedModel | PeftModel | str | os.PathLike[str] | None = None,
    report: ExpectingReport | None = None,
    **given: Argument,
) -> Path:
    """Saves a draft as servers need it: one model without an adapter, with as many vocabulary rows as the target.

    The model that is passed is not changed: the adapter is merged and the vocabulary aligned in a copy. Files are
    written to a hidden folder in `output_dir`, and moved to their places when they are complete. Weights of an earlier
    save are removed last, and other files stay. If the call is killed, the next call with this folder, as `draft` or as
    `output_dir`, finishes the move or removes incomplete files. The model card of `draft` is copied too; a draft that
    has none gets a new one.

    With `serving_engines` a file `serving.json` beside the weights says how each engine serves the draft (see
    [`ServingFile`][spec_kd.ServingFile]); with `llama_cpp_dir` GGUF files of draft and target are in `gguf` below it.

    Args:
        draft (`PreTrainedModel`, `PeftModel` or path):
            The trained draft. A folder with an `adapter_config.json` is loaded as an adapter on its base model.
        output_dir (`str` or `os.PathLike`):
            Folder for the files; created if it does not exist. It may be the folder from which `draft` is loaded.
        options (`ExportOptions`, *optional*): The form and the engines; the defaults of [`ExportOptions`] by default.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*):
            Saved with the weights. Give the target's, because the draft will read the target's ids. By default it is
            loaded from `draft` if that is a path, and otherwise none is saved.
        target (`PreTrainedModel`, `PeftModel` or path, *optional*):
            The target, which `serving_engines` needs; a model must know the folder of its tokenizer.
        report (`EvaluationReport`, *optional*):
            Evaluation of the draft for one of `serving_engines`: `serving.json` then has the acceptance that it
            expects with `num_assistant_tokens`.
        given: Fields of [`ExportOptions`] as keywords, which replace those of `options`.

    Returns:
        `Path`: `output_dir`.

    Raises:
        ValueError: Before anything is written: there is no processing class to align by, an adapter is to be aligned
            but not merged, the base model of an adapter that is not merged is in `output_dir`, an adapter is to be
            merged into a quantized base model, the weights are sharded (ZeRO-3, FSDP2), tokens of the processing class
            have ids beyond the target's rows, an engine cannot serve the draft, the report is of another engine or
            number of drafted tokens, or `llama_cpp_dir` lacks a tool.
        GGUFError: A tool of llama.cpp failed; the draft is saved without `serving.json`.
        OSError: `output_dir` cannot be created, or there is no room for the files.
    """
    options = resolve_options(ExportOptions, options, given)
    output_dir = Path(read_path("output_dir", output_dir))
    target_vocab_size, serving_engines = options.target_vocab_size, tuple(dict.fromkeys(options.serving_engines))
    expected: dict[str, dict[str, JsonObject]] = {}
    if serving_engines and target is None:
        raise ValueError("`serving_engines` needs `target`, the model that the draft will be served with.")
    if report is not None:
        if report.serving_engine not in serving_engines:
            raise ValueError(
                f"The report is for {report.serving_engine!r}, which is not among `serving_engines`. Add it, or "
                "evaluate for the engine that will serve the draft."
            )
        expected[report.serving_engine] = report.expect(options.num_assistant_tokens)
    if options.llama_cpp_dir is not None:
        find_tools(options.llama_cpp_dir, options.quantization)
    finish_replacement(output_dir)
    source, is_ours = None, isinstance(draft, str | os.PathLike)  # a model that is loaded here may be changed
    if isinstance(draft, str | os.PathLike):
        source = Path(read_path("draft", draft))
        draft, processing_class = _load(source, processing_class)
    elif not isinstance(draft, torch.nn.Module):
        raise ValueError(f"`draft` is {draft!r:.80}, but must be a model or its path.")
    adapter = draft if isinstance(draft, PeftModel) else None
    is_adapter_kept = adapter is not None and not options.merge_adapter
    refuse(
        (
            not is_whole(draft),
            "The draft's weights are sharded (ZeRO-3, FSDP2). Save it with the trainer, then export it from that path.",
        ),
        (
            target_vocab_size is not None and processing_class is None,
            "`target_vocab_size` needs `processing_class`, to know which rows are in use.",
        ),
        (
            adapter is not None and options.merge_adapter and getattr(unwrap_peft(adapter), "is_quantized", False),
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
        if adapter is not None and options.merge_adapter:
            draft, is_ours = _merge(adapter if is_ours else copy.deepcopy(adapter)), True
        if target_vocab_size is not None and processing_class is not None:
            draft = cast(PreTrainedModel, draft if is_ours else copy.deepcopy(draft))
            align_vocabulary(draft, target_vocab_size, count_real_ids(processing_class))
        findings = []
        if target is not None and serving_engines:
            findings = check_saved_form(
                draft, processing_class, output_dir, target, serving_engines, refuse_errors=options.refuse_findings
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
    serving = None
    if target is not None and serving_engines:
        serving = _describe_serving(output_dir, target, options, findings, expected)
        serving.write(output_dir)
    carry_model_card(source, output_dir, serving=serving)
    return output_dir


def find_gguf(quantization: str) -> dict[str, str]:
    """The GGUF files of `"draft"` and `"target"`, by their paths in the folder of an exported draft."""
    return {role: f"{GGUF_FOLDER}/{role}-{quantization}.gguf" for role in ("draft", "target")}


def _describe_serving(
    folder: Path,
    target: PreTrainedModel | PeftModel | str | os.PathLike[str],
    options: ExportOptions,
    findings: Sequence[ServingFinding],
    expected: Mapping[str, dict[str, JsonObject]],
) -> ServingFile:
    """What `serving.json` says of a draft that is in its folder; writes the GGUF files first."""
    if isinstance(target, str | os.PathLike):
        place = os.fspath(target)
    else:
        place = get_config_model_id(unwrap_peft(target).config)
    names = {"draft": make_public_name(folder), "target": make_public_name(place or "target")}
    files = {path.name: compute_sum(path) for path in list_model_files(folder)}
    served = dict.fromkeys(dict.fromkeys(options.serving_engines), names)
    is_parallel = is_parallel_draft(folder)
    if options.llama_cpp_dir is not None:
        gguf = find_gguf(options.quantization)
        for role, model in (("draft", folder), ("target", place)):
            export_gguf(
                model, folder / gguf[role], llama_cpp_dir=options.llama_cpp_dir, quantization=options.quantization
            )
            files[gguf[role]] = compute_sum(folder / gguf[role])
        served["llama.cpp"] = gguf
    engines = {}
    for name, paths in served.items():
        engine = find_serving_engine(name)
        write = engine.find_writer(is_parallel) or engine.write_command  # a finding says that it drafts one by one
        flags = engine.list_threshold_flags(options.assistant_confidence_threshold)
        command = write(paths["draft"], paths["target"], options.num_assistant_tokens, flags)
        engines[name] = describe_engine(name, command, findings, expected.get(name))
    return ServingFile(
        **names,
        num_assistant_tokens=options.num_assistant_tokens,
        assistant_confidence_threshold=options.assistant_confidence_threshold,
        engines=engines,
        files=files,
        quantization=None if options.llama_cpp_dir is None else options.quantization,
    )


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
