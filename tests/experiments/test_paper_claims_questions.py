"""What `experiments/paper_claims` asks, searches for, keeps and concludes, on records that are made up."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import yaml

from experiments.paper_claims.cells import DIVERGED, Cell, apply_changes, compute_key, make_base
from experiments.paper_claims.claims import FAILED, HELD, MISSING, PARTIAL, UNKNOWN, judge, judge_claims
from experiments.paper_claims.compare import BLOCK_EFFICIENCY, compare, find_lines, number_builds
from experiments.paper_claims.models import name_models
from experiments.paper_claims.plan import find_cells_left, find_questions
from experiments.paper_claims.profile import make, read_profile
from experiments.paper_claims.questions import SearchOutcome, list_cells, list_questions
from experiments.paper_claims.recipe_search import find_search_outcome
from experiments.paper_claims.record import Record
from spec_kd.evaluation import Interval


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
    tuned = replace(profile, training=replace(training, learning_rates={"tools": 1.0}))
    changes = ({}, {"method": "on_policy"}, {"polish": "on_policy", "polish_share": 0.5})
    for change in changes:  # what was tried with an option is the same as what has it by itself, in all its phases
        assert compute_key(tuned, replace(cell, **change)) == compute_key(profile, replace(faster, **change))


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


def note_cell(profile, record, cell, target_calls, build=""):
    figures = {
        "texts": f"of {build}", "tokens": [100] * 4, "target_calls": [target_calls] * 4, "alpha_sum": [50.0] * 4
    }  # fmt: skip
    figures = {"greedy": figures, "t1": figures}
    record.append("cell", compute_key(profile, cell), build=build, cell=vars(cell), figures=figures)


def test_the_search_puts_the_best_of_each_axis_together_and_tests_the_winner(profile_path, tmp_path):
    profile, record = read_profile(str(profile_path)), Record(tmp_path / "record.jsonl")
    search = {"loss": [{"divergence": "tvd"}, {"divergence": "jsd"}], "rate": [{"options": {"learning_rate": 0.1}}],
              "polish": [{"polish": "on_policy", "polish_share": 0.5}], "draft": [{"draft": "other"}]}  # fmt: skip
    tvd, jsd, rate, polish, other = (changes for axis in search.values() for changes in axis)
    profile = replace(profile, plan=replace(profile.plan, search=search))
    base = replace(make_base(profile, "tools"), split="validation")
    note_cell(profile, record, base, 50)
    for changes, calls in ((tvd, 45), (jsd, 40), (polish, 55), (other, 49.9)):  # hardly better is not worth trying
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
    base = make_base(profile, "tools")
    tuned = apply_changes(base, {"options": {"learning_rate": 0.1}})
    for name, baseline in (("recipe", base), ("recipe_tuned", tuned)):
        (question,) = (q for q in find_questions(profile, record) if q.name == name)
        (comparison,) = question.comparisons
        assert (comparison.cell, comparison.baseline) == (apply_changes(base, combined), baseline)


def test_what_a_cached_teacher_does_not_serve_is_not_put_together(profile_path, tmp_path):
    profile, record = read_profile(str(profile_path)), Record(tmp_path / "record.jsonl")
    cached = {"signal": "sampled_counts"}
    hot, jsd, rate = {"options": {"temperature": 2.0}}, {"divergence": "jsd"}, {"options": {"learning_rate": 0.1}}
    search = {"signal": [cached], "temperature": [hot], "loss": [jsd], "rate": [rate]}
    profile = replace(profile, plan=replace(profile.plan, search=search))
    base = replace(make_base(profile, "tools"), split="validation")
    for changes, calls in (({}, 50), (cached, 41), (hot, 42), (jsd, 43), (rate, 44)):
        note_cell(profile, record, apply_changes(base, changes) if changes else base, calls)
    assert find_search_outcome(profile, record).combined == {**cached, **rate}
    note_cell(profile, record, apply_changes(base, cached), 45)  # now it comes last, and only what goes with it is in
    assert find_search_outcome(profile, record).combined == {
        **jsd,
        "options": {"temperature": 2.0, "learning_rate": 0.1},
    }


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


def test_cells_are_compared_on_the_same_models_and_what_a_build_answered_is_not_asked_of_the_next(
    profile_path, tmp_path
):
    profile, record = read_profile(str(profile_path)), Record(tmp_path / "record.jsonl")
    profile = replace(profile, plan=replace(profile.plan, seeds=[0, 1]))
    (question,) = (q for q in list_questions(profile) if q.name == "white_black")
    (comparison,) = question.comparisons
    base, black = comparison.cell, comparison.baseline
    for seed in (0, 1):
        note_cell(profile, record, replace(base, seed=seed), 50, "first")
    note_cell(profile, record, black, 60, "first")

    def find_left(build: str) -> set[Cell]:
        return set(find_cells_left(profile, record, [question], {"tools": build}))

    def compare_seeds() -> list[float]:
        found = compare(profile, record, comparison, question.seeds, "greedy", BLOCK_EFFICIENCY)
        return [round(value, 3) for value in found.by_seed]

    assert find_left("first") == {replace(black, seed=1)}
    assert find_left("second") == {replace(base, seed=1), replace(black, seed=1)}
    assert find_cells_left(profile, record, [question], {}) == {}
    note_cell(profile, record, replace(black, seed=1), 40, "second")
    assert compare_seeds() == [0.2]  # the base cell of seed 1 has another target
    note_cell(profile, record, replace(base, seed=1), 80, "second")
    assert find_left("second") == find_left("third") == set()
    assert compare_seeds() == [0.2, -0.5]
    note_cell(profile, record, base, 10, "second")
    note_cell(profile, record, black, 10, "second")
    assert compare_seeds() == [0.2, -0.5]  # the first build that has both counts
    assert number_builds(record, "tools") == {"first": 0, "second": 1}
    assert [find_lines(profile, record, base, [0]).by_seed[0]["build"]] == ["first"]


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


def test_profile_names_learning_rates_of_no_domain(profile_path):
    profile = read_profile(str(profile_path))
    with pytest.raises(ValueError, match=r"`learning_rates` are of the domains \['law'\].*\['tools'\]"):
        replace(profile, plan=replace(profile.plan, learning_rates={"law": [0.1]}))
    with pytest.raises(ValueError, match=r"`learning_rates` are of the domains \['law'\]"):
        replace(profile, training=replace(profile.training, learning_rates={"law": 0.1}))


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
