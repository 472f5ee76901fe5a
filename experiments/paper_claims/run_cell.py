"""One cell: the generic draft is trained as the cell says and measured, and its line is written."""

import math
import statistics
import tempfile
import time
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedModel, TrainerCallback

from spec_kd import (
    BlackBoxSFTConfig,
    BlackBoxSFTTrainer,
    OnlineGKDConfig,
    OnlineGKDTrainer,
    WhiteBoxDistillConfig,
    WhiteBoxDistillTrainer,
    add_reference_scores,
)

from .answers import ID_COLUMNS, Lab
from .cells import BLACK_BOX, DIVERGED, RESULT, STEPS, WHITE_BOX, Cell, compute_key, make_base
from .loss_positions import project_loss_positions_only
from .measure import measure_draft
from .models import load_model

ADASPEC = "adaspec"
# What a signal kept with the answers adds to the time they take: the larger of two in
# benchmarks/results/offline_cache_generated_function_calling.md, rounded up
SIGNAL_SHARE = 0.09
# What every trainer is told besides the profile's options
FIXED = {
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 10,
    "disable_tqdm": True,
    "max_length": None,
    "dataloader_pin_memory": False,
}


class DivergedError(ValueError):
    """The loss of a cell is not finite: a result too, and no other run would have another."""


class StepTimer(TrainerCallback):
    """Seconds of every optimizer step, whatever is done in it, data and generation included."""

    def __init__(self):
        self.seconds: list[float] = []

    def on_train_begin(self, args, state, control, **_):
        self._since = time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        now = time.perf_counter()
        self.seconds.append(now - self._since)
        self._since = now


@project_loss_positions_only()
def run_cell(lab: Lab, cell: Cell, questions: list[str]) -> dict[str, Any]:
    """Trains and measures a cell and appends its line to the record.

    Args:
        lab (`Lab`): The cell's domain.
        cell (`Cell`): What to do.
        questions (`list[str]`): That it answers, for readers of the record.

    Raises:
        `ValueError`: Too few queries, or nothing known about what answers take.
        `DivergedError`: A loss that is not finite, which is noted in the record.
    """
    rows = lab.choose_rows(cell)
    steps, probed = find_steps(lab, cell, rows)
    record, key = lab.workspace.record, compute_key(lab.profile, cell)
    try:
        model, training = train(lab, cell, rows, steps)
    except DivergedError as error:
        record.append(
            DIVERGED, key, build=lab.build, cell=dict(vars(cell)), questions=questions, steps=steps, error=str(error)
        )
        raise
    started = time.perf_counter()
    figures = measure_draft(lab, model, lab.target, lab.list_texts(cell.split))
    return record.append(
        RESULT,
        key,
        build=lab.build,
        cell=dict(vars(cell)),
        questions=questions,
        steps=steps,
        probed=probed,
        completion_seconds=find_completion_seconds(lab, cell),
        evaluation_seconds=time.perf_counter() - started,
        threads=torch.get_num_threads(),
        **training,
        figures=figures,
    )


def find_steps(lab: Lab, cell: Cell, rows: Dataset) -> tuple[int, dict[str, float]]:
    """Optimizer steps of a cell: the profile's, or those that fit the base cell's wall-clock; and the speeds behind it.

    Both cells are timed here, one after the other, so that a machine that is slower today is slower for both.
    """
    steps = lab.profile.training.steps
    if cell.budget == STEPS:
        return steps, {}
    base = replace(make_base(lab.profile, cell.domain), seed=cell.seed)
    base_seconds = probe(lab, base, lab.choose_rows(base), base.method)
    own_seconds = sum(share * probe(lab, cell, rows, method) for method, share in cell.phases)
    budget = steps * base_seconds + find_completion_seconds(lab, base)
    passes = 2 if cell.token_selection == ADASPEC else 1  # its reference is trained for as long
    fitting = (budget - find_completion_seconds(lab, cell)) / (own_seconds * passes)
    return max(1, int(fitting)), {"base_step_seconds": base_seconds, "own_step_seconds": own_seconds}


