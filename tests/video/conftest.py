"""Programs here are small and run once: nearly all of their time would be the compiler's."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def every_program_compiles_quickly(quick_compilation):
    """Most of XLA's optimizations off."""
