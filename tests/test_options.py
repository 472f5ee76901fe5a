from dataclasses import dataclass

import pytest

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