def find_completion_seconds(lab: Lab, cell: Cell) -> float:
    """What the target took to answer a cell's queries, and to leave its signal where its teacher is cached."""
    if not cell.reads_answers:
        return 0.0
    line = lab.workspace.record.find("completion_seconds", lab.folder.name, lab.build)
    if line is None:
        raise ValueError(f"Nothing is known about answers in {cell.domain}. Run the stage `answers` first.")
    seconds = cell.num_prompts * line["seconds_per_completion"]
    return seconds if cell.signal is None else seconds * (1 + SIGNAL_SHARE)


def probe(lab: Lab, cell: Cell, rows: Dataset, method: str) -> float:
    """Seconds of a step of one of a cell's methods, from a few steps that nothing is kept of."""
    timer = StepTimer()
    trainer = make_trainer(lab, cell, method, load_draft(lab, cell), rows, lab.profile.training.probe_steps, [timer])
    trainer.train()
    return statistics.mean(timer.seconds[1:])


def load_draft(lab: Lab, cell: Cell) -> PreTrainedModel:
    """The generic draft that a cell begins with, in float32."""
    return load_model(lab.models.drafts[cell.draft])


def train(lab: Lab, cell: Cell, rows: Dataset, steps: int) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The trained draft; what it took and how its loss went. A reference draft counts as a part of the training."""
    started, timer, scoring = time.perf_counter(), StepTimer(), 0.0
    if cell.token_selection == ADASPEC:
        plain = replace(cell, token_selection="all")
        reference = make_trainer(lab, plain, WHITE_BOX, load_draft(lab, cell), rows, steps, [timer])
        reference.train()
        since = time.perf_counter()
        rows = add_reference_scores(
            rows,
            reference.model,
            lab.target,
            vocab_size=lab.vocab_size,
            batch_size=lab.profile.training.batch_size,
            show_progress=False,
        )
        scoring = time.perf_counter() - since
    model, loss, phases = load_draft(lab, cell), [], cell.phases
    for number, (method, share) in enumerate(phases):
        phase_steps = steps if len(phases) == 1 else max(1, round(steps * share))
        trainer = make_trainer(lab, cell, method, model, rows, phase_steps, [timer])
        trainer.train()
        loss += [round(log["loss"], 4) for log in trainer.state.log_history if "loss" in log]
        model = trainer.model
        if number + 1 < len(phases):  # trainers patch the model they are given: the next one gets it from the disk
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                model = load_model(folder)
    if not all(map(math.isfinite, loss)):
        raise DivergedError(f"The loss of {cell} is not finite: {loss}. Lower the learning rate.")
    return model, {
        "train_seconds": sum(timer.seconds) + scoring,
        "total_seconds": time.perf_counter() - started,
        "loss": loss,
    }


def make_trainer(
    lab: Lab,
    cell: Cell,
    method: str,
    model: PreTrainedModel,
    rows: Dataset,
    steps: int,
    callbacks: list[TrainerCallback],
) -> BlackBoxSFTTrainer | WhiteBoxDistillTrainer:
    """The trainer of a method."""
    profile = lab.profile
    options = {**FIXED, **profile.training.find_options(cell.domain, method, cell.options)}
    if cell.domain in profile.training.length_ordered:
        options["train_sampling_strategy"] = "sequential"
    options |= {"output_dir": str(lab.workspace.folder / "trainer"), "max_steps": steps, "seed": cell.seed}
    common = {"model": model, "processing_class": lab.tokenizer, "callbacks": callbacks}
    if cell.adapter is not None:
        common["peft_config"] = LoraConfig(**profile.training.adapters[cell.adapter]["peft"])
    if method == BLACK_BOX:
        args = BlackBoxSFTConfig(**options)
        return BlackBoxSFTTrainer(args=args, train_dataset=rows.select_columns(ID_COLUMNS), **common)
    options["divergence"] = cell.divergence
    if method == WHITE_BOX:
        args = WhiteBoxDistillConfig(token_selection=cell.token_selection, **options)
        teacher = None if cell.signal is not None else lab.target
        return WhiteBoxDistillTrainer(args=args, teacher_model=teacher, train_dataset=rows, **common)
    limit = {"max_new_tokens": profile.data.max_new_tokens}
    args = OnlineGKDConfig(**limit, **options)
    prompts = rows.select_columns(["prompt_ids"])
    return OnlineGKDTrainer(args=args, teacher_model=lab.target, train_dataset=prompts, **common)
