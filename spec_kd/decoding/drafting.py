"""How a draft proposes the tokens of a round: one pass for each token, or one pass for all of them (a parallel draft).

Both read a batch of rows in a [`RaggedModel`]. So that rows stay in step, each round reads the same number of last
tokens again in every row (`num_last`), as many as a round may have added.
"""

from typing import NamedTuple, Protocol

import torch

from spec_kd.decoding.options import SpeculationOptions
from spec_kd.decoding.ragged_model import RaggedModel
from spec_kd.parallel import ParallelDrafting
from spec_kd.sampling.generation import build_warpers, draw_each


class Proposal(NamedTuple):
    """The drafted tokens of B rows.

    Args:
        ids (`torch.Tensor`): Drafted ids, int64 `(B, G)`.
        q (`torch.Tensor`, *optional*): Probabilities that they were sampled from, `(B, G, V)`; `None` if greedy.
    """

    ids: torch.Tensor
    q: torch.Tensor | None


class Drafter(Protocol):
    """A draft that proposes tokens for a batch of rows."""

    model: RaggedModel
    num_last: int

    def propose(self, last_ids: torch.Tensor, num_drafted: int) -> Proposal:
        """Reads the last tokens of each row, and drafts.

        Args:
            last_ids (`torch.Tensor`): The last `num_last` ids of each row, none of which the model has read `(B, L)`.
            num_drafted (`int`): Tokens to draft (G); the model reads `num_last + G - 1` ids, and none if G is 0.
        """


class _Sampler:
    """Chooses ids from logits, as the options say."""

    def __init__(self, options: SpeculationOptions, generator: torch.Generator):
        self._is_sampled = options.temperature > 0 and options.draft_sampling == "stochastic"
        self._warp = build_warpers(options.temperature, options.top_k, options.top_p)
        self._generator = generator

    def choose(self, logits: torch.Tensor) -> Proposal:
        """One id for each position of logits `(B, G, V)`, each drawn from its own distribution."""
        if not self._is_sampled:
            return Proposal(logits.argmax(dim=-1), None)
        return Proposal(*draw_each(logits, self._warp, self._generator))


class StepwiseDrafter:
    """An autoregressive draft, which reads each of its tokens before it drafts the next one.

    It has not read the last token, nor the one before it if all drafted tokens were accepted: two are read again.
    """

    num_last = 2

    def __init__(self, model: RaggedModel, options: SpeculationOptions, generator: torch.Generator):
        self.model, self._sampler = model, _Sampler(options, generator)

    def propose(self, last_ids: torch.Tensor, num_drafted: int) -> Proposal:
        """See [`Drafter`]."""
        ids, proposed = last_ids, [Proposal(last_ids[:, :0], None)]
        for _ in range(num_drafted):
            proposed.append(self._sampler.choose(self.model.read(ids)))
            ids = proposed[-1].ids
        q = [one.q for one in proposed if one.q is not None]
        return Proposal(torch.cat([one.ids for one in proposed], dim=1), torch.cat(q, dim=1) if q else None)


class ParallelDrafter:
    """A parallel draft, which reads masks in place of the tokens that it drafts (PARD, arXiv 2504.18583).

    What it kept of masks is of no use after the round, so all tokens that a round may add are read again.
    """

    def __init__(
        self, model: RaggedModel, options: SpeculationOptions, generator: torch.Generator, parallel: ParallelDrafting
    ):
        self.model, self._sampler, self._mask_id = model, _Sampler(options, generator), parallel.mask_token_id
        self.num_last = options.num_assistant_tokens + 1

    def propose(self, last_ids: torch.Tensor, num_drafted: int) -> Proposal:
        """See [`Drafter`]."""
        if num_drafted == 0:
            return Proposal(last_ids[:, :0], None)
        masks = last_ids.new_full((len(last_ids), num_drafted - 1), self._mask_id)
        return self._sampler.choose(self.model.read(torch.cat([last_ids, masks], dim=1), num_drafted))
