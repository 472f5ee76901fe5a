import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import forked
import numpy as np
import pytest
from PIL import Image
from tracker_run import build_figures, build_trainer
from transformers.integrations import TrackioCallback, WandbCallback

from spec_kd.evaluation.trackers import log_picture, plot_acceptance, render_pixels

SCRIPT = Path(__file__).with_name("tracker_run.py")


def build_stand_in(*callbacks, is_main=True):
    """As much of a trainer as is read."""
    handler = SimpleNamespace(callbacks=list(callbacks))
    return SimpleNamespace(callback_handler=handler, is_world_process_zero=lambda: is_main)


def test_picture_of_acceptance():
    figure = plot_acceptance({0.0: build_figures(), 1.0: build_figures(1.0)})
    (axis,) = figure.axes
    assert axis.get_title().splitlines() == [
        "tokens per target pass:",
        "greedy 2.35 [2.30, 2.40]",
        "t1 2.35 [2.30, 2.40]",
    ]
    greedy, sampled = axis.get_lines()
    assert [greedy.get_label(), sampled.get_label()] == ["greedy", "t1"]
    assert greedy.get_xdata().tolist() == [1, 2] and greedy.get_ydata().tolist() == [0.75, 0.6]


def test_picture_of_one_prompt_has_no_intervals():
    figure = plot_acceptance({0.7: build_figures(0.7, prompts=1)})
    assert "t0.7 2.30 [–, –]" in figure.axes[0].get_title()
    assert render_pixels(figure).std() > 0


def test_pixels():
    figure = plot_acceptance({0.0: build_figures()})
    pixels = render_pixels(figure)
    assert pixels.shape == (400, 600, 3) and pixels.dtype == np.uint8
    assert (pixels[:3] == 255).all() and (pixels < 100).any()


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer, reached = build_trainer(str(tmp_path), ["tensorboard"])
    figure = plot_acceptance({0.0: build_figures()})
    assert log_picture(trainer, "early", figure, 0) == []  # no writer yet
    trainer.train()
    assert reached == [["tensorboard"]]
    folder = next(path.parent for path in tmp_path.rglob("events.out.tfevents*"))
    events = EventAccumulator(str(folder)).Reload()
    assert events.Tags()["images"] == ["eval/acceptance"]
    (event,) = events.Images("eval/acceptance")
    assert event.step == 1
    pixels = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
    assert np.array_equal(pixels, render_pixels(figure))


@pytest.mark.parametrize(("name", "callback_class"), [("wandb", WandbCallback), ("trackio", TrackioCallback)])
def test_what_wandb_and_trackio_are_told(name, callback_class, monkeypatch):
    told = []
    active = SimpleNamespace(run=object())
    module = SimpleNamespace(
        Image=lambda pixels: ("image", pixels.shape),
        log=told.append,
        run=active.run,
        context_vars=SimpleNamespace(current_run=SimpleNamespace(get=lambda: active.run)),
    )
    monkeypatch.setitem(sys.modules, name, module)
    callback = object.__new__(callback_class)  # whose constructor wants the real module
    figure = plot_acceptance({0.0: build_figures()})
    assert log_picture(build_stand_in(callback), "eval/acceptance", figure, 7) == [name]
    assert told == [{"eval/acceptance": ("image", (400, 600, 3)), "train/global_step": 7}]
    assert log_picture(build_stand_in(callback, is_main=False), "eval/acceptance", figure, 7) == []
    active.run = module.run = None
    assert log_picture(build_stand_in(callback), "eval/acceptance", figure, 7) == [] and len(told) == 1


def test_no_trackers():
    assert log_picture(build_stand_in(object()), "tag", plot_acceptance({0.0: build_figures()}), 0) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_the_real_trackers_offline(name, tmp_path):
    pytest.importorskip(name)
    environment = {
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(tmp_path),
        "WANDB_SILENT": "true",
    }
    result = forked.run(SCRIPT, tmp_path / "run", name, **environment)
    assert result.returncode == 0, result.stderr[-4000:]
    told = json.loads(result.stdout.strip().splitlines()[-1])
    assert (told["before"], told["reached"], told["after"]) == ([], [[name]], [])
    (picture,) = (path for path in tmp_path.rglob("*.png"))
    with Image.open(picture) as image:
        assert image.size == tuple(told["size"][1::-1])
    if name == "trackio":
        (log,) = told["stored"]
        assert log["train/global_step"] == 1 and log["eval/acceptance"]["_type"] == "trackio.image"
    else:
        assert "eval/acceptance" in str(picture)  # W&B files a picture under its tag
