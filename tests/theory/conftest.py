"""Theory tests run in float64, switched per test so that other modules keep their defaults."""

import jax
import pytest


@pytest.fixture(autouse=True)
def float64(request):
    """x64 on for the test, unless it is marked `float32`."""
    if request.node.get_closest_marker("float32"):
        with jax.enable_x64(False):
            yield
    else:
        with jax.enable_x64(True):
            yield


def pytest_configure(config):
    config.addinivalue_line("markers", "float32: run this theory test without x64")
