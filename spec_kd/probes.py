"""Checks of a model before it is used: its head, its logits, and whether it reads each sequence as it would alone.

Some architectures build their masks without the position ids of a packed row, or ignore the attention mask of padded
rows (recurrent states). What they compute is then wrong and no error is raised, so a few tokens are run through the
model first.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig, PreTrainedModel

from spec_kd._private import suspend_zero3_init
from spec_kd.finite import NonFiniteError, find_nonfinite_parameter
from spec_kd.heads import (
    LogitHead,
    LogitTransform,
    are_equal_logits,
    are_exact_logits,
    compute_last_hidden_states,
    count_rows,
    evaluation_mode,
    find_input_device,
    is_whole,
    unwrap_peft,
)

if TYPE_CHECKING:
    from transformers._typing import GenerativePreTrainedModel

PROBE_LENGTHS = (5, 8)
NUM_GENERATED = 2  # one token after the prompt, and one from the cache

_passed: "weakref.WeakKeyDictionary[PreTrainedModel, set[str]]" = weakref.WeakKeyDictionary()


def check_packing(model: PreTrainedModel, role: str) -> None:
    """Raises `ValueError` if sequences packed into one row by their position ids differ from each alone.

    Models with partitioned parameters (ZeRO-3, FSDP) are taken on trust.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model.
        role (`str`): What it is called in the error.
    """

    def find_difference(model: PreTrainedModel, texts: list[torch.Tensor], alone: list[torch.Tensor]) -> float | None:
        positions = torch.cat([torch.arange(text.shape[1], device=text.device) for text in texts])[None]  # (1, T)
        packed = model(input_ids=torch.cat(texts, dim=1), position_ids=positions, use_cache=False).logits
        return _compare(model, list(packed.split(PROBE_LENGTHS, dim=1)), alone)

    if (difference := _probe(model, "packed", find_difference)) is not None:
        raise ValueError(
            f"{type(unwrap_peft(model)).__name__} ({role}) does not keep packed sequences apart: logits differ by up "
            f"to {difference:.3g} from those of the same sequences alone. Set `packing=False` and "
            "`padding_free=False`."
        )


def check_padding(model: PreTrainedModel, role: str) -> None:
    """Raises `ValueError` if a sequence padded on the right, with its attention mask, differs from itself alone.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model.
        role (`str`): What it is called in the error.
    """

    def find_difference(model: PreTrainedModel, texts: list[torch.Tensor], alone: list[torch.Tensor]) -> float | None:
        width = max(PROBE_LENGTHS)
        ids = torch.cat([torch.nn.functional.pad(text, (0, width - text.shape[1])) for text in texts])  # (B, T)
        lengths = torch.tensor(PROBE_LENGTHS, device=ids.device)[:, None]
        mask = (torch.arange(width, device=ids.device) < lengths).long()
        padded = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return _compare(model, [row[None, :n] for row, n in zip(padded, PROBE_LENGTHS, strict=True)], alone)

    if (difference := _probe(model, "padded", find_difference)) is not None:
        raise ValueError(
            f"{type(unwrap_peft(model)).__name__} ({role}) reads padding as text: logits of a padded sequence differ "
            f"by up to {difference:.3g} from those of the same sequence alone. Use a batch size of 1."
        )


def check_fused_log_probs(model: PreTrainedModel, role: str) -> None:
    """Raises `ValueError` if the fused head that `SFTTrainer` adds computes other log-probabilities than the model.

    That head scales and caps logits as TRL knows the architecture, and goes by `base_model`, which is not everywhere
    the part in front of the output head.

    Args:
        model (`PreTrainedModel` or `PeftModel`): With TRL's fused head.
        role (`str`): What it is called in the error.
    """

    def find_difference(model: PreTrainedModel, texts: list[torch.Tensor], alone: list[torch.Tensor]) -> float | None:
        try:
            with suspend_zero3_init():  # TRL would gather a head that is whole
                fused = [model(input_ids=text, labels=text, fused_lm_head=True).log_probs for text in texts]
        except (AttributeError, IndexError, RuntimeError, TypeError):
            return float("inf")
        own = [
            logits[:, :-1].float().log_softmax(-1).gather(-1, text[:, 1:, None].to(logits.device)).squeeze(-1)
            for logits, text in zip(alone, texts, strict=True)
        ]
        return _compare(model, fused, own)

    if (difference := _probe(model, "fused", find_difference)) is not None:
        found = "fails" if difference == float("inf") else f"gives log-probabilities that are off by {difference:.3g}"
        raise ValueError(
            f"TRL's fused head {found} on {type(unwrap_peft(model)).__name__} ({role}), so the loss would not be that "
            "of the model. WhiteBoxDistillTrainer has a head of its own; or use a draft of another architecture."
        )


def check_is_causal_lm(model: PreTrainedModel, role: str) -> None:
    """Raises `ValueError` unless `model` has an output head and reads from left to right, without an encoder.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model.
        role (`str`): Name of the model in the error.
    """
    model = unwrap_peft(model)
    get_head = getattr(model, "get_output_embeddings", lambda: None)
    if get_head() is None:
        raise ValueError(f"The {role} ({type(model).__name__}) has no output head. Pass a causal language model.")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"The {role} ({type(model).__name__}) is an encoder-decoder model, whose encoder would read the prompt. "
            "Pass a causal language model."
        )


def check_plain_head(model: PreTrainedModel, role: str) -> None:
    """Raises `ValueError` unless the head of `model` is a plain matrix of floating-point numbers.

    The fused losses read its weight and bias, and do not call it.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model.
        role (`str`): Name of the model in the error.
    """
    head = unwrap_peft(model).get_output_embeddings()
    weight = getattr(head, "weight", None)
    if isinstance(head, BaseTunerLayer):
        raise ValueError(
            f"The head of the {role} has an adapter of its own, which the fused loss would ignore. Merge it "
            "(`model.merge_and_unload()`), or leave `lm_head` out of `target_modules`; `modules_to_save` is supported."
        )
    # torchao's numbers are inside a tensor of floating-point dtype, and FSDP2 shards parameters as DTensors
    is_wrapped = hasattr(weight, "__tensor_flatten__") and not isinstance(weight, DTensor)
    if weight is None or is_wrapped or not weight.is_floating_point():
        kind = f"weights of dtype {weight.dtype}" if weight is not None and not is_wrapped else "no weight"
        kind = f"quantized weights ({type(weight).__name__})" if is_wrapped else kind
        raise ValueError(
            f"The {role}'s head ({type(head).__name__}) has {kind}, so the divergence cannot be computed through it. "
            f"Load the {role} with its head in full precision (bitsandbytes does so by default)."
        )


def check_logits_are_known(model: PreTrainedModel, role: str) -> None:
    """Runs four tokens and compares the model's own logits with those from hidden states and head.

    Architectures scale, cap or shift their logits in different ways. A model with a way that `LogitTransform` does not
    know would silently train towards another distribution than the one that is served; here it is refused by name.
    Models whose parameters are not all present (ZeRO-3, FSDP's meta tensors) are not checked.

    Args:
        model (`PreTrainedModel`): The model, wrapped by nothing but PEFT.
        role (`str`): Name of the model in the error.

    Raises:
        ValueError: If the two differ by more than rounding, or the model is no causal LM.
        NonFiniteError: If they are not finite, except for logits of -inf, which are a mask.
    """
    model = unwrap_peft(model)
    check_is_causal_lm(model, role)
    if not is_whole(model):
        return
    rows = count_rows(model.get_output_embeddings())
    ids = torch.arange(1, 5, device=find_input_device(model))[None] % rows  # (1, 4)
    with evaluation_mode(model):
        expected = model(input_ids=ids, use_cache=False).logits.float()
        hidden = compute_last_hidden_states(model, model.get_output_embeddings(), input_ids=ids)
        logits = LogitHead.of(model, rows)(hidden).to(expected.device)
    is_finite = expected.isfinite()
    if not is_finite.any() or expected.isnan().any() or (expected == float("inf")).any():
        name = find_nonfinite_parameter(model)
        where = f"its weight `{name}` has a NaN or an infinity" if name else f"its numbers overflow in {hidden.dtype}"
        raise NonFiniteError(f"The logits of the {role} are not finite: {where}. Load it again, in another dtype.")
    expected, logits = expected[is_finite], logits[is_finite]  # a logit of -inf is a mask
    is_exact = hidden.dtype == torch.float32 and are_exact_logits(model, expected)
    if not are_equal_logits(logits, expected, is_exact):
        raise ValueError(
            f"{type(model).__name__} ({role}) computes its logits in a way that is not known here: they differ by up "
            f"to {(logits - expected).abs().max().item():.3g} from head and hidden states with "
            f"{LogitTransform.from_config(model.config)}. Training would aim at a distribution other than the one that "
            "is served. Please report the architecture; BlackBoxSFTTrainer can train it."
        )


def gives_auxiliary_loss(model: PreTrainedModel) -> bool:
    """Whether a mixture of experts returns its load-balancing loss when asked for router logits (Llama 4 does not)."""
    model = unwrap_peft(model)
    if not is_whole(model):
        return True
    with evaluation_mode(model):
        output = model(input_ids=make_texts(model)[0], output_router_logits=True, use_cache=False)
    return getattr(output, "aux_loss", None) is not None


def takes_padded_prompts(model: PreTrainedModel) -> bool:
    """Whether `generate` writes the same to a prompt in a batch, padded on the left with its mask, as to it alone.

    `False` for models whose state has read the padding, or mixes rows (RWKV), or whose positions count the padding.
    """

    def find_difference(model: PreTrainedModel, texts: list[torch.Tensor], alone: list[torch.Tensor]) -> float | None:
        width = max(PROBE_LENGTHS)
        padded = torch.cat([torch.nn.functional.pad(text, (width - text.shape[1], 0)) for text in texts])  # (B, T)
        first = width - torch.tensor(PROBE_LENGTHS, device=padded.device)[:, None]
        mask = (torch.arange(width, device=padded.device) >= first).long()
        together, separate = _generate(model, padded, mask), [_generate(model, text) for text in texts]
        worst = None
        for row, (ids, logits) in enumerate(separate):
            # once another token was written, another text goes on
            num_steps = 1 + int((ids[0, :-1] == together[0][row, :-1]).cumprod(0).sum())
            found = _compare(model, [together[1][row : row + 1, :num_steps]], [logits[:, :num_steps]])
            worst = max(filter(None, (worst, found)), default=None)
        return worst

    return _probe(model, "generated", find_difference) is None


def group_for_generation(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The numbers of the prompts that `generate` can take together: all, or one by one ([`takes_padded_prompts`])."""
    numbers = list(range(len(prompts)))
    return [numbers] if len(prompts) == 1 or takes_padded_prompts(model) else [[i] for i in numbers]


def _probe(
    model: PreTrainedModel,
    name: str,
    find_difference: Callable[[PreTrainedModel, list[torch.Tensor], list[torch.Tensor]], float | None],
) -> float | None:
    """The largest difference of logits, `None` if there is but rounding; a model that passed is not asked again."""
    model = unwrap_peft(model)
    passed = _passed.setdefault(model, set())
    if name in passed or not is_whole(model):
        return None
    texts = make_texts(model)
    with evaluation_mode(model):
        alone = [model(input_ids=text, use_cache=False).logits for text in texts]  # (1, T, V) each
        difference = find_difference(model, texts, alone)
    if difference is None:
        passed.add(name)
    return difference


def make_texts(model: PreTrainedModel) -> list[torch.Tensor]:
    """Two sequences of ids `(1, T)` without those that mean something to the model (padding, images)."""
    config = model.config
    named = [value for part in (config, config.get_text_config()) for key, value in vars(part).items() if "_id" in key]
    special = {value for value in named if isinstance(value, int)}
    ordinary = [i for i in range(1, count_rows(model.get_input_embeddings())) if i not in special]
    step = max(1, len(ordinary) // sum(PROBE_LENGTHS))
    ids = torch.tensor([ordinary[i * step % len(ordinary)] for i in range(sum(PROBE_LENGTHS))])
    return [text[None].to(find_input_device(model)) for text in ids.split(PROBE_LENGTHS)]


def _generate(
    model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids written greedily to each row `(B, N)`, and the logits they came from `(B, N, V)`."""
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=NUM_GENERATED,
        pad_token_id=0,
        use_cache=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    shipped, model.generation_config = model.generation_config, config
    try:
        output = cast("GenerativePreTrainedModel", model).generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids) if mask is None else mask,
            generation_config=config,
            synced_gpus=False,  # the parameters are whole, and other processes may have nothing to ask
        )
    finally:
        model.generation_config = shipped
    return output.sequences[:, ids.shape[1] :], torch.stack(output.logits, dim=1)


def _compare(model: PreTrainedModel, logits: list[torch.Tensor], expected: list[torch.Tensor]) -> float | None:
    is_exact = are_exact_logits(model, expected[0])
    differences = [
        (ours.float() - theirs.float().to(ours.device)).abs().nan_to_num().max().item()
        for ours, theirs in zip(logits, expected, strict=True)
        if not are_equal_logits(ours, theirs, is_exact)
    ]
    return max(differences, default=None)
