"""Plans of a draft: the acceptance that a shape needs, what is measured once, and what is recommended, if anything."""

import json
import math
import os
import sys

import fake_llama_server as fake
import numpy as np
import pytest
from fake_llama_cpp import read_calls, write_tools
from hub.test_gguf import build_byte_tokenizer

from spec_kd import (
    DraftPlanOptions,
    DraftShapeOptions,
    ServerTimingOptions,
    ServingCosts,
    generate_responses,
    init_draft,
    plan_draft,
)
from spec_kd.drafts import plan as plan_module
from spec_kd.drafts.plan_costs import PassMeter
from spec_kd.drafts.plan_options import list_default_shapes
from spec_kd.evaluation.cost import MeasurementError
from tests.tiny import build_llama, build_tokenizer

NAMES = ["16x1", "16x2", "32x2-cut"]
CHEAP = ServingCosts(cost_ratio=0.02, round_cost={1: 1.2, 2: 1.3, 4: 1.6}, source="a server")
NEARLY = ServingCosts(cost_ratio=0.03, round_cost={1: 1.22, 2: 1.32, 4: 1.65}, source="a server")
DEAR = ServingCosts(cost_ratio=0.3, round_cost={1: 1.7, 2: 2.1, 4: 3.0}, source="a server")
SLOW = ServingCosts(cost_ratio=1.1, round_cost={1: 2.2, 2: 3.3}, source="a server")


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def target():
    return build_llama(layers=3)


@pytest.fixture
def make(target, tokenizer, tmp_path):
    """A plan in one folder, of costs that are given unless they are `None`."""

    def make(costs=(CHEAP, NEARLY, DEAR), model=target, **options):
        options = {"shapes": NAMES, "output_dir": tmp_path / "plan", "show_progress": False, **options}
        return plan_draft(model, costs=costs, processing_class=tokenizer, **options)

    return make


@pytest.fixture(scope="module")
def untied():
    """A target whose next token is not the last one, as a draft would guess before training."""
    return build_llama(layers=3, tie=False)


@pytest.fixture(scope="module")
def responses(untied, tokenizer):
    prompts = [f"{i} and {i + 1}" for i in range(12)]
    options = {"temperature": 0.0, "max_new_tokens": 8, "processing_class": tokenizer, "show_progress": False}
    return generate_responses(untied, prompts, **options)


def read_lines(folder):
    return [json.loads(line) for line in (folder / "shapes.jsonl").read_text().splitlines()]


def test_needed_acceptances_are_where_speedups_reach_them(make):
    """By brute force over acceptances and drafted tokens, with the closed form of eq. 1 of arXiv 2211.17192."""
    plan = make(wished_speedup=1.4, alphas=[0.5, 0.9])
    grid = np.linspace(0, 1, 10_001)[:-1, None]
    gammas = np.arange(1, 5)
    tokens = (1 - grid ** (gammas + 1)) / (1 - grid)  # (alpha, gamma)
    for one, costs in zip(plan.shapes, (CHEAP, NEARLY, DEAR), strict=True):
        rounds = np.interp(gammas, [0, *costs.round_cost], [1, *costs.round_cost.values()])
        speedups = (tokens / rounds).max(axis=1)
        for wish, found in ((1.0, one.break_even_alpha), (1.4, one.wished_alpha)):
            assert found == pytest.approx(grid[np.argmax(speedups > wish), 0], abs=2e-4)
        assert one.speedups == pytest.approx({"0.5": speedups[5000], "0.9": speedups[9000]})
        at_wish = int(min(one.wished_alpha, 0.8) * 10_000)
        assert one.num_assistant_tokens == gammas[(tokens / rounds)[at_wish].argmax()]
        assert one.costs == costs
        assert one.verify_cost == pytest.approx({g: c - g * costs.cost_ratio for g, c in costs.round_cost.items()})


def test_shapes_are_those_of_init_draft(make, target, tokenizer, responses):
    shapes = [
        DraftShapeOptions(num_hidden_layers=2, hidden_size=16, fresh_layers=True, num_attention_heads=2),
        DraftShapeOptions(num_hidden_layers=2),
        DraftShapeOptions(layers=[0], hidden_size=16, intermediate_size=32, num_attention_heads=2),
    ]
    plan = make([CHEAP] * 3, shapes=shapes)
    assert {one.name for one in plan.shapes} == {"16x2-h2", "32x2-cut", "16x1-cut-ff32-h2"}
    for one in plan.shapes:
        options = {"responses": responses, "processing_class": tokenizer, "costs": one.costs, "show_progress": False}
        found = init_draft(target, one.options, **options)
        sizes = ("num_parameters", "num_head_parameters", "num_bytes")
        assert [getattr(one, size) for size in sizes] == [getattr(found, size) for size in sizes]
        assert found.cost_ratio == CHEAP.cost_ratio


