"""Speculative decoding in which the draft writes while the target verifies."""

import torch


def expect_parallel_steps(
    acceptance: torch.Tensor, gamma: int, lengths: torch.Tensor, first_round: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Steps of PEARL (arXiv 2408.11850), in which the draft writes gamma tokens while the target verifies.

    A step is of one of two kinds. In the first step, and after a refused token, the target has nothing to verify yet
    but the first of the tokens that the draft is writing (pre-verify): a refusal gives the target's token and another
    such step. After an accepted one the target verifies the gamma - 1 other tokens and the first of the next gamma
    (post-verify): if all are accepted, another such step follows; a refusal gives the target's token, and what was
    written meanwhile is thrown away. There is no bonus token.

    Args:
        acceptance (`torch.Tensor`): a_i of P texts `(P, N)`, right padded with anything finite.
        gamma (`int`): Tokens that the draft writes in a step.
        lengths (`torch.Tensor`): Tokens of each text, int64 `(P,)`.
        first_round (`int`, *optional*, defaults to `0`): Token at which the first step begins.

    Returns:
        Expected numbers of steps of the first and of the second kind, float64 `(P,)` each.
    """
    num_texts, longest = acceptance.shape
    is_text = torch.arange(longest, device=acceptance.device) < lengths.to(acceptance.device)[:, None]
    a = torch.nn.functional.pad(acceptance.double().masked_fill(~is_text, 0.0), (0, gamma))
    before, after = (a.new_zeros(num_texts, longest + gamma + 1) for _ in range(2))
    before[:, first_round] = 1
    for i in range(first_round, longest):
        before[:, i + 1] += before[:, i] * (1 - a[:, i])
        after[:, i + 1] += before[:, i] * a[:, i]
        reach = after[:, i, None] * a[:, i : i + gamma].cumprod(dim=-1)  # (P, gamma)
        refused = torch.cat([after[:, i, None], reach[:, :-1]], dim=-1) - reach
        before[:, i + 1 : i + gamma + 1] += refused
        after[:, i + gamma] += reach[:, -1]
    return (before[:, :longest] * is_text).sum(dim=-1), (after[:, :longest] * is_text).sum(dim=-1)
