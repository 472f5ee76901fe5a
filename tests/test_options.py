"""Options tell their defaults; each check takes what is meant and refuses what only looks like it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from spec_kd import options
from spec_kd.options import document_options, document_own_options, option, resolve_options


@document_options
@dataclass(frozen=True)
class Options:
    """How to cut."""

    size: int = option("Number of pieces.")
    names: list[str] | None = option("Names of the pieces.", default=None)
    sharpness: float = option("Sharpness of the knife.", default=0.5)


def test_the_docstring_tells_each_option_with_its_default():
    assert Options.__doc__.splitlines() == [
        "How to cut.",
        "",
        "Args:",
        "    size (`int`): Number of pieces.",
        "    names (`list[str]`, *optional*): Names of the pieces.",
        "    sharpness (`float`, *optional*, defaults to `0.5`): Sharpness of the knife.",
    ]


def test_options_of_base_classes_are_left_out_where_these_document_them():
    @document_own_options
    @dataclass(frozen=True)
    class Knife(Options):
        """A knife."""

        length: int = option("Length in cm.", default=9)

    assert Knife.__doc__.splitlines() == [
        "A knife.",
        "",
        "Args:",
        "    length (`int`, *optional*, defaults to `9`): Length in cm.",
    ]


def test_a_call_takes_the_object_the_keywords_or_both():
    assert resolve_options(Options, None, {"size": 3}) == Options(3)
    assert resolve_options(Options, Options(3), {}) == Options(3)
    assert resolve_options(Options, Options(3), {"sharpness": 0.1}) == Options(3, sharpness=0.1)


def test_an_unknown_keyword_and_a_foreign_object_are_refused():
    with pytest.raises(TypeError, match=r"Options has no option `sharpnes`. Did you mean sharpness\?"):
        resolve_options(Options, None, {"size": 1, "sharpnes": 1})
    with pytest.raises(TypeError, match="`size` is missing: Number of pieces"):
        resolve_options(Options, None, {"sharpness": 1.0})
    with pytest.raises(TypeError, match="`options` must be Options, got dict"):
        resolve_options(Options, {"size": 1}, {})


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    "check",
    [
        lambda: options.check_int("n", 1),
        lambda: options.check_int("n", np.int64(3)),
        lambda: options.check_int("n", None, is_optional=True),
        lambda: options.check_int("n", -5, None),
        lambda: options.check_number("x", 0.5, 0, 1),
        lambda: options.check_number("x", np.float32(0.5), above=0),
        lambda: options.check_number("x", 1, 1, 1),
        lambda: options.check_number("x", None, is_optional=True),
        lambda: options.check_numbers("xs", (0.0, 1.0), minimum=0),
        lambda: options.check_ints("ns", [1, 1]),
        lambda: options.check_flag("is_on", False),
        lambda: options.refuse((False, "one"), (None, "other")),
        lambda: options.check_choice("kind", "a", ("a", "b")),
        lambda: options.check_text("name", "a"),
        lambda: options.check_dataset("rows", Dataset.from_dict({"a": [1]})),
    ],
)
def test_what_is_meant_passes(check):
    check()


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: options.check_int("n", 0), "`n` is 0, but must be at least 1."),
        (lambda: options.check_int("n", 9, 1, 8), "`n` is 9, but must be at least 1 and at most 8."),
        *(
            (lambda value=value: options.check_int("n", value), f"`n` is {value!r}, but must be a whole number.")
            for value in ("5", 2.5, 2.0, True, None, NAN, [1])
        ),
        *(
            (lambda value=value: options.check_number("x", value, 0), f"`x` is {value!r}, but must be a finite number.")
            for value in (NAN, INFINITY, -INFINITY, np.float64("nan"), "0.5", True, None, [0.5])
        ),
        (lambda: options.check_number("x", -0.1, 0, below=1), "`x` is -0.1, but must be at least 0 and below 1."),
        (lambda: options.check_number("x", 1, 0, below=1), "`x` is 1, but must be at least 0 and below 1."),
        (lambda: options.check_number("x", 0, above=0, reason="0 is off."), "but must be above 0. 0 is off."),
        (lambda: options.check_int("n", "a", is_optional=True), "must be a whole number or None."),
        (lambda: options.check_numbers("xs", []), "`xs` is [], but must be a list of one or more numbers."),
        (lambda: options.check_numbers("xs", "12"), "`xs` is '12', but must be a list"),
        (lambda: options.check_numbers("xs", 0.5), "`xs` is 0.5, but must be a list"),
        (lambda: options.check_numbers("xs", [1.0, 1]), "`xs` is [1.0, 1], but must hold different numbers."),
        (lambda: options.check_numbers("xs", [0.5, NAN]), "`xs` is nan, but must be a finite number."),
        (lambda: options.refuse((0, "one"), ("x", "other"), (True, "last")), "other"),
        (lambda: options.check_flag("is_on", "false"), "`is_on` is 'false', but must be True or False."),
        (lambda: options.check_choice("kind", "c", ("a", "b")), "`kind` is 'c', but must be one of a, b."),
        (lambda: options.check_choice("kind", None, ("a",)), "`kind` is None"),
        (lambda: options.check_text("name", " "), "`name` is ' ', but must be text that is not empty."),
        (lambda: options.check_dataset("rows", [{"a": 1}]), "`rows` is a list, but must be a `datasets.Dataset`."),
        (lambda: options.check_dataset("rows", None), "`rows` is None, but must be a `datasets.Dataset`."),
        (lambda: options.check_dataset("rows", Dataset.from_dict({"a": []})), "`rows` has no rows."),
        (lambda: options.read_path("output_dir", ""), "`output_dir` is '', which names no file or folder."),
        (lambda: options.read_path("output_dir", "  "), "which names no file or folder."),
        (lambda: options.read_path("output_dir", "a\0b"), "which names no file or folder."),
        (lambda: options.read_path("output_dir", None), "`output_dir` is None, but must be a path."),
        (lambda: options.read_path("output_dir", 5), "`output_dir` is 5, but must be a path."),
    ],
)
def test_what_only_looks_like_it_is_refused(check, message):
    with pytest.raises(ValueError) as caught:
        check()
    assert message in str(caught.value)


def test_a_path_is_read_as_a_shell_reads_it(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert options.read_path("p", "~/runs") == options.read_path("p", Path("~/runs")) == str(tmp_path / "runs")
    assert options.read_path("p", "runs/~") == "runs/~"
    assert options.read_path("p", None, is_optional=True) is None
