"""Programs of these tests run a few steps each: nearly all of their time is the compiler's."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def _quick(quick_compilation):
    yield
