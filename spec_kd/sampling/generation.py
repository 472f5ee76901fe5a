"""Batched generation with a transformers model, by options of ours and none of the config that the model ships."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from spec_kd.heads import evaluation_mode, find_input_device
from spec_kd.sampling.drawing import seed_generator
from spec_kd.sampling.logits_processors import DrawnToken, ProgressWatch, RealIdsOnly, build_warpers
from spec_kd.sampling.options import SamplingOptions
from spec_kd.sampling.prompt_batch import PromptBatch
from spec_kd.vocabulary import ProcessingClass, get_tokenizer

if TYPE_CHECKING:
    from transformers._typing import GenerativePreTrainedModel


def generate_batch(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    options: SamplingOptions,
    *,
    eos_ids: Collection[int],
    pad_id: int,
    vocab_size: int,
    seed: str,
    on_logits: Iterable[LogitsProcessor] = (),
    on_scores: Iterable[LogitsProcessor] = (),
) -> torch.Tensor:
    """Writes one completion to each prompt, all prompts in one batch.

    The generation config that the model ships does not count. Its mode and that config are restored, the global random
    state is not touched, and no gradient is recorded.

    Args:
        model (`PreTrainedModel`): The model, with whole parameters.
        prompts (`Sequence[list[int]]`): Ids of each prompt, at least one. A [`PromptBatch`] is told of progress.
        options (`SamplingOptions`): All but its seed.
        eos_ids (`Collection[int]`): Ids that end a completion.
        pad_id (`int`): Id that fills up shorter rows.
        vocab_size (`int`): Number of real ids; ids beyond are never written.
        seed (`str`): All that is drawn follows from it.
        on_logits (`Iterable[LogitsProcessor]`, *optional*, defaults to `()`):
            Processors of the logits of the real ids, before temperature, top-k and top-p.
        on_scores (`Iterable[LogitsProcessor]`, *optional*, defaults to `()`):
            Processors of the scores that are sampled from, before the draw.

    Returns:
        `torch.Tensor`: Ids after the prompts, int64 `(B, T)`, with anything after an EOS; see [`cut_after_eos`].
    """
    device = find_input_device(model)
    length = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (length - len(ids)) + ids for ids in prompts], device=device)  # (B, L)
    mask = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
    processors = LogitsProcessorList([RealIdsOnly(vocab_size), *on_logits])
    processors += build_warpers(options.temperature, options.top_k, options.top_p)
    processors += on_scores
    watch = ProgressWatch(prompts, eos_ids)
    if isinstance(prompts, PromptBatch):
        processors.append(watch)
    if options.temperature > 0:
        processors.append(DrawnToken(seed_generator(seed, device)))
    config = GenerationConfig(
        do_sample=False,  # temperature and draw are processors, which in a config would come after all others
        max_new_tokens=options.max_new_tokens,
        eos_token_id=sorted(eos_ids),
        pad_token_id=pad_id,
        use_cache=True,
    )
    with evaluation_mode(model), generation_config(model, config):
        output = cast("GenerativePreTrainedModel", model).generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            logits_processor=processors,
            synced_gpus=False,  # the parameters are whole, and a process without prompts would be waited for
        )
    written = output[:, length:]
    watch.note(written[:, -1].tolist(), is_last=True)
    return written


@contextmanager
def generation_config(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """The model with another generation config; `generate` takes from the model's own what it is not told."""
    shipped, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = shipped


def cut_after_eos(ids: list[int], eos_ids: Collection[int]) -> tuple[list[int], str]:
    """The ids up to the first EOS, and the finish reason: `"stop"`, or `"length"` without an EOS."""
    end = next((i for i, token in enumerate(ids) if token in eos_ids), None)
    return (ids, "length") if end is None else (ids[: end + 1], "stop")


def find_special_ids(model: PreTrainedModel, processing_class: ProcessingClass) -> tuple[list[int], int]:
    """The ids that end a completion, and a pad id.

    Args:
        model (`PreTrainedModel`): Its generation config may name several EOS ids.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`): Its EOS counts as well.

    Returns:
        Sorted EOS ids, and the pad id of the tokenizer, else the first EOS id.

    Raises:
        ValueError: Neither has an EOS.
    """
    tokenizer = get_tokenizer(processing_class)
    shipped = model.generation_config.eos_token_id
    found = {*(shipped if isinstance(shipped, list) else [shipped]), tokenizer.eos_token_id}
    eos_ids = sorted(id for id in found if id is not None)
    if not eos_ids:
        raise ValueError(
            "Neither the generation config of the model nor its tokenizer has an EOS token, so no completion would "
            "ever end. Set `processing_class.eos_token`."
        )
    return eos_ids, tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos_ids[0]
