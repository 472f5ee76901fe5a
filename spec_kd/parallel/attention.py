"""The attention of appended masks, as transformers takes it, and whether a model does what it says."""

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import PreTrainedModel

from spec_kd._private import get_attention_implementation
from spec_kd.heads import are_equal_logits, are_exact_logits, evaluation_mode, is_whole, unwrap_peft
from spec_kd.parallel.layout import MaskLayout, build_layout
from spec_kd.probes import make_texts

ATTENTIONS = ("sdpa", "eager", "flex_attention")
"""Attentions of transformers that take any mask."""
NUM_PROBED = 3


def build_attention(layout: MaskLayout, model: PreTrainedModel) -> torch.Tensor | BlockMask:
    """What a model takes as `attention_mask`, so that each mask sees its own text and block alone.

    Args:
        layout (`MaskLayout`): Where the masks stand.
        model (`PreTrainedModel`): Without its PEFT wrapper.

    Returns:
        `torch.Tensor` `(B, 1, T + M, T + M)`, bool for `"sdpa"` and added to the scores for `"eager"`; or a `BlockMask`
        for `"flex_attention"`.
    """
    implementation = get_attention_implementation(model.config)
    if implementation == "flex_attention":
        rows, width = layout.positions.shape
        device = layout.positions.device
        return create_block_mask(lambda b, _, q, k: layout.sees(b, q, k), rows, None, width, width, device=device)
    mask = layout.build_attention_mask()
    if implementation == "eager":
        return torch.zeros_like(mask, dtype=model.dtype).masked_fill_(~mask, torch.finfo(model.dtype).min)
    return mask


def check_masks(model: PreTrainedModel, mask_token_id: int, max_length: int | None) -> None:
    """Raises `ValueError` for a draft whose blocks of masks, computed together, differ from each block alone.

    Recurrent models, and attentions that take no mask of their own, do. Models with partitioned parameters (ZeRO-3,
    FSDP) are taken on trust.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The draft.
        mask_token_id (`int`): Id of its mask token.
        max_length (`int`, *optional*): Most tokens of a row, which must fit a sliding window of the draft.
    """
    model = unwrap_peft(model)
    name, text_config = type(model).__name__, model.config.get_text_config()
    implementation = get_attention_implementation(model.config)
    if implementation not in ATTENTIONS:
        raise ValueError(
            f"The draft ({name}) has the attention {implementation!r}, which takes no mask for parallel drafting. Load "
            f'it with `model_init_kwargs={{"attn_implementation": "sdpa"}}`.'
        )
    if implementation == "flex_attention" and model.device.type == "cpu":
        raise ValueError(
            f"The draft ({name}) has the attention 'flex_attention' and is on the CPU, where PyTorch has no backward "
            'pass of it. Load it with `model_init_kwargs={"attn_implementation": "sdpa"}`.'
        )
    windows = {key: getattr(text_config, key, None) for key in ("sliding_window", "attention_chunk_size")}
    is_windowed = getattr(text_config, "use_sliding_window", True) is not False
    for key, window in windows.items():
        if window is not None and is_windowed and (max_length is None or max_length > window):
            raise ValueError(
                f"Layers of the draft see {window} tokens (`{key}`), and `max_length={max_length}` is more, which "
                f"parallel drafting does not support. Set `max_length` to at most {window}."
            )
    if not is_whole(model):
        return
    try:
        is_same = _reads_masks(model, mask_token_id)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        is_same = False
    if not is_same:
        raise ValueError(
            f"The draft ({name}) mixes masks that belong to different places of the text, so it cannot be trained to "
            "draft in parallel. Use an architecture with plain attention, such as Llama or Qwen."
        )


def _reads_masks(model: PreTrainedModel, mask_token_id: int) -> bool:
    text = make_texts(model)[-1]  # (1, T)
    layout = build_layout(text, [1.0] * NUM_PROBED)
    blocks, own_mask = layout.blocks, text.new_full((1, NUM_PROBED - 1), mask_token_id)
    with evaluation_mode(model):
        together = model(
            input_ids=layout.append_masks(text, mask_token_id),
            attention_mask=build_attention(layout, model),
            position_ids=layout.positions,
            use_cache=False,
        ).logits[0, layout.slots]  # (N, V)
        alone = torch.empty_like(together)
        for block in range(blocks.num_blocks):
            ids = torch.cat([text[:, : block + 1], own_mask], dim=1)
            logits = model(input_ids=ids, use_cache=False).logits[0, block:]  # (K, V)
            is_own = blocks.block == block
            alone[is_own] = logits[blocks.position[is_own]]
    return are_equal_logits(together, alone, are_exact_logits(model, alone))
