"""Programs here are small and run once: nearly all of their time would be the compiler's."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="package")
def quick_compilation():
    """Most of XLA's optimizations off."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
