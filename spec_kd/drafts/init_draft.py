"""Makes a draft from a target, or from another donor, before any training."""

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import cast

import torch
from accelerate.utils import is_peft_model
from transformers import PreTrainedModel

from spec_kd.drafts.importance import find_layers, measure_activity
from spec_kd.drafts.options import WIDTHS, DraftShapeOptions
from spec_kd.drafts.shapes import build_llama, choose_tying, fit_to_target, resolve_widths
from spec_kd.drafts.slicing import (
    choose_layers,
    cut_layers,
    find_principal_directions,
    place_embeddings,
    slice_widths,
)
from spec_kd.drafts.transplant import transplant_vocabulary
from spec_kd.evaluation.cost import ServingCosts
from spec_kd.evaluation.response_replay import ResponseRows, score_responses
from spec_kd.finite import check_finite_weights
from spec_kd.hub import export_draft
from spec_kd.loading import find_processing_class, load_config, load_model, load_tokenizer
from spec_kd.open_types import Argument
from spec_kd.options import resolve_options
from spec_kd.sampling.prompts import find_causal_lm
from spec_kd.vocabulary import ProcessingClass, compare_tokens, get_tokenizer

Model = PreTrainedModel | str | os.PathLike[str]
STATES_PER_TEXT = 512  # tokens of a sample that are read, so that long texts do not outweigh short ones


@dataclass(frozen=True)
class InitialDraft:
    """A draft before training.

    Args:
        draft (`PreTrainedModel`): The draft, in float32.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`): The target's.
        layers (`list[int]`): Layers of the donor that it has; empty for fresh layers.
        alpha (`float`, *optional*): Mean acceptance on the sample responses; `None` without them.
        matched_ids (`float`, *optional*):
            Share of the target's ids that one token of the donor stands for; `None` if the tokenizers are equal.
        cost_ratio (`float`, *optional*):
            c, the time of a draft step over that of a target step; `None` if no costs of this shape were given.
    """

    draft: PreTrainedModel
    processing_class: ProcessingClass = field(repr=False)
    layers: list[int]
    alpha: float | None = None
    matched_ids: float | None = None
    cost_ratio: float | None = None

    @property
    def num_parameters(self) -> int:
        """Number of parameters, a shared matrix counted once."""
        return self.draft.num_parameters()

    @property
    def num_head_parameters(self) -> int:
        """Parameters of the head, which every drafted token reads."""
        return self.draft.get_output_embeddings().weight.numel()

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights in 16 bits, as most servers hold them."""
        return 2 * self.num_parameters

    @property
    def summary(self) -> str:
        """One line on what the draft is."""
        of_donor = f"layers {self.layers} of the donor" if self.layers else "fresh layers"
        alpha = "" if self.alpha is None else f", alpha {self.alpha:.3f} before training"
        cost = "" if self.cost_ratio is None else f", a step costs {self.cost_ratio:.3f} of the target's"
        return (
            f"{self.num_parameters / 1e6:.1f} M parameters ({self.num_head_parameters / 1e6:.1f} M in the head, "
            f"{self.num_bytes / 1e6:.0f} MB in 16 bits), {of_donor}{alpha}{cost}"
        )

    def save_pretrained(self, output_dir: str | os.PathLike[str]) -> None:
        """Saves the draft with the target's processing class, as [`~spec_kd.export_draft`] does."""
        export_draft(self.draft, output_dir, processing_class=self.processing_class)


