import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

import spec_kd

ROOT = Path(__file__).parents[1]


def run_python(code):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", spec_kd.__all__)
def test_public_names_are_there(name):
    assert getattr(spec_kd, name).__name__ == name
    assert name in dir(spec_kd)


def test_every_name_is_listed_once():
    listed = [name for names in spec_kd._ROOMS.values() for name in names]
    assert sorted(listed) == sorted(spec_kd.__all__) and len(set(listed)) == len(listed)


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        spec_kd.Nonsense  # noqa: B018
    with pytest.raises(ImportError):
        exec("from spec_kd import Nonsense")


def test_import_is_lazy_and_fast():
    heavy, seconds = run_python(
        "import sys, time; start = time.perf_counter(); import spec_kd; seconds = time.perf_counter() - start; "
        "print([m for m in ('torch', 'transformers', 'trl', 'datasets', 'peft') if m in sys.modules], seconds, sep=';')"
    ).split(";")
    assert heavy == "[]"
    assert float(seconds) < 0.3


def test_version_is_the_installed_one():
    try:
        assert version("spec_kd") == spec_kd.__version__
    except PackageNotFoundError:
        pytest.skip("spec_kd is not installed, only importable")


def test_constraints_pin_every_dependency():
    """`pip install -c constraints.txt` must leave no direct dependency to the day's newest release."""
    tomllib = pytest.importorskip("tomllib")
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {r.name.lower().replace("_", "-"): r for r in map(Requirement, filter(lambda x: x and x[0] != "#", lines))}
    extras = project["optional-dependencies"]
    for requirement in map(
        Requirement, [*project["dependencies"], *extras["test"], *extras["dev"], *extras["examples"]]
    ):
        pin = pins[requirement.name.lower().replace("_", "-")]
        pinned = next(iter(pin.specifier))
        assert pinned.operator == "==" and pinned.version in requirement.specifier, requirement
