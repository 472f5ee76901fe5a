"""All stages of `benchmarks/paper_claims` on models of a few thousand parameters."""

import json
import random
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import trl.trainer.utils
import yaml
from datasets import Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.paper_claims import run_cell
from benchmarks.paper_claims.__main__ import main
from benchmarks.paper_claims.batches import order_by_length
from benchmarks.paper_claims.cells import DIVERGED, Cell, apply_changes, compute_key, find_outcome, make_base
from benchmarks.paper_claims.claims import FAILED, HELD, MISSING, PARTIAL, UNKNOWN, judge, judge_claims
from benchmarks.paper_claims.data import read_domain
from benchmarks.paper_claims.loss_positions import project_loss_positions_only
from benchmarks.paper_claims.models import name_models
from benchmarks.paper_claims.plan import find_questions, format_plan
from benchmarks.paper_claims.profile import make, read_profile
from benchmarks.paper_claims.questions import SearchOutcome, list_cells, list_questions
from benchmarks.paper_claims.recipe_search import find_search_outcome
from benchmarks.paper_claims.record import Record
from spec_kd import BlackBoxSFTConfig, BlackBoxSFTTrainer
from spec_kd.evaluation import Interval

COLORS = ("red", "blue", "green", "white")
THINGS = ("stone", "river", "bird", "tree", "lamp")
BUDGET = {"max_steps": 120, "tokens_per_step": 512, "learning_rate": 0.01, "eval_steps": 60}
SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
PROFILE = {
    "name": "smoke",
    "data": {
        "folder": "", "share_for_target": 0.5, "max_prompt_tokens": 120, "max_new_tokens": 8,
        "validation_fraction": 0.3, "num_validation": 3, "num_test": 4,
        "max_queries": 40,
    },
    "domains": {
        "tools": {
            "historical": {"pattern": "Find"},
            "num_synthetic": 4,
            "synthesis": {
                "tools_pattern": "Tools: ", "system_prompts": "Tools: {tools}", "num_tools": 1, "max_new_tokens": 40,
                "near_duplicate_threshold": None, "text_filter": {"min_tokens": 1, "max_repetition": 1.0},
            },
        }
    },
    "build": {
        "vocab_size": 400, "max_length": 160, "target": {**SIZE, "num_hidden_layers": 2}, "drafts": {"default": SIZE},
        "generic_target": {**BUDGET, "prompt_weight": 1.0}, "domain_target": {**BUDGET, "prompt_weight": 1.0},
        "generic_draft": {**BUDGET, "max_steps": 20}, "general_share": 0.2, "num_held_out": 8,
    },
    "training": {
        "steps": 3, "probe_steps": 2,
        "options": {"per_device_train_batch_size": 2, "learning_rate": 0.001, "bf16": False,
                    "gradient_checkpointing": False, "use_cpu": True},
        "online": {"on_policy": {"lmbda": 1.0}, "streaming": {"mode": "streaming", "trained_positions": "all"}},
        "signals": {"sampled_counts": {"method": "sampled_counts", "num_draws": 4}},
        "adapters": {"lora": {"peft": {"r": 2, "target_modules": "all-linear"}, "learning_rate": 0.002}},
        "num_assistant_tokens": 2, "num_timed_prompts": 2, "gammas": [1, 2, 4], "batch_size": 8,
        "length_ordered": ["tools"],
    },
    "plan": {
        "seeds": [0], "ablation_domain": "tools", "ablation_seeds": [0], "num_prompts": 4, "sizes": [2, 4],
        "scenario_prompts": 4, "synthetic_sizes": [], "headline_online": ["on_policy"], "more_online": ["streaming"],
        "learning_rates": {"tools": [0.002]},
        "divergences": [], "token_selections": ["adaspec"], "mixes": {"both": {"historical": 1, "synthetic": 1}},
        "search": {"divergence": [{"divergence": "tvd"}], "polish": [{"polish": "on_policy", "polish_share": 0.5}]},
    },
    "estimates": {
        "prompt_tokens": {"tools": 40}, "answer_tokens": {"tools": 6}, "draft_training": 1000, "target_training": 1000,
        "target_reading": 1000, "draft_writing": 1000, "target_writing": 1000, "serving": 1000,
        "evaluation_minutes": 0.1, "synthesis_yield": 0.5,
    },
}  # fmt: skip


