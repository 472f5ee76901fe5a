"""[`check_serving`]: will an engine serve this draft, and draft with it?"""

import copy
import os
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from spec_kd.options import check_int
from spec_kd.serving import find_serving_engine
from spec_kd.serving.pair import ServedPair, ServingFinding, read_model

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from spec_kd.vocabulary import ProcessingClass

    Loaded = PreTrainedModel | PeftModel
    Model = PreTrainedModel | PeftModel | str | os.PathLike[str]


def check_serving(
    draft: "Model",
    target: "Model",
    serving_engine: str = "vllm",
    *,
    tensor_parallel_size: int = 1,
    max_length: int | None = None,
    num_assistant_tokens: int | None = None,
    draft_processing_class: "ProcessingClass | None" = None,
    target_processing_class: "ProcessingClass | None" = None,
) -> list[ServingFinding]:
    """Finds what makes an engine refuse a draft, write wrong text with it, or draft less than it could.

    Configurations and tokenizers are read, and no weights. The conditions are those of the engine's release that the
    record of the engine names.

    Args:
        draft (`PreTrainedModel` or path): The draft, its folder, or its Hub id.
        target (`PreTrainedModel` or path): The target.
        serving_engine (`str`, *optional*, defaults to `"vllm"`): Engine that will serve them.
        tensor_parallel_size (`int`, *optional*, defaults to `1`): Cards that share each layer.
        max_length (`int`, *optional*):
            Tokens of the longest sequence, prompt and completion; by default all that the target can read.
        num_assistant_tokens (`int`, *optional*): Tokens drafted in a round; by default not considered.
        draft_processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*):
            The draft's tokenizer or processor; by default the one that is stored with it.
        target_processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*): The same of the target.

    Returns:
        `list[ServingFinding]`: In the order of the record; empty if nothing was found.

    Raises:
        `ValueError`: If there is no such engine, a number is out of its range, or a model has no tokenizer.
        `OSError`: If there is no such model.
    """
    find_serving_engine(serving_engine)
    check_int("tensor_parallel_size", tensor_parallel_size)
    check_int("max_length", max_length, is_optional=True)
    check_int("num_assistant_tokens", num_assistant_tokens, is_optional=True)
    pair = ServedPair(
        read_model("draft", draft, draft_processing_class),
        read_model("target", target, target_processing_class),
        tensor_parallel_size,
        max_length,
        num_assistant_tokens,
    )
    return check_pair(pair, [serving_engine])


def check_pair(pair: ServedPair, serving_engines: Iterable[str]) -> list[ServingFinding]:
    """As [`check_serving`], of models that have been read and for several engines."""
    return [
        ServingFinding(engine, check.name, what, check.consequence, check.effect, fix)
        for engine in dict.fromkeys(serving_engines)
        for check in find_serving_engine(engine).checks
        for what, fix in check.find(pair)
    ]


def check_saved_form(
    draft: "Loaded",
    processing_class: "ProcessingClass | None",
    output_dir: str | os.PathLike[str],
    target: "Model",
    serving_engines: Iterable[str],
    *,
    merge_adapter: bool = False,
    rows: int | None = None,
    refuse_errors: bool = False,
) -> list[ServingFinding]:
    """What engines make of a draft in the form in which it will be saved.

    Args:
        draft (`PreTrainedModel` or `PeftModel`): The draft.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*): What is saved beside it.
        output_dir (`str` or `os.PathLike`): Folder for it.
        target (`PreTrainedModel` or path): The target.
        serving_engines (iterable of `str`): The engines.
        merge_adapter (`bool`, *optional*, defaults to `False`): Whether an adapter will be merged.
        rows (`int`, *optional*): Vocabulary rows that it will have; by default those that it has.
        refuse_errors (`bool`, *optional*, defaults to `False`): Whether errors among the findings are raised.

    Raises:
        `ValueError`: For findings that make the draft of no use in an engine, if asked.
    """
    read = read_model("draft", draft, processing_class)
    config = copy.deepcopy(read.config)
    if rows is not None:
        config.get_text_config().vocab_size = rows
    saved = replace(read, name=os.fspath(output_dir), config=config, is_adapter=read.is_adapter and not merge_adapter)
    findings = check_pair(ServedPair(saved, read_model("target", target)), serving_engines)
    errors = [f"- {finding}" for finding in findings if finding.severity == "error"]
    if errors and refuse_errors:
        raise ValueError("The draft cannot be served like this:\n" + "\n".join(errors))
    return findings
