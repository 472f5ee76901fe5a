"""A short training of one shape, for the acceptance that it reaches in a given time."""

import time
from tempfile import TemporaryDirectory
from typing import cast

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from spec_kd.drafts.init_draft import init_draft
from spec_kd.drafts.options import DraftShapeOptions
from spec_kd.drafts.plan_options import DraftPlanOptions
from spec_kd.drafts.plan_report import ShortRun
from spec_kd.evaluation.response_replay import ResponseScores, score_responses
from spec_kd.open_types import Arguments
from spec_kd.prompts.splitting import hold_out_rows
from spec_kd.reports.numbers import Interval
from spec_kd.trainer import WhiteBoxDistillConfig, WhiteBoxDistillTrainer
from spec_kd.vocabulary import ProcessingClass

WARMUP_STEPS = 20


def run_briefly(
    target: PreTrainedModel,
    shape: DraftShapeOptions,
    responses: Dataset,
    options: DraftPlanOptions,
    *,
    gammas: range,
    serving_engine: str,
    processing_class: ProcessingClass,
    show_progress: bool,
) -> ShortRun:
    """Makes a draft of a shape, trains it for some minutes, and replays it on responses held out.

    Args:
        target (`PreTrainedModel`): The target, which the draft is made from. It is the teacher unless the responses
            have a teacher signal.
        shape (`DraftShapeOptions`): The shape.
        responses (`Dataset`): Rows with `prompt_ids` and `completion_ids`; the first ones are held out.
        options (`DraftPlanOptions`): Time, rows held out, learning rate and batch.
        gammas (`range`): Numbers of drafted tokens to replay.
        serving_engine (`str`): Engine whose rounds are replayed.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`): The target's.
        show_progress (`bool`): Whether to show the progress of the training.

    Raises:
        ValueError: As [`~spec_kd.init_draft`], [`~spec_kd.WhiteBoxDistillTrainer`] and [`~spec_kd.replay`].
    """
    held_out, rows = hold_out_rows(responses, options.num_held_out)
    found = init_draft(
        target,
        shape,
        responses=rows,
        temperature=options.temperature,
        processing_class=processing_class,
        show_progress=False,
    )

    def score() -> ResponseScores:
        judge = target if options.temperature > 0 else None
        how: Arguments = {"temperature": options.temperature, "serving_engine": serving_engine}
        return score_responses(found.draft, judge, held_out, **how)

    before = score()
    with TemporaryDirectory() as folder:
        trainer = WhiteBoxDistillTrainer(
            found.draft,
            WhiteBoxDistillConfig(
                output_dir=folder,
                max_train_minutes=options.run_minutes,
                learning_rate=options.learning_rate,
                warmup_steps=WARMUP_STEPS,
                per_device_train_batch_size=options.per_device_train_batch_size,
                max_length=options.max_length,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=not show_progress,
                use_cpu=not torch.accelerator.is_available(),
                seed=shape.seed,
            ),
            train_dataset=rows,
            processing_class=processing_class,
            teacher_model=None if "teacher_info" in rows.column_names else target,
        )
        started = time.perf_counter()
        trainer.train()
        seconds, steps = time.perf_counter() - started, trainer.state.global_step
    scores = score()
    longest = int(scores.lengths.max())
    replayed = {gamma: scores.replay(gamma, longest) for gamma in gammas}
    return ShortRun(
        alpha=cast(Interval, replayed[gammas[0]].alpha),
        alpha_before=float(before.alpha_sum.sum() / before.lengths.sum()),
        block_efficiency={str(gamma): metrics.block_efficiency for gamma, metrics in replayed.items()},
        steps=steps,
        seconds=seconds,
    )