def write_rows(path: Path, kinds: tuple[str, ...], count: int, seed: int, has_tools: bool) -> None:
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        color, thing, kind = rng.choice(COLORS), rng.choice(THINGS), rng.choice(kinds)
        prompt = [{"role": "user", "content": f"{kind} the {color} {thing} number {rng.randrange(1000)}"}]
        if has_tools:
            tools = json.dumps([{"name": f"{thing}_finder", "parameters": {}}])
            prompt.insert(0, {"role": "system", "content": f"Tools: {tools}"})
        answer = f"{thing}_finder {color}" if has_tools else f"It is {color}"
        rows.append({"prompt": prompt, "completion": [{"role": "assistant", "content": answer}]})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def profile_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("paper_claims")
    for split, count, seed in (("train", 120, 0), ("test", 20, 1)):
        write_rows(folder / "data" / "tools" / f"{split}.jsonl", ("Find", "Name"), count, seed, has_tools=True)
        write_rows(folder / "data" / "general" / f"{split}.jsonl", ("Tell",), count, seed + 2, has_tools=False)
    content = {**PROFILE, "data": {**PROFILE["data"], "folder": str(folder / "data")}}
    (folder / "smoke.yaml").write_text(yaml.safe_dump(content))
    return folder / "smoke.yaml"


@pytest.fixture(scope="module")
def run(profile_path):
    """Runs a stage on the profile's own folders."""

    def run(stage: str, *arguments: str) -> None:
        folder = profile_path.parent
        options = ["--profile", str(profile_path), "--work_dir", str(folder / "work"), "--results_dir", str(folder)]
        main([stage, *options, *arguments])

    return run


@pytest.fixture(scope="module")
def record_path(profile_path, run):
    """The record after all stages."""
    for stage in ("targets", "drift", "answers", "runs"):
        run(stage)
    return profile_path.parent / "smoke" / "record.jsonl"


def test_every_planned_cell_is_in_the_record(profile_path, record_path):
    profile, record = read_profile(str(profile_path)), Record(record_path)
    for cell in list_cells(list_questions(profile)):
        line = record.find("cell", compute_key(profile, cell))
        assert line is not None, cell
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
    answers = record.find("cell", compute_key(profile, base))["answer_seconds"]
    for method, own_answers in (("black_box", answers), ("on_policy", 0.0)):
        cell = replace(base, method=method, budget="wall_clock")
        line = record.find("cell", compute_key(profile, cell))
        budget = 3 * line["probed"]["base_step_seconds"] + answers - own_answers
        assert answers > 0
        assert line["steps"] == max(1, int(budget / line["probed"]["own_step_seconds"]))


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
    assert find_outcome(profile, record, black)["error"] == "The loss is not finite."
    main(["report", *options, "--results_dir", str(tmp_path)])
    assert "tools 4 black_box" in (folder / "report.md").read_text().split("## Cells whose loss diverged")[1]


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


def test_key_of_a_cell_follows_what_decides_its_result_only(profile_path):
    profile = read_profile(str(profile_path))
    cell = make_base(profile, "tools")
    training = profile.training
    more = replace(profile, training=replace(training, online={**training.online, "other": {}}))
    assert compute_key(more, cell) == compute_key(profile, cell)
    assert compute_key(replace(profile, training=replace(training, steps=4)), cell) != compute_key(profile, cell)
    shuffled = replace(profile, training=replace(training, length_ordered=["another domain"]))
    assert compute_key(shuffled, cell) != compute_key(profile, cell)
    assert compute_key(shuffled, cell) == compute_key(
        replace(profile, training=replace(training, length_ordered=[])), cell
    )
    faster = replace(cell, options={"learning_rate": 1.0})
    assert compute_key(profile, faster) != compute_key(profile, cell)
    for method in ("white_box", "on_policy"):  # what was tried with an option is the same as what has it by itself
        tuned = replace(profile, training=replace(training, learning_rates={"tools": 1.0}))
        same = [compute_key(tuned, replace(cell, method=method)), compute_key(profile, replace(faster, method=method))]
        assert same[0] == same[1]


def test_only_the_models_that_an_option_concerns_are_built_anew(profile_path):
    profile = read_profile(str(profile_path))
    build = profile.build
    longer = {
        name: replace(getattr(build, name), max_steps=999)
        for name in ("generic_target", "domain_target", "generic_draft")
    }

    def list_renamed(**changes):
        own, other = name_models(profile), name_models(replace(profile, build=replace(build, **changes)))
        return {name for name in own if own[name] != other[name]}

    targets = {f"{domain}_target" for domain in profile.domains}
    assert list_renamed(domain_target=longer["domain_target"]) == targets
    assert list_renamed(generic_target=longer["generic_target"]) == targets | {"generic_target"}
    assert list_renamed(generic_draft=longer["generic_draft"]) == {f"draft_{name}" for name in build.drafts}
    assert list_renamed() == set()


