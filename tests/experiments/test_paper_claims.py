"""All stages of `experiments/paper_claims` on models of a few thousand parameters."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import trl.trainer.utils
from datasets import Dataset

from experiments.paper_claims import run_cell
from experiments.paper_claims.__main__ import main
from experiments.paper_claims.answers import Lab
from experiments.paper_claims.batches import order_by_length
from experiments.paper_claims.cells import DIVERGED, compute_key, find_outcomes, make_base
from experiments.paper_claims.data import read_domain
from experiments.paper_claims.loss_positions import project_loss_positions_only
from experiments.paper_claims.models import hash_weights
from experiments.paper_claims.plan import find_cells_left, format_plan
from experiments.paper_claims.profile import read_profile
from experiments.paper_claims.questions import list_cells, list_questions
from experiments.paper_claims.record import Record, Workspace
from spec_kd import BlackBoxSFTConfig, BlackBoxSFTTrainer


def test_every_planned_cell_is_in_the_record(profile_path, record_path):
    profile, record = read_profile(str(profile_path)), Record(record_path)
    for cell in list_cells(list_questions(profile)):
        (line,) = record.find_builds("cell", compute_key(profile, cell)).values()
        assert len(line["figures"]["greedy"]["tokens"]) == (4 if cell.split == "test" else 3)
    assert {line["target"] for line in record.list("drift")} == {"domain", "generic"}
    assert {line["scenario"] for line in record.list("queries")} == {"historical", "curated", "synthetic"}


def test_finished_cells_and_stages_are_not_repeated(record_path, run):
    before = record_path.read_bytes()
    for stage in ("targets", "drift", "answers", "runs"):
        run(stage)
    assert record_path.read_bytes() == before


def test_report_is_made_from_the_record_alone(record_path, tmp_path, run):
    copy = tmp_path / "smoke" / "record.jsonl"
    copy.parent.mkdir()
    copy.write_bytes(record_path.read_bytes())
    run("report", "--results_dir", str(tmp_path))
    text = (copy.parent / "report.md").read_text()
    assert "tools: white box over black box, equal wall_clock" in text
    assert "Synthetic queries reach 80 % of historical ones" in text
    for name in ("summary", "claims", "curves", "sizes"):
        assert (copy.parent / f"{name}.png").stat().st_size > 0


def test_plan_counts_what_is_done(profile_path, record_path):
    profile = read_profile(str(profile_path))
    for record, share in ((Record(profile_path.parent / "none.jsonl"), 0), (Record(record_path), 1)):
        row = next(line.split() for line in format_plan(profile, record).splitlines() if " white_black " in line)
        assert int(row[3]) == share * int(row[2]) and int(row[2]) > 0


def test_steps_of_equal_wall_clock_take_as_long_as_the_base_cell(profile_path, record_path):
    profile, record = read_profile(str(profile_path)), Record(record_path)
    base = make_base(profile, "tools")
    (first,) = record.find_builds("cell", compute_key(profile, base)).values()
    answers = first["completion_seconds"]
    for method, own_answers in (("black_box", answers), ("on_policy", 0.0)):
        cell = replace(base, method=method, budget="wall_clock")
        (line,) = record.find_builds("cell", compute_key(profile, cell)).values()
        budget = 3 * line["probed"]["base_step_seconds"] + answers - own_answers
        assert answers > 0
        assert line["steps"] == max(1, int(budget / line["probed"]["own_step_seconds"]))
    cached = replace(base, signal="sampled_counts")
    (line,) = record.find_builds("cell", compute_key(profile, cached)).values()
    assert line["completion_seconds"] == pytest.approx(1.09 * answers)


def test_a_cell_that_diverges_is_noted_once_and_the_others_are_run(profile_path, record_path, tmp_path, monkeypatch):
    profile, folder = read_profile(str(profile_path)), tmp_path / "smoke"
    shutil.copytree(record_path.parent, folder)
    kept = [line for line in (folder / "record.jsonl").read_text().splitlines() if '"kind": "cell"' not in line]
    (folder / "record.jsonl").write_text("\n".join([*kept, ""]))
    original, trained = run_cell.train, []

    def train(lab, cell, rows, steps):
        trained.append(cell)
        if cell.method == "black_box":
            raise run_cell.DivergedError("The loss is not finite.")
        return original(lab, cell, rows, steps)

    monkeypatch.setattr(run_cell, "train", train)
    options = ["--profile", str(profile_path), "--work_dir", str(profile_path.parent / "work")]
    for _ in range(2):
        main(["runs", *options, "--results_dir", str(tmp_path), "--questions", "white_black", "white_black_time"])
    record = Record(folder / "record.jsonl")
    assert len(trained) == len(set(map(str, trained))) == len(list(record.list("cell"))) + 2
    assert [line["cell"]["budget"] for line in record.list(DIVERGED)] == ["steps", "wall_clock"]
    black = next(cell for cell in trained if cell.method == "black_box")
    (outcome,) = find_outcomes(profile, record, black).values()
    assert outcome["error"] == "The loss is not finite."
    main(["report", *options, "--results_dir", str(tmp_path)])
    assert "tools 4 black_box" in (folder / "report.md").read_text().split("## Cells whose loss diverged")[1]


def test_models_built_anew_have_queries_and_cells_of_their_own(profile_path, record_path, tmp_path, draft):
    profile, work = read_profile(str(profile_path)), profile_path.parent / "work" / "smoke"
    record = Record(record_path)
    first = Lab(Workspace(profile, work, record), "tools")
    shutil.copytree(work / "models", tmp_path / "models")
    again = Lab(Workspace(profile, tmp_path, record), "tools")
    assert (again.build, again.folder.name) == (first.build, first.folder.name)
    assert {line["build"] for kind in ("cell", "drift", "queries") for line in record.list(kind)} == {first.build}
    assert find_cells_left(profile, record, list_questions(profile), {"tools": again.build}) == {}
    draft.save_pretrained(again.models.domain_target)  # other weights
    other = Lab(Workspace(profile, tmp_path, record), "tools")
    assert other.build != first.build and other.folder.name != first.folder.name
    assert hash_weights("my-org/target") == ""


def test_roles_and_shares(profile_path):
    rows = read_domain(read_profile(str(profile_path)), "tools")
    assert all(row["prompt"][-1]["content"].startswith("Find") for row in rows.historical + rows.test)
    assert all(row["prompt"][-1]["content"].startswith("Name") for row in rows.curated)
    firsts = [{row["prompt"][-1]["content"] for row in part} for part in (rows.target, rows.historical + rows.curated)]
    assert not firsts[0] & firsts[1]


def test_rows_of_similar_length_share_a_batch_and_a_few_batches_have_all_lengths():
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(5, 1, 1_003).astype(int).tolist()
    order = order_by_length(lengths, 8, seed=1)
    assert sorted(order) == list(range(1_003))
    batches = np.array(lengths)[order][:1_000].reshape(125, 8)
    assert batches.max(axis=1).mean() < 1.3 * np.mean(lengths)
    assert np.array(lengths)[rng.permutation(1_000)].reshape(125, 8).max(axis=1).mean() > 2.5 * np.mean(lengths)
    medians = np.median(batches, axis=1)
    for start in range(0, 118):
        assert abs((medians[start : start + 8] < np.median(lengths)).mean() - 0.5) <= 0.13
    assert order != order_by_length(lengths, 8, seed=2)
    assert order_by_length([3, 1], 8, seed=0) in ([0, 1], [1, 0])


def test_only_positions_of_the_loss_are_projected_and_the_loss_is_the_same(draft, tokenizer, tmp_path, monkeypatch):
    head, projected = trl.trainer.utils._ChunkedLogProbFunction, []

    class Watched:
        @staticmethod
        def apply(hidden, *arguments):
            projected.append(len(hidden))
            return head.apply(hidden, *arguments)

    monkeypatch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", Watched)
    rows = Dataset.from_list([{"prompt_ids": [5] * 20, "completion_ids": [6, 7, 8]}] * 2)
    args = BlackBoxSFTConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False)
    trainer = BlackBoxSFTTrainer(draft, args, train_dataset=rows, processing_class=tokenizer)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    projected.clear()  # of the probes before training
    everywhere = trainer.compute_loss(trainer.model, dict(batch))
    with project_loss_positions_only():
        there = trainer.compute_loss(trainer.model, dict(batch))
    assert projected == [2 * 22, 2 * 3]
    assert there.item() == pytest.approx(everywhere.item(), rel=1e-5)
