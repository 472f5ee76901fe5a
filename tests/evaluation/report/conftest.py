import pytest
from example_report import build_report, build_small_report


@pytest.fixture(scope="session")
def report():
    return build_report()


@pytest.fixture(scope="session")
def small_report():
    return build_small_report()