def note_cell(profile, record, cell, target_calls):
    figures = {"texts": "same", "tokens": [100] * 4, "target_calls": [target_calls] * 4, "alpha_sum": [50.0] * 4}
    record.append("cell", compute_key(profile, cell), cell=vars(cell), figures={"greedy": figures, "t1": figures})


def test_the_search_puts_the_best_of_each_axis_together_and_tests_the_winner(profile_path, tmp_path):
    profile, record = read_profile(str(profile_path)), Record(tmp_path / "record.jsonl")
    search = {"loss": [{"divergence": "tvd"}, {"divergence": "jsd"}], "rate": [{"options": {"learning_rate": 0.1}}],
              "polish": [{"polish": "on_policy", "polish_share": 0.5}]}  # fmt: skip
    tvd, jsd, rate, polish = search["loss"] + search["rate"] + search["polish"]
    profile = replace(profile, plan=replace(profile.plan, search=search))
    base = replace(make_base(profile, "tools"), split="validation")
    note_cell(profile, record, base, 50)
    for changes, calls in ((tvd, 45), (jsd, 40), (polish, 55)):
        note_cell(profile, record, apply_changes(base, changes), calls)
    assert find_search_outcome(profile, record) == SearchOutcome()  # the learning rate has not been tried
    note_cell(profile, record, apply_changes(base, rate), 48)
    combined = {**jsd, **rate}
    assert find_search_outcome(profile, record) == SearchOutcome([jsd, rate], combined)
    before = shutil.copy(record.path, tmp_path / "before.jsonl")
    (question,) = (q for q in find_questions(profile, record) if q.name == "search")
    assert question.comparisons[-1].cell == apply_changes(base, combined)
    record.append(DIVERGED, compute_key(profile, apply_changes(base, combined)))
    assert find_search_outcome(profile, record).winner == jsd
    record = Record(shutil.copy(before, tmp_path / "again.jsonl"))
    note_cell(profile, record, apply_changes(base, combined), 41)
    assert find_search_outcome(profile, record).winner == jsd  # together they are worse than the loss alone
    note_cell(profile, record, apply_changes(base, combined), 39)
    assert find_search_outcome(profile, record).winner == combined
    (question,) = (q for q in find_questions(profile, record) if q.name == "recipe")
    tested = [comparison.baseline for comparison in question.comparisons]
    base = make_base(profile, "tools")
    assert tested == [base, apply_changes(base, {"options": {"learning_rate": 0.1}})]
    assert all(comparison.cell == apply_changes(base, combined) for comparison in question.comparisons)


def test_other_domains_try_the_best_of_each_axis_only(profile_path, tmp_path):
    profile, record = read_profile(str(profile_path)), Record(tmp_path / "record.jsonl")
    tvd, jsd, rate = {"divergence": "tvd"}, {"divergence": "jsd"}, {"options": {"learning_rate": 0.1}}
    profile = replace(
        profile,
        domains={**profile.domains, "law": profile.domains["tools"]},
        plan=replace(profile.plan, search={"loss": [tvd, jsd], "rate": [rate]}),
    )
    tools, law = (replace(make_base(profile, domain), split="validation") for domain in profile.domains)

    def list_tried(domain):
        (question,) = (q for q in find_questions(profile, record) if q.name == "search")
        return [comparison.cell for comparison in question.comparisons if comparison.cell.domain == domain]

    assert (len(list_tried("tools")), list_tried("law")) == (3, [])
    for cell, calls in ((tools, 50), (law, 50)):
        note_cell(profile, record, cell, calls)
    for changes, calls in ((tvd, 45), (jsd, 40), (rate, 49)):
        note_cell(profile, record, apply_changes(tools, changes), calls)
    assert list_tried("law") == [apply_changes(law, jsd), apply_changes(law, rate)]
    assert find_search_outcome(profile, record) == SearchOutcome([jsd, rate])
    note_cell(profile, record, apply_changes(law, jsd), 48)
    note_cell(profile, record, apply_changes(law, rate), 60)  # what it gains in the one domain, it loses in the other
    assert find_search_outcome(profile, record) == SearchOutcome([jsd, rate], {}, jsd)


