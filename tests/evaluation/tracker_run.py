"""A run that sends a picture to Trackio and W&B, for `test_trackers.py`: `tracker_run.py OUTPUT_DIR TRACKER...`.

A process of its own: Trackio reads its folder from the environment when it is imported, and both start threads. Prints,
as the last line, what was reached before, during and after training, and what Trackio has stored.
"""

import json
import sys

import numpy as np
from tiny import build_llama
from transformers import Trainer, TrainerCallback, TrainingArguments

from spec_kd.evaluation.metrics import AcceptanceMetrics
from spec_kd.evaluation.trackers import log_picture, plot_acceptance, render_pixels

ROWS = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * 4


def build_figures(temperature: float = 0.0, prompts: int = 4) -> AcceptanceMetrics:
    """Two tokens drafted in each of ten rounds a prompt; the first accepted in eight or seven, the second in six."""
    accepted = np.stack([np.where(np.arange(prompts) % 2, 8, 7), np.full(prompts, 6)], axis=1)
    return AcceptanceMetrics(
        tokens=accepted.sum(axis=1) + 10,
        target_calls=np.full(prompts, 10),
        accepted=accepted.sum(axis=1),
        drafted=np.full(prompts, 20),
        drafting_rounds=np.full(prompts, 10),
        accepted_by_position=accepted,
        temperature=temperature,
        num_assistant_tokens=2,
        draft_sampling="stochastic",
        method="replay",
    )


def build_trainer(output_dir: str, report_to: list[str]) -> tuple[Trainer, list[list[str]]]:
    """A trainer of one step with a picture at its evaluation, and the list that fills with the trackers reached."""
    reached = []

    class SendPicture(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            figure = plot_acceptance({0.0: build_figures()})
            reached.append(log_picture(trainer, "eval/acceptance", figure, state.global_step))

    arguments = TrainingArguments(
        output_dir=output_dir,
        run_name="run",
        project="project",
        max_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        report_to=report_to,
    )
    model = build_llama(hidden_size=16, layers=1)
    trainer = Trainer(model, arguments, train_dataset=ROWS, eval_dataset=ROWS, callbacks=[SendPicture()])
    return trainer, reached


def main(output_dir: str, *report_to: str) -> None:
    trainer, reached = build_trainer(output_dir, list(report_to))
    figure = plot_acceptance({0.0: build_figures()})
    before = log_picture(trainer, "early", figure, 0)
    trainer.train()
    if "wandb" in report_to:
        import wandb

        wandb.finish()
    after = log_picture(trainer, "late", figure, 1)
    stored = []
    if "trackio" in report_to:
        from trackio.sqlite_storage import SQLiteStorage

        stored = [log for log in SQLiteStorage.get_logs("project", "run") if "eval/acceptance" in log]
    size = render_pixels(figure).shape
    print(json.dumps({"before": before, "reached": reached, "after": after, "stored": stored, "size": size}))


if __name__ == "__main__":
    main(*sys.argv[1:])
