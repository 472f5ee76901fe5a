"""What all commands share: help, JSON on stdout, exit statuses, defaults."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from spec_kd.cli.commands import build_parser
from spec_kd.cli.main import COMMANDS, main, to_json
from spec_kd.data.response_options import ResponseOptions
from spec_kd.evaluation.options import EvaluationOptions
from spec_kd.prompts.curated import CuratedOptions
from spec_kd.prompts.filters import TextFilter
from spec_kd.prompts.logs.options import LogOptions
from spec_kd.prompts.mixing import MixOptions
from spec_kd.prompts.synthesis.options import SynthesisOptions


def test_help_is_fast_and_names_every_command():
    code = (
        "import sys, time; start = time.perf_counter(); from spec_kd.cli.main import main; main(['--help']); "
        "heavy = [m for m in ('torch', 'transformers', 'datasets', 'trl', 'yaml') if m in sys.modules]; "
        "print(time.perf_counter() - start, heavy, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, heavy = done.stderr.split(maxsplit=1)
    assert float(seconds) < 0.5 and heavy.strip() == "[]"
    assert all(f"  {name} " in done.stdout for name in COMMANDS)


@pytest.mark.parametrize(
    "argv",
    [
        ["init"], ["prompts"], ["prompts", "logs"], ["prompts", "curated"], ["prompts", "mix"], ["synthesize"],
        ["respond"],
        ["train"], ["train", "white_box"], ["train", "black_box"], ["train", "online_gkd"], ["evaluate"], ["run"],
    ],
)  # fmt: skip
def test_every_command_has_help_on_stdout(capsys, argv):
    assert main([*argv, "--help"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"usage: spec-kd {' '.join(argv)}") and "--config" in captured.out
    assert captured.err == ""


def test_unknown_command(call):
    status, _, errors = call("evalaute")
    assert status == 2 and "no command 'evalaute'. Did you mean evaluate?" in errors


def test_two_processes_write_one_line_of_json(models, responses, tmp_path, flags):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--main_process_port", "0", "-m", "spec_kd.cli", "train", "white_box", "--draft", models / "draft"]
    command += ["--responses", responses, "--output_dir", tmp_path, *flags, "--ddp_backend", "gloo"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120, env={**os.environ})
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)  # all of it
    assert (result["command"], result["steps"], result["is_reused"]) == ("train", 4, False)
    assert (tmp_path / "checkpoint-4" / "rng_state_1.pth").exists()  # the second process took part
    assert (tmp_path / ".step.json").exists()


def test_a_traceback_on_request(monkeypatch, call):
    monkeypatch.setenv("SPEC_KD_TRACEBACK", "1")
    status, _, errors = call("respond", "--prompts", "x", "--output_dir", "y")
    assert status == 2 and "Traceback" in errors and "`target` is missing" in errors


def test_what_is_no_wrong_input_is_not_caught(monkeypatch):
    monkeypatch.setattr("spec_kd.cli.respond.run", lambda *call, **options: {}["a bug"])
    with pytest.raises(KeyError):
        main(["respond", "--prompts", "x", "--output_dir", "y"])


def test_an_interruption_is_said_and_has_its_status(monkeypatch, call):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("spec_kd.cli.respond.run", interrupt)
    status, _, errors = call("respond", "--prompts", "x", "--output_dir", "y")
    assert status == 130 and "continues from here" in errors


def test_sigterm_ends_a_command_as_an_interruption(monkeypatch, call):
    stopped = []

    def wait(*_, **__):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)
        finally:
            stopped.append("server")

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("spec_kd.cli.respond.run", wait)
    status, _, errors = call("respond", "--prompts", "x", "--output_dir", "y")
    assert status == 130 and "continues from here" in errors and stopped == ["server"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_json_has_no_nan():
    assert to_json({1: [float("nan"), 2.0, (float("inf"),)]}) == {"1": [None, 2.0, [None]]}


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("respond", ResponseOptions), ("evaluate", EvaluationOptions), ("prompts logs", LogOptions),
        ("prompts curated", CuratedOptions), ("prompts mix", MixOptions), ("synthesize", SynthesisOptions),
        ("synthesize", TextFilter),
    ],
)  # fmt: skip
def test_defaults_are_those_of_the_functions(command, options):
    """The command parses the very class that the function takes."""
    parser = build_parser(command)
    assert options in parser.dataclass_types
    actions = {action.dest: action for actions in parser.group_options().values() for action in actions}
    for field in dataclasses.fields(options):
        is_required = field.default is field.default_factory is dataclasses.MISSING
        assert actions[field.name].required == is_required
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        assert is_required or actions[field.name].default == default
