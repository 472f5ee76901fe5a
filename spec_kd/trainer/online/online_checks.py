"""What online distillation refuses before training: stored teachers, and prompts without room for a completion."""

from collections.abc import Iterable, Mapping

from spec_kd.losses import TokenLoss
from spec_kd.sampling.input_checks import check_room
from spec_kd.trainer.online.generated_rows import find_prompt


def check_live_models(loss: TokenLoss, lmbda: float, has_teacher: bool, has_reference: bool) -> None:
    """Raises `ValueError` unless there are live models to ask about completions that are generated.

    Args:
        loss (`TokenLoss`): The loss of the run, whose token selection may need a reference draft.
        lmbda (`float`): Probability that an example gets a new completion.
        has_teacher (`bool`): Whether there is a live target.
        has_reference (`bool`): Whether there is a live reference draft.
    """
    if not has_teacher:
        raise ValueError(
            "OnlineGKDTrainer needs a live `teacher_model`: a stored signal belongs to the dataset's completions, not "
            "to generated ones. Pass the target as a model, a path or a Hub id, or use WhiteBoxDistillTrainer."
        )
    selection = loss.selection
    if lmbda > 0 and selection is not None and selection.needs_reference and not has_reference:
        raise ValueError(
            f"`token_selection={selection.name!r}` needs a live `ref_model` with `lmbda={lmbda}`: the scores of a "
            "`reference_forward_kl` column belong to the dataset's completions, not to generated ones. Pass "
            "`ref_model`, or set `lmbda=0`."
        )


def check_row_room(
    rows: Iterable[dict[str, list[int]]], limits: Mapping[str, int | None], max_new_tokens: int, name: str
) -> None:
    """Raises `ValueError` unless every row is a prompt and a completion, with room after the prompt.

    Args:
        rows (`Iterable`): Rows with `input_ids` and `labels`.
        limits (`Mapping[str, int]`): Positions of all that read or write the rows, by their roles; `None` if unlimited.
        max_new_tokens (`int`): Maximum number of tokens to be generated.
        name (`str`): Names the rows in the error.
    """
    lengths = [len(find_prompt(row, f"Row {i} of {name}")) for i, row in enumerate(rows)]
    check_room(lengths, max_new_tokens, limits, name=lambda i: f"The prompt of row {i} of {name}")
