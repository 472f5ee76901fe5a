"""Each check takes what is meant and refuses what only looks like it, with the name and the value."""

from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from spec_kd import checks

NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    "check",
    [
        lambda: checks.check_int("n", 1),
        lambda: checks.check_int("n", np.int64(3)),
        lambda: checks.check_int("n", None, is_optional=True),
        lambda: checks.check_int("n", -5, None),
        lambda: checks.check_number("x", 0.5, 0, 1),
        lambda: checks.check_number("x", np.float32(0.5), above=0),
        lambda: checks.check_number("x", 1, 1, 1),
        lambda: checks.check_number("x", None, is_optional=True),
        lambda: checks.check_numbers("xs", (0.0, 1.0), minimum=0),
        lambda: checks.check_ints("ns", [1, 1]),
        lambda: checks.check_flag("is_on", False),
        lambda: checks.refuse((False, "one"), (None, "other")),
        lambda: checks.check_choice("kind", "a", ("a", "b")),
        lambda: checks.check_text("name", "a"),
        lambda: checks.check_dataset("rows", Dataset.from_dict({"a": [1]})),
    ],
)
def test_what_is_meant_passes(check):
    check()


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: checks.check_int("n", 0), "`n` is 0, but must be at least 1."),
        (lambda: checks.check_int("n", 9, 1, 8), "`n` is 9, but must be at least 1 and at most 8."),
        *(
            (lambda value=value: checks.check_int("n", value), f"`n` is {value!r}, but must be a whole number.")
            for value in ("5", 2.5, 2.0, True, None, NAN, [1])
        ),
        *(
            (lambda value=value: checks.check_number("x", value, 0), f"`x` is {value!r}, but must be a finite number.")
            for value in (NAN, INFINITY, -INFINITY, np.float64("nan"), "0.5", True, None, [0.5])
        ),
        (lambda: checks.check_number("x", -0.1, 0, below=1), "`x` is -0.1, but must be at least 0 and below 1."),
        (lambda: checks.check_number("x", 1, 0, below=1), "`x` is 1, but must be at least 0 and below 1."),
        (lambda: checks.check_number("x", 0, above=0, reason="0 is off."), "but must be above 0. 0 is off."),
        (lambda: checks.check_int("n", "a", is_optional=True), "must be a whole number or None."),
        (lambda: checks.check_numbers("xs", []), "`xs` is [], but must be a list of one or more numbers."),
        (lambda: checks.check_numbers("xs", "12"), "`xs` is '12', but must be a list"),
        (lambda: checks.check_numbers("xs", 0.5), "`xs` is 0.5, but must be a list"),
        (lambda: checks.check_numbers("xs", [1.0, 1]), "`xs` is [1.0, 1], but must hold different numbers."),
        (lambda: checks.check_numbers("xs", [0.5, NAN]), "`xs` is nan, but must be a finite number."),
        (lambda: checks.refuse((0, "one"), ("x", "other"), (True, "last")), "other"),
        (lambda: checks.check_flag("is_on", "false"), "`is_on` is 'false', but must be True or False."),
        (lambda: checks.check_choice("kind", "c", ("a", "b")), "`kind` is 'c', but must be one of a, b."),
        (lambda: checks.check_choice("kind", None, ("a",)), "`kind` is None"),
        (lambda: checks.check_text("name", " "), "`name` is ' ', but must be text that is not empty."),
        (lambda: checks.check_dataset("rows", [{"a": 1}]), "`rows` is a list, but must be a `datasets.Dataset`."),
        (lambda: checks.check_dataset("rows", None), "`rows` is None, but must be a `datasets.Dataset`."),
        (lambda: checks.check_dataset("rows", Dataset.from_dict({"a": []})), "`rows` has no rows."),
        (lambda: checks.read_path("output_dir", ""), "`output_dir` is '', which names no file or folder."),
        (lambda: checks.read_path("output_dir", "  "), "which names no file or folder."),
        (lambda: checks.read_path("output_dir", "a\0b"), "which names no file or folder."),
        (lambda: checks.read_path("output_dir", None), "`output_dir` is None, but must be a path."),
        (lambda: checks.read_path("output_dir", 5), "`output_dir` is 5, but must be a path."),
    ],
)
def test_what_only_looks_like_it_is_refused(check, message):
    with pytest.raises(ValueError) as caught:
        check()
    assert message in str(caught.value)


def test_a_path_is_read_as_a_shell_reads_it(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert checks.read_path("p", "~/runs") == checks.read_path("p", Path("~/runs")) == str(tmp_path / "runs")
    assert checks.read_path("p", "runs/~") == "runs/~"
    assert checks.read_path("p", None, is_optional=True) is None