def test_of_shapes_that_cost_alike_the_largest_is_recommended(make, tmp_path):
    plan = make()
    assert [one.name for one in plan.shapes] == NAMES
    # 0.02 and more than 0.05 above the lowest acceptance
    assert plan.shapes[1].wished_alpha - plan.shapes[0].wished_alpha < 0.05 < plan.shapes[2].wished_alpha - 0.6
    assert plan.recommended is plan.shapes[1]
    assert "16x2 is recommended. It pays from an acceptance of 0.22 on, and reaches 1.5" in plan.headline
    # 4 is out of reach for all, so the lowest acceptance to break even counts
    plan = make(wished_speedup=4.0)
    assert plan.recommended.name == "16x2" and "no shape reaches 4 times plain decoding at the 0.80" in plan.headline
    assert math.isnan(plan.shapes[2].wished_alpha)


def test_no_shape_pays(make, responses, monkeypatch, tmp_path):
    monkeypatch.setattr(plan_module, "run_briefly", None)  # nothing is trained where nothing can pay
    plan = make([SLOW] * 3, responses=responses, run_minutes=1.0)
    assert plan.recommended is None and plan.payable == []
    assert plan.headline.startswith("No shape can pay: each is slower than plain decoding even if every")
    assert all(math.isnan(one.break_even_alpha) for one in plan.shapes)
    assert json.loads((tmp_path / "plan/plan.json").read_text())["recommended"] is None
    plan = make([SLOW, DEAR, SLOW], output_dir=tmp_path / "other", reachable_alpha=0.6)
    assert plan.recommended is None
    assert "the cheapest, 16x2, is faster than plain decoding from an acceptance of 0.66 on" in plan.headline
    assert plan.headline.endswith("0.60 counts as reachable.")
    paying = make([SLOW, DEAR, SLOW], output_dir=tmp_path / "other", reachable_alpha=0.7)
    assert paying.recommended.name == "16x2"


def test_table_and_picture(make, tmp_path):
    plan = make()
    text = (tmp_path / "plan/plan.md").read_text()
    assert text == plan.to_markdown() and text.startswith("# Shape of a draft for the target\n")
    assert (
        "(a server)" in text and "| 16x2 | 0.0 | 0.0 | 0.0 | 0.030 | 1.19 | 1.26 | 1.53 | 1.22 | 1.32 | 1.65 |" in text
    )
    row = next(line for line in text.splitlines() if line.startswith("| 16x2 |") and "yes" in line)
    assert row.startswith("| 16x2 | 0.22 | 0.61 | 1.18 | 1.48 | 2.04 | – | – | 2 | ")
    values = json.loads((tmp_path / "plan/plan.json").read_text())
    assert values["recommended"] == "16x2" and values["headline"] == plan.headline
    assert values["shapes"][1]["costs"]["round_cost"] == {"1": 1.22, "2": 1.32, "4": 1.65}
    assert (tmp_path / "plan/plan.png").stat().st_size > 10_000
    [axis] = plan.plot().axes
    lines = {line.get_label(): line.get_ydata() for line in axis.get_lines()}
    assert list(lines["acceptance 0.6"]) == [one.speedups["0.6"] for one in plan.shapes]
    assert [label.get_text().split("\n") for label in axis.get_xticklabels()][1] == ["16x2", "(recommended)"]


# Measuring ------------------------------------------------------------------------------------------------------------


def test_a_killed_plan_continues(make, monkeypatch, tmp_path):
    measured = []

    def measure(self, name, draft):
        if len(measured) == 2:
            raise MeasurementError("killed")
        measured.append(name)
        return CHEAP

    monkeypatch.setattr(PassMeter, "measure", measure)
    monkeypatch.setattr(PassMeter, "estimate_seconds", lambda self, first: 90.0)
    with pytest.raises(MeasurementError):
        make(None)
    assert [line.get("shape") for line in read_lines(tmp_path / "plan")] == [None, "16x1", "16x2"]
    monkeypatch.setattr(PassMeter, "measure", lambda self, name, draft: measured.append(name) or DEAR)
    plan = make(None)
    assert measured == NAMES and [one.costs for one in plan.shapes] == [CHEAP, CHEAP, DEAR]
    # what is computed may change, and further shapes are measured alone
    plan = make(None, wished_speedup=2.0, reachable_alpha=0.9, alphas=[0.7], shapes=[*NAMES, "16x3"])
    assert measured == [*NAMES, "16x3"] and plan.wished_speedup == 2.0 and len(plan.shapes) == 4