def test_a_claim_waits_for_all_seeds_and_needs_each_of_them(profile_path, tmp_path):
    profile, record = read_profile(str(profile_path)), Record(tmp_path / "record.jsonl")
    profile = replace(profile, plan=replace(profile.plan, seeds=[0, 1, 2]))
    base = make_base(profile, "tools")
    black = replace(base, method="black_box")

    def judge_black(*calls: int) -> str:
        for seed, own in enumerate(calls):
            note_cell(profile, record, replace(base, seed=seed), 50)
            note_cell(profile, record, replace(black, seed=seed), own)
        judgements = judge_claims(profile, record, list_questions(profile))
        label = "tools: white box over black box, equal steps, greedy"
        return next(judgement.verdict for judgement in judgements if judgement.where == label)

    assert judge_black() == MISSING
    assert judge_black(60, 60) == PARTIAL
    assert judge_black(60, 60, 60) == HELD
    assert judge_black(60, 60, 49) == UNKNOWN  # the sum over seeds still says that it holds
    assert judge_black(40, 40, 49) == FAILED


def test_record_cuts_off_a_torn_line(tmp_path):
    record = Record(tmp_path / "record.jsonl")
    record.append("cell", "a", steps=1)
    with record.path.open("ab") as file:
        file.write(b'{"kind": "cell", "key": "b", "st')
    again = Record(record.path)
    assert again.find("cell", "b") is None
    again.append("cell", "c", steps=2)
    assert [line["key"] for line in Record(record.path).list("cell")] == ["a", "c"]


def test_two_writers_of_a_record_see_each_other(tmp_path):
    ours, theirs = Record(tmp_path / "record.jsonl"), Record(tmp_path / "record.jsonl")
    ours.append("cell", "a", steps=1)
    theirs.append("cell", "b", steps=2)
    ours.append("cell", "c", steps=3)
    assert [line["key"] for line in ours.list("cell")] == ["a", "b", "c"]
    assert [line["key"] for line in Record(ours.path).list("cell")] == ["a", "b", "c"]


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_profiles_of_ours_ask_every_question(name):
    profile = read_profile(name)
    questions = {question.name for question in list_questions(profile)}
    assert {
        "offline_online",
        "offline_online_time",
        "white_black",
        "white_black_time",
        "data_size",
        "scenarios",
        "divergences",
        "selections",
        "cached",
    } <= questions
    assert {"adapters", "mixes", "answers", "online", "synthetic_size", "search"} <= questions
    cells = list(list_cells(list_questions(profile)))
    headline = [cell for cell in cells if cell.split == "test"][: len(cells) // 6]
    assert headline[0].budget == "steps" and {cell.domain for cell in headline} == set(profile.domains)
    assert len({compute_key(profile, cell) for cell in cells}) == len(cells)


def test_profile_names_an_unknown_option(profile_path):
    content = yaml.safe_load(profile_path.read_text())
    content["training"]["step"] = 3
    with pytest.raises(ValueError, match=r"smoke.*training.*unknown options \['step'\]"):
        make(type(read_profile(str(profile_path))), content, "smoke")


def test_verdicts():
    assert judge(Interval(0.1, 0.05, 0.2), 0.0) == HELD
    assert judge(Interval(-0.1, -0.2, -0.05), 0.0) == FAILED
    assert judge(Interval(0.1, -0.05, 0.2), 0.0) == UNKNOWN
    assert judge(Interval(0.1, np.nan, np.nan), 0.0) == UNKNOWN
    assert judge(Interval(0.1, 0.05, 0.2), 0.0, [0.3, 0.1]) == HELD
    assert judge(Interval(0.1, 0.05, 0.2), 0.0, [0.3, -0.1]) == UNKNOWN
    assert judge(Interval(-0.1, -0.2, -0.05), 0.0, [-0.3, 0.01]) == UNKNOWN


def test_cells_are_equal_by_all_their_options():
    assert Cell("a", 1, options={"x": 1}) != Cell("a", 1, options={"x": 2})


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
    everywhere = trainer.compute_loss(trainer.model, dict(batch))
    with project_loss_positions_only():
        there = trainer.compute_loss(trainer.model, dict(batch))
    assert projected == [2 * 22, 2 * 3]
    assert there.item() == pytest.approx(everywhere.item(), rel=1e-5)
