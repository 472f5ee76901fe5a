"""One pass of each model over responses, with the acceptance of every token as its result."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from spec_kd.evaluation.options import ReplayOptions
from spec_kd.evaluation.parallel_blocks import check_blocks, compute_block_states
from spec_kd.evaluation.response_rows import Response
from spec_kd.evaluation.stored_responses import read_stored_sparse
from spec_kd.evaluation.token_scores import (
    CONFIDENCE,
    SCORES,
    draw_misses,
    measure_confidence,
    score_from_stored,
    score_from_target,
)
from spec_kd.finite import check_finite_weights, check_logits
from spec_kd.heads import LogitHead, compute_last_hidden_states, evaluation_mode, find_input_device
from spec_kd.parallel import ParallelDrafting
from spec_kd.probes import check_padding
from spec_kd.progress import RowProgress
from spec_kd.sampling.generation import seed_generator
from spec_kd.sampling.token_masks import TokenMasks, free_words, unpack

MAX_LOGITS = 2**25  # logits of one model held at a time: 128 MiB in float32
COLUMNS = (*SCORES, CONFIDENCE, "miss")
"""What is known of each token: its scores, and the id that the draft proposes where it is not accepted; NaN if not."""


@dataclass(frozen=True)
class ResponseScorer:
    """Scores responses by one pass of each model.

    Args:
        models (`Mapping[str, PreTrainedModel]`): `"draft"`, and `"target"` if it is needed.
        options (`ReplayOptions`): How the responses were sampled, and how a draft is.
        vocab_size (`int`): Number of real ids.
        masks (`TokenMasks`, *optional*): Masks for responses with a format.
        masked (`tuple[str, ...]`, *optional*, defaults to `()`): Models to which these masks are applied.
        draws_misses (`bool`, *optional*, defaults to `False`): Whether the draft's rejected tokens are wanted too.
        parallel (`ParallelDrafting`, *optional*):
            For a parallel draft its mask token, and the number of tokens of a round to score (K).
    """

    models: Mapping[str, PreTrainedModel]
    options: ReplayOptions
    vocab_size: int
    masks: TokenMasks | None = None
    masked: tuple[str, ...] = ()
    draws_misses: bool = False
    parallel: ParallelDrafting | None = None

    def score(self, responses: Sequence[Response], progress: RowProgress | None = None) -> dict[str, torch.Tensor]:
        """What is known of every token of P responses by the names of `COLUMNS`, float64 `(P, N)` on the CPU.

        For a parallel draft `(P, N, K)`: of token i + k in a round that begins at token i. Right padded with zeros;
        without the columns that are unknown. Train and eval modes are restored.
        """
        for role, model in self.models.items():
            check_finite_weights(model, role)
            check_padding(model, role)
        if self.parallel is not None:
            check_blocks(self.models["draft"], self.parallel, responses)
        order = sorted(range(len(responses)), key=lambda i: -len(responses[i].text))
        parts = [torch.empty(0)] * len(responses)
        with evaluation_mode(*self.models.values()):
            for start in range(0, len(order), self.options.batch_size):
                rows = order[start : start + self.options.batch_size]
                batch = [responses[i] for i in rows]
                scores = self._score_batch(batch, f"misses {start}")  # (N, K, S)
                for i, part in zip(rows, scores.split([len(one.completion) for one in batch]), strict=True):
                    parts[i] = part
                if progress is not None:
                    progress.advance(len(scores), len(rows))
        values = pad_sequence(parts, batch_first=True)  # (P, N, K, S)
        columns = (values[:, :, 0] if self.parallel is None else values).unbind(-1)
        return {name: one for name, one in zip(COLUMNS, columns, strict=True) if not one.isnan().any()}

    def _score_batch(self, batch: Sequence[Response], seed: str) -> torch.Tensor:
        """The columns of the batch's N completion tokens, response after response, float64 `(N, K, S)` on the CPU."""
        options = self.options
        ids = pad_sequence([torch.tensor(one.text) for one in batch], batch_first=True)  # (B, T)
        positions = torch.arange(ids.shape[1])
        starts = torch.tensor([len(one.prompt) for one in batch])[:, None]
        ends = starts + torch.tensor([len(one.completion) for one in batch])[:, None]
        mask = (positions < ends).long()
        predicts_completion = (positions >= starts - 1) & (positions < ends - 1)  # (B, T)
        tokens = ids.roll(-1, dims=1)[predicts_completion]  # (N,)

        hidden, heads = {}, {role: LogitHead.of(model, self.vocab_size) for role, model in self.models.items()}
        for role, model in self.models.items():
            if role == "draft" and self.parallel is not None:
                hidden[role] = torch.cat(
                    [compute_block_states(model, one, self.parallel) for one in batch]
                )  # (N, K, H)
                continue
            device = find_input_device(model)
            states = compute_last_hidden_states(
                model, model.get_output_embeddings(), input_ids=ids.to(device), attention_mask=mask.to(device)
            )  # (B, T, H)
            hidden[role] = states[predicts_completion.to(states.device)]  # (N, H)
        # Token `at` of the batch is scored in rounds that begin `depth` tokens before it, for a parallel draft in K
        size = 1 if self.parallel is None else self.parallel.num_tokens
        place = torch.cat([torch.arange(len(one.completion)) for one in batch])  # (N,)
        at, depth = (torch.arange(size) <= place[:, None]).nonzero(as_tuple=True)  # (E,) each, `at` ascending
        if self.parallel is not None:
            hidden["draft"] = hidden["draft"][at - depth, depth]  # (E, H)

        log_p = sparse = None
        if "target" not in self.models and options.temperature > 0:
            log_p = torch.tensor([value for one in batch for value in one.row["teacher_token_logprobs"]])
            sparse = read_stored_sparse([one.row for one in batch])
        words = None if self.masks is None else torch.cat([_build_words(self.masks, one) for one in batch])
        scores = torch.zeros(len(tokens), size, len(COLUMNS), dtype=torch.float64)
        draft_top_k = options.engine.find_draft_top_k(options.sampling)
        generator = seed_generator(seed, find_input_device(self.models["draft"]))
        chunk_size = max(1, MAX_LOGITS // self.vocab_size)
        for start in range(0, len(at), chunk_size):
            entries = slice(start, start + chunk_size)
            of = at[entries]  # (n,)
            logits = {"draft": heads["draft"](hidden["draft"][entries])}  # (n, V)
            if "target" in heads:
                once, repeats = of.unique_consecutive(return_inverse=True)
                values = heads["target"](hidden["target"][once])
                logits["target"] = values if len(once) == len(of) else values[repeats]
            for role, values in logits.items():
                check_logits(values, self.models[role], role)
                if words is not None and role in self.masked:
                    is_allowed = unpack(words[of].to(values.device), self.vocab_size)
                    logits[role] = values.masked_fill(~is_allowed, -torch.inf)
            draft_logits = logits["draft"]
            expected = tokens[of].to(draft_logits.device)
            if log_p is None:
                part = score_from_target(
                    draft_logits, logits.get("target"), expected, options.temperature, options.sampling,
                    options.top_k, options.top_p, draft_top_k,
                )  # fmt: skip
            else:
                part = score_from_stored(
                    draft_logits,
                    log_p[of].to(expected.device),
                    expected,
                    options.temperature,
                    options.sampling,
                    None if sparse is None else sparse[of].to(expected.device),
                    draft_top_k,
                )
            confidence, misses = torch.full_like(part[:2], torch.nan).split(1)
            if options.engine.early_end is not None:
                confidence[0] = measure_confidence(
                    draft_logits, expected, options.temperature, options.sampling, options.engine.early_end,
                    options.top_k, options.top_p, draft_top_k,
                )  # fmt: skip
            if self.draws_misses:
                misses[0] = draw_misses(
                    draft_logits, logits.get("target"), options.temperature, options.sampling, generator, draft_top_k
                )
            scores[of - depth[entries], depth[entries]] = torch.cat([part, confidence, misses]).T.double().cpu()
        return scores


def _build_words(masks: TokenMasks, one: Response) -> torch.Tensor:
    if one.format is None:
        return free_words(len(one.completion), masks.vocab_size)
    return masks.build(one.format, one.written, one.completion)