def test_a_folder_of_another_plan_is_refused(make, tmp_path):
    make()
    before = (tmp_path / "plan/shapes.jsonl").read_text()
    for options, part in (
        ({"model": build_llama(layers=4)}, "target"),
        ({"costs": (DEAR, NEARLY, CHEAP)}, "costs"),
        ({"costs": None}, "costs"),
    ):
        with pytest.raises(ValueError, match=f"has a plan with other {part}. Choose another folder"):
            make(**options)
    assert (tmp_path / "plan/shapes.jsonl").read_text() == before
    (tmp_path / "plan/shapes.jsonl").write_text("{")
    with pytest.raises(ValueError, match=r"shapes\.jsonl` is damaged"):
        make()


def test_passes_in_transformers(make, capsys):
    timing = ServerTimingOptions(context_length=32, repeats=2)
    plan = make(None, gammas=[1, 3], timing=timing, shapes=["16x1"], show_progress=True)
    costs = plan.shapes[0].costs
    assert costs.cost_ratio > 0 and set(costs.verify_cost) == {1, 3} and costs.target_step_seconds > 0
    assert "bare passes of both models after 32 tokens" in costs.source
    said = capsys.readouterr().err
    assert "timing takes about 0.0 minutes (16x1)." in said and plan.headline in said


def test_short_runs(make, untied, responses, monkeypatch, capsys):
    options = {
        "model": untied,
        "responses": responses,
        "run_minutes": 0.05,
        "learning_rate": 1e-2,
        "num_held_out": 4,
        "per_device_train_batch_size": 4,
    }
    plan = make((CHEAP, DEAR, SLOW), **options, show_progress=True)
    assert "training takes 0.1 minutes (16x1, 16x2)." in capsys.readouterr().err
    trained, untrained = plan.shapes[:2], plan.shapes[2]
    assert untrained.run is None and untrained.predicted_speedup is None  # it cannot pay
    for one in trained:
        assert one.run.steps >= 3 and 2 <= one.run.seconds < 30  # up to the nearest step
        assert one.run.alpha.value > one.run.alpha_before
        speedups = {g: one.run.block_efficiency[str(g)].value / one.round_cost[g] for g in (1, 2, 4)}
        assert one.predicted_speedup.value >= max(speedups.values()) - 1e-9
        best = one.run.block_efficiency[str(one.num_assistant_tokens)]
        expected = [value / one.costs.find_round_cost(one.num_assistant_tokens) for value in best]
        assert list(one.predicted_speedup) == pytest.approx(expected)
    assert plan.recommended is max(trained, key=lambda one: one.predicted_speedup.value)
    assert "After 0.05 minutes of training its acceptance is" in plan.headline
    assert "Longer training raises it" in plan.to_markdown()
    [bars] = plan.plot().axes[0].containers
    assert list(bars[0].get_ydata()) == [one.predicted_speedup.value for one in trained]
    # nothing is trained again, and what was trained is shown without asking for it
    monkeypatch.setattr(plan_module, "run_briefly", None)
    for again in (make((CHEAP, DEAR, SLOW), **options), make((CHEAP, DEAR, SLOW), model=untied)):
        assert again.shapes[:2] == trained and again.to_markdown() == plan.to_markdown()
    with pytest.raises(ValueError, match="has a plan with other runs"):
        make((CHEAP, DEAR, SLOW), **{**options, "learning_rate": 1e-3})


# llama.cpp ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "llama-server"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "{fake.__file__}" "$@"\n')
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def folder(target, tokenizer, tmp_path):
    target.save_pretrained(tmp_path / "target")
    tokenizer.save_pretrained(tmp_path / "target")
    return tmp_path / "target"


def test_rounds_in_llama_server(folder, program, tmp_path, capsys):
    tools = write_tools(tmp_path / "llama.cpp")
    timing = ServerTimingOptions(server=program, num_rounds=4, repeats=2, keep_servers=False)
    options = {"output_dir": tmp_path / "plan", "llama_cpp_dir": str(tools), "gammas": [1, 3], "timing": timing}
    plan = plan_draft(str(folder), shapes=["16x1", "32x1-cut"], **options)
    assert "timing takes about" in capsys.readouterr().err
    true = {gamma: fake.ROUND[gamma] + gamma * fake.ACCEPTED / 2 for gamma in (1, 3)}
    for one in plan.shapes:
        assert one.costs.cost_ratio == pytest.approx(fake.DRAFT_STEP) and one.round_cost == pytest.approx(true)
        assert one.verify_cost == pytest.approx({gamma: cost - gamma * fake.DRAFT_STEP for gamma, cost in true.items()})
        assert not (tmp_path / "plan" / one.name / "untrained").exists()
        assert (tmp_path / "plan" / one.name / "timings.json").exists()
    assert plan.target == str(folder) and read_calls(tools) == ["f16"] * 3  # the target, and each draft
    again = plan_draft(str(folder), shapes=["16x1", "32x1-cut", "16x2"], target_gguf=None, **options)
    assert len(again.shapes) == 3 and read_calls(tools) == ["f16"] * 4


