"""The first phase of a recipe's training: on text that the target did not write."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import spec_kd
from spec_kd.cli import score, train
from spec_kd.cli.commands import build_parser
from spec_kd.cli.model_checks import check_model
from spec_kd.cli.paths import check_exists
from spec_kd.cli.recipe_sections import is_given, naming, read_section
from spec_kd.cli.steps import Workspace
from spec_kd.cli.target import check_target
from spec_kd.losses import SPARSE_METHODS
from spec_kd.open_types import JsonObject, Record

PRETRAINED = "pretrained"
SCORED = "corpus"
PACKED = {"packing": True, "packing_strategy": "bfd_split"}
"""All of a long text is read, and short ones share a row."""


@dataclass(frozen=True)
class PretrainSteps:
    """The steps of the first phase.

    Args:
        score (`ScoreCall`, *optional*): How the target reads the corpus; `None` if it is a live teacher.
        train (`TrainCall`): How the draft learns from it.
    """

    score: score.ScoreCall | None
    train: train.TrainCall

    def check(self, source: str | None) -> None:
        """Raises `ValueError` or `OSError` for a corpus or a model that is not there, or options that do not fit.

        Args:
            source (`str`, *optional*): A model with the tokenizer and the modules of the draft.
        """
        call = self.train
        if self.score is None:
            check_exists("corpus", call.arguments.responses)
            check_model("teacher", str(call.arguments.target))
        else:
            check_exists("corpus", self.score[0].corpus)
            check_target(self.score[-1], self.score[-2])
        train.check_call(replace(call, draft=replace(call.draft, model_name_or_path=source)))

    def run(self, workspace: Workspace) -> Iterator[tuple[str, JsonObject]]:
        """Runs the steps, and yields the name and the result of each."""
        if self.score is not None:
            yield SCORED, score.run(*self.score, workspace)
        yield PRETRAINED, train.run(self.train, workspace)


def build_pretrain(
    values: Record, folder: str, target: JsonObject, seed: JsonObject, draft: str
) -> PretrainSteps | None:
    """Turns the section `pretrain` into the arguments of commands; `None` for a recipe without it.

    Args:
        values (`Mapping`): The recipe, whose `output_dir` is placed.
        folder (`str`): Folder of the recipe.
        target (`dict`), seed (`dict`): Options of the target, and the seed of all steps.
        draft (`str`): The draft that the phase begins with.
    """
    if not is_given(values, "pretrain"):
        return None
    output_dir = values["output_dir"]
    with naming("pretrain"):
        section = read_section(values["pretrain"], "pretrain", folder)
        corpus, scoring = section.pop("corpus", None), section.pop("score", None)
        if not isinstance(corpus, str):
            raise ValueError("`corpus` is missing: a file, a folder or a name on the Hub.")
        given = {**seed, **PACKED, **section}
        score_call = None
        if scoring is None or scoring is False:
            given = {"completion_only_loss": False, **given, "responses": corpus}
        else:
            with naming("score"):
                options = {**target, **seed, **read_section(scoring, "score", folder)}
                options |= {"corpus": corpus, "output_dir": f"{output_dir}/{SCORED}"}
                score_call = build_parser("score").parse_values(options)
            given["responses"] = f"{output_dir}/{SCORED}/{score.PRODUCTS[0]}"
        given |= {
            "output_dir": f"{output_dir}/{PRETRAINED}",
            "target": target["target"],
            "model_name_or_path": draft,
        }
        parser = build_parser("train white_box")
        arguments, model, config = parser.parse_values(given)
        if score_call is not None and isinstance(config, spec_kd.WhiteBoxDistillConfig):
            signal = score_call[1].teacher_signal
            config.build_loss().check_served_by(SPARSE_METHODS[str(signal)])
        return PretrainSteps(score_call, train.TrainCall("white_box", arguments, model, config, parser.chosen))