def init_draft(
    target: Model,
    options: DraftShapeOptions | None = None,
    *,
    donor: Model | None = None,
    responses: ResponseRows | None = None,
    temperature: float = 0.0,
    costs: ServingCosts | None = None,
    processing_class: ProcessingClass | None = None,
    donor_processing_class: ProcessingClass | None = None,
    show_progress: bool = True,
    **given: Argument,
) -> InitialDraft:
    """Makes a draft for a target that has no small sibling.

    Layers are cut by their influence on sample text (ShortGPT, arXiv 2403.03853), widths along the principal directions
    of the hidden states (SliceGPT, arXiv 2401.15024), and a donor with another tokenizer gets the target's vocabulary.
    With `fresh_layers` only the embedding and the head are the donor's, projected to the new width. The draft has the
    target's tokenizer, chat template, context length and number of vocabulary rows. It has to be trained: cut
    models write little that the target accepts.

    Args:
        target (`PreTrainedModel` or path): The target.
        options (`DraftShapeOptions`, *optional*): Shape of the draft.
        donor (`PreTrainedModel` or path, *optional*): Model that the draft is made from; the target by default.
        responses (`Dataset` or iterable of dicts, *optional*):
            Sample text: rows with `prompt_ids` and `completion_ids` that the target wrote. Needed to choose layers and
            to cut widths.
        temperature (`float`, *optional*, defaults to `0.0`):
            Temperature that the responses were sampled at. Above 0, `target` is run to measure alpha.
        costs (`ServingCosts`, *optional*):
            Costs of a draft of this shape, such as those of [`~spec_kd.plan_draft`], for `cost_ratio` of the result.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*):
            The target's; loaded from `target` by default.
        donor_processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*):
            The donor's; loaded from `donor` by default.
        show_progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.
        given: Fields of [`DraftShapeOptions`] as keywords, which replace those of `options`.

    Returns:
        [`InitialDraft`]

    Raises:
        ValueError: An option is out of its range or larger than the donor, the donor's layers cannot be cut like that,
            or `responses` are missing.
    """
    options = resolve_options(DraftShapeOptions, options, given)
    processing_class = processing_class or load_processing_class("target", target)
    model = load_whole_model("donor", target if donor is None else donor)
    target_config = load_config(target).get_text_config()
    if options.tie_word_embeddings and not model.config.get_text_config().tie_word_embeddings:
        raise ValueError(
            "The donor's head is a matrix of its own, which would be lost. Leave `tie_word_embeddings` out."
        )
    if (
        getattr(model.get_decoder(), "norm", None) is None
        or getattr(model.get_output_embeddings(), "bias", None) is not None
    ):
        raise ValueError(
            f"{type(model).__name__} has no `norm` before its head, or a head with a bias, which a plain Llama cannot "
            "take over. Choose another donor."
        )
    needs_samples, widths = resolve_widths(model, options)
    rows = None if responses is None else list(islice(responses, options.num_samples))
    if needs_samples and not rows:
        raise ValueError(
            "Sample text decides which layers, heads and directions are kept. Pass `responses`, or name `layers` and "
            "leave the widths out."
        )
    tokenizer = get_tokenizer(processing_class)
    own = tokenizer
    if donor is not None:
        own = get_tokenizer(donor_processing_class or load_processing_class("donor", donor))
    is_transplanted = own is not tokenizer and bool(compare_tokens(own, tokenizer))
    texts = [[*row["prompt_ids"], *row["completion_ids"]][:STATES_PER_TEXT] for row in rows or ()]
    if is_transplanted:
        texts = [own(text, add_special_tokens=False)["input_ids"] for text in tokenizer.batch_decode(texts)]
    draft, layers = _build(model, options, widths, texts if needs_samples else [], show_progress)
    matched = transplant_vocabulary(draft, own, tokenizer) if is_transplanted else None
    fit_to_target(draft, target_config, tokenizer)
    draft.requires_grad_(True)  # the donor may be a frozen target
    alpha = None
    if rows:
        judge = load_whole_model("target", target) if temperature > 0 else None
        scores = score_responses(draft, judge, rows, temperature=temperature)
        alpha = float(scores.alpha_sum.sum() / scores.lengths.sum())
    return InitialDraft(draft, processing_class, layers, alpha, matched, None if costs is None else costs.cost_ratio)


def load_whole_model(role: str, model: Model) -> PreTrainedModel:
    """A model, given itself or its name, loaded in float32; raises `ValueError` for an adapter or a NaN in a weight."""
    loaded = load_model(model, dtype=torch.float32, device_map=None) if isinstance(model, str | os.PathLike) else model
    if is_peft_model(loaded):
        raise ValueError(f"The {role} has an adapter. Merge it first: `spec_kd.export_draft` does.")
    check_finite_weights(loaded, role)
    return find_causal_lm(cast(PreTrainedModel, loaded), role)


def load_processing_class(role: str, model: Model) -> ProcessingClass:
    """What was saved with a model; raises `ValueError` or `OSError` if there is nothing."""
    found = find_processing_class(model)
    if found is None:
        if isinstance(model, str | os.PathLike):
            return load_tokenizer(model)  # its error says what is missing
        name = "processing_class" if role == "target" else "donor_processing_class"
        raise ValueError(f"The {role} does not know the folder of its tokenizer. Pass `{name}`.")
    return found


def _build(
    model: PreTrainedModel,
    options: DraftShapeOptions,
    widths: dict[str, int],
    texts: Sequence[list[int]],
    show_progress: bool,
) -> tuple[PreTrainedModel, list[int]]:
    """The draft with the donor's vocabulary, and the layers of the donor that it has."""
    config = model.config.get_text_config()
    is_tied = choose_tying(config, options, widths)
    description = "Sample text" if show_progress else None
    if options.fresh_layers:
        activity = measure_activity(model, texts, reads_parts=False, description=description) if texts else None
        num_layers = options.num_hidden_layers or config.num_hidden_layers
        draft = build_llama(config, widths, num_layers, is_tied, options.seed)
        rotation = torch.eye(config.hidden_size, dtype=torch.float64)
        if activity is not None:
            rotation = find_principal_directions([activity.states[0], activity.states[-1]], widths["hidden_size"])
        place_embeddings(draft, model, rotation)
        return draft, []
    draft = copy.deepcopy(model).float()
    layers = list(range(len(find_layers(model)))) if options.layers is None else list(options.layers)
    num_layers = options.num_hidden_layers or len(layers)
    if num_layers < len(layers):
        activity = measure_activity(draft, texts, reads_parts=False, description=description)
        layers = choose_layers(activity.influence, num_layers)
    cut_layers(draft, layers)
    if any(widths[name] != getattr(config, name, None) for name in WIDTHS):
        activity = measure_activity(draft, texts, reads_parts=True, description=description)
        return slice_widths(draft, activity, widths, is_tied), layers
    if config.tie_word_embeddings and not is_tied:
        head = draft.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        draft.config.get_text_config().tie_word_embeddings = draft.config.tie_word_embeddings = False
    return draft, layers
