"""What a draft goes on to propose where it leaves a response, for engines that count some of it.

A response does not tell it: neither what is accepted after its end, nor what a grammar refuses of a draft that took
another way. So the draft writes these tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from transformers import PreTrainedModel

from spec_kd.evaluation.options import ReplayOptions
from spec_kd.evaluation.response_rows import Response
from spec_kd.evaluation.response_scoring import ResponseScorer
from spec_kd.sampling.generation import generate_batch
from spec_kd.sampling.options import SamplingOptions
from spec_kd.sampling.response_format import ResponseFormat
from spec_kd.sampling.token_masks import TokenMasks


@dataclass(frozen=True)
class DraftContinuations:
    """Lets a draft go on from responses and from where it leaves them.

    Args:
        draft (`PreTrainedModel`): The draft.
        options (`ReplayOptions`): How the responses were sampled, and how a draft is.
        vocab_size (`int`): Number of real ids.
        masks (`TokenMasks`, *optional*): Masks for responses with a format.
        num_tokens (`int`): Tokens drafted in a round, at most.
    """

    draft: PreTrainedModel
    options: ReplayOptions
    vocab_size: int
    masks: TokenMasks | None
    num_tokens: int

    def write(self, texts: Sequence[list[int]], num_tokens: int) -> list[list[int]]:
        """The tokens that the draft proposes after each text."""
        if num_tokens == 0 or not texts:
            return [[] for _ in texts]
        sampling = SamplingOptions(
            temperature=self.options.temperature if self.options.sampling != "greedy" else 0.0,
            top_k=self.options.top_k,
            top_p=self.options.top_p,
            max_new_tokens=num_tokens,
        )
        written: dict[int, list[int]] = {}
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        for start in range(0, len(order), self.options.batch_size):
            rows = order[start : start + self.options.batch_size]
            ids = generate_batch(
                self.draft,
                [texts[i] for i in rows],
                sampling,
                eos_ids=(),
                pad_id=0,
                vocab_size=self.vocab_size,
                seed=f"past {start}",
            )
            written |= zip(rows, ids.tolist(), strict=True)
        return [written[i] for i in range(len(texts))]

    def score_past_end(
        self, target: PreTrainedModel, responses: Sequence[Response], written: Sequence[list[int]]
    ) -> torch.Tensor:
        """Acceptance of what the draft wrote after each of P responses, float64 `(P, num_tokens)`.

        The target accepts these tokens, and the draft wrote them: their roles are exchanged.
        """
        options = self.options
        # The target accepts a most likely token with p(x) = the chance that its own sample matches it
        rule = "matching" if options.sampling == "greedy" else options.sampling
        swapped = replace(options, serving_engine="transformers", draft_sampling=rule, max_new_tokens=None)
        models = {"draft": target} | ({"target": self.draft} if options.temperature > 0 else {})
        rows = [
            Response(one.text, ids, format=one.format, written=one.completion)
            for one, ids in zip(responses, written, strict=True)
        ]
        scorer = ResponseScorer(models, swapped, self.vocab_size, self.masks, masked=("draft",))
        is_allowed = torch.arange(self.num_tokens) < self._count_past_end(rows)[:, None]
        return scorer.score(rows)["acceptance"] * is_allowed

    def count_allowed(
        self, responses: Sequence[Response], scores: dict[str, torch.Tensor], written: Sequence[list[int]]
    ) -> torch.Tensor:
        """Number of tokens that a grammar allows where the draft leaves a response, or goes on after its end.

        Args:
            responses (`Sequence[Response]`): P responses.
            scores (`dict[str, torch.Tensor]`): Their scores by [`ResponseScorer`], with misses.
            written (`Sequence[list[int]]`): What the draft wrote after each response.

        Returns:
            `torch.Tensor`: int64 `(P, N + 1)`, at most `num_tokens`, see [`~spec_kd.acceptance.expect_rounds`].
        """
        first = self.options.counting.first_round
        allowed = torch.full((len(responses), scores["acceptance"].shape[1] + 1), self.num_tokens)
        held = [] if self.masks is None else [row for row, one in enumerate(responses) if one.format is not None]
        drafts = {
            row: {
                i: [int(scores["miss"][row, i])]
                for i in range(first, len(responses[row].completion))
                if scores["acceptance"][row, i] < 1
            }
            for row in held
        }
        self._count(allowed, responses, drafts)
        going = [(row, i) for row in held for i in drafts[row] if allowed[row, i] > 0]
        texts = [responses[row].prompt + responses[row].completion[:i] + drafts[row][i] for row, i in going]
        for (row, i), rest in zip(going, self.write(texts, self.num_tokens - 1), strict=True):
            drafts[row][i] += rest
        for row in held:
            drafts[row][len(responses[row].completion)] = written[row]
        self._count(allowed, responses, drafts)
        return allowed

    def _count(
        self, allowed: torch.Tensor, responses: Sequence[Response], drafts: dict[int, dict[int, list[int]]]
    ) -> None:
        """Fills in how many tokens of each draft are allowed, by its row and the token at which it begins."""
        for row, own in drafts.items():
            one = responses[row]
            masks, wanted = cast(TokenMasks, self.masks), cast(ResponseFormat, one.format)
            allowed[row, list(own)] = torch.tensor(masks.count_allowed(wanted, one.completion, list(own.items())))

    def _count_past_end(self, rows: Sequence[Response]) -> torch.Tensor:
        numbers = [
            self.num_tokens
            if one.format is None or self.masks is None
            else self.masks.count_allowed(one.format, one.written, [(len(one.written), one.completion)])[0]
            for one in rows
        ]
        return torch.tensor(numbers)