def test_a_target_that_is_gguf_already(folder, program, tmp_path):
    tools, gguf = write_tools(tmp_path / "llama.cpp"), tmp_path / "mine.gguf"
    timing = ServerTimingOptions(server=program, num_rounds=4, repeats=1, keep_servers=False)
    options = {"llama_cpp_dir": str(tools), "gammas": [1], "timing": timing, "target_gguf": str(gguf)}
    with pytest.raises(FileNotFoundError, match=r"`target_gguf` is `.*mine\.gguf`, which is no file"):
        plan_draft(str(folder), output_dir=tmp_path / "plan", shapes=["16x1"], **options)
    gguf.write_bytes(b"GGUF")
    plan = plan_draft(str(folder), output_dir=tmp_path / "plan", shapes=["16x1"], show_progress=False, **options)
    assert read_calls(tools) == ["f16"] and plan.shapes[0].round_cost[1] == pytest.approx(fake.ROUND[1] + 0.01)


REAL = os.environ.get("SPEC_KD_LLAMA_CPP")


@pytest.mark.skipif(REAL is None, reason="SPEC_KD_LLAMA_CPP names no folder of llama.cpp")
def test_the_real_llama_cpp(tmp_path):
    """Times of tiny models say nothing; that drafts of these shapes load, draft and are timed does."""
    model = build_llama(seed=0, hidden_size=128, layers=4, vocab_size=259)
    model.save_pretrained(tmp_path / "target")
    build_byte_tokenizer().save_pretrained(tmp_path / "target")
    plan = plan_draft(
        str(tmp_path / "target"),
        output_dir=tmp_path / "plan",
        shapes=["64x1", "128x2-cut"],
        gammas=[1, 3],
        llama_cpp_dir=REAL,
        timing=ServerTimingOptions(
            server=f"{REAL}/bin/llama-server", server_flags="--threads 1", num_rounds=32, repeats=1
        ),
        show_progress=False,
    )
    for one in plan.shapes:
        assert one.costs.cost_ratio > 0 and 1 < one.round_cost[1] < one.round_cost[3]
        assert "rounds of llama-server" in one.costs.source


# Options --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shapes": ["192"]}, "`shapes` has '192', which is no shape such as 192x4 or 576x4-cut"),
        ({"shapes": ["16x1", "16x1"], "costs": [CHEAP] * 2}, "Give one or more different shapes"),
        ({"shapes": [], "costs": []}, "Give one or more different shapes"),
        ({"shapes": ["16x1"]}, "`costs` has 3 costs for the shapes 16x1. Give one for each"),
        ({"shapes": ["64x1"], "costs": [CHEAP]}, "`hidden_size=64` is larger than the donor's 32"),
        ({"shapes": ["32x9-cut"], "costs": [CHEAP]}, "The donor has 3 layers"),
        ({"timing": ServerTimingOptions(batch_sizes=[1, 4])}, "a plan is for one number of requests at a time"),
        ({"run_minutes": 2.0}, "`run_minutes=2.0` trains on responses of the target. Pass `responses`"),
        ({"target_gguf": "target.gguf"}, "Give `llama_cpp_dir` too"),
        ({"costs": None, "llama_cpp_dir": "llama.cpp"}, "Pass the folder or Hub id as `target`"),
        ({"wished_speedup": 1.0}, "`wished_speedup` is 1.0, but must be above 1"),
        ({"reachable_alpha": 1.5}, "`reachable_alpha` is 1.5, but must be above 0 and at most 1|at most 1 and above 0"),
        ({"alphas": [0.5, 1.5]}, "an acceptance is at most 1"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(make, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
    assert not (tmp_path / "plan").exists()


def test_default_shapes():
    assert list_default_shapes(576) == ["128x2", "128x4", "192x2", "192x4", "256x2", "256x4"]
    assert list_default_shapes(4096)[::2] == ["1024x2", "1344x2", "2048x2"]
    assert list_default_shapes(32) == ["8x2", "8x4", "10x2", "10x4", "16x2", "16x4"]
    names = DraftPlanOptions().list_shapes(build_llama(hidden_size=128).config)
    assert list(names) == ["64x2", "64x4"]
    assert all(one.fresh_layers for one in names.values())
