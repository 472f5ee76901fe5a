"""Exceptions from the type check: each says why it is one. The check itself is `mypy`, which `.ci/run` calls."""

import re
import tokenize
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
IGNORE = re.compile(r"#\s*type:\s*ignore")
IGNORE_WITH_REASON = re.compile(r"# type: ignore\[[a-z-]+(, [a-z-]+)*\]  # [\w`].{8,}")


def find_ignores_without_reason(path: Path) -> list[str]:
    """Comments of a file that switch the type checker off for a line, and do not say for which error and why."""
    with path.open("rb") as file:
        comments = [token.string for token in tokenize.tokenize(file.readline) if token.type == tokenize.COMMENT]
    return [text for text in comments if IGNORE.match(text) and not IGNORE_WITH_REASON.fullmatch(text)]


@pytest.mark.parametrize("path", sorted(ROOT.glob("spec_kd/**/*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_what_the_type_checker_must_ignore_has_a_reason(path):
    assert find_ignores_without_reason(path) == []


@pytest.mark.parametrize(
    ("line", "has_reason"),
    [
        ("x: Any = 1  # type: ignore[explicit-any]  # the server decides", True),
        ("x: Any = 1  # type: ignore[explicit-any, misc]  # the server decides", True),
        ('x = "# type: ignore"', True),
        ("x: Any = 1  # type: ignore", False),
        ("x: Any = 1  # type: ignore[explicit-any]", False),
        ("x: Any = 1  # type: ignore[explicit-any]  #", False),
        ("x: Any = 1  # type: ignore  # the server decides", False),
    ],
)
def test_a_missing_reason_is_found(tmp_path, line, has_reason):
    (tmp_path / "module.py").write_text(line + "\n")
    assert (find_ignores_without_reason(tmp_path / "module.py") == []) is has_reason


def test_the_whole_package_is_checked():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]
    assert config["files"] == ["spec_kd"] and config["disallow_any_explicit"] and config["disallow_untyped_defs"]
    assert [name for part in config["overrides"] for name in part["module"] if name.startswith("spec_kd")] == []
