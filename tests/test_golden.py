"""Our numbers against tensors that the papers' own code computed, one test a case (SYSTEM/CASE).

`pytest tests/test_golden.py` runs the committed cases, `--golden DIR` every case found anywhere
below DIR instead.
"""

import contextlib
from pathlib import Path

import golden_case
import jax
import pytest


def pytest_generate_tests(metafunc):
    if "case" not in metafunc.fixturenames:
        return
    chosen = metafunc.config.getoption("--golden")
    root = golden_case.COMMITTED
    if chosen:
        root = Path(metafunc.config.invocation_params.dir, chosen)
        if not root.is_dir():
            raise pytest.UsageError(f"--golden {chosen}: no such folder")
    cases = golden_case.find_cases(root) if root.is_dir() else []
    if chosen and not cases:
        raise pytest.UsageError(f"--golden {chosen}: no meta.json anywhere below it")
    metafunc.parametrize("case", cases, ids=[c.id for c in cases])


def test_golden(case):
    adapter = golden_case.adapter_of(case.system)
    if adapter is None:
        pytest.skip(f"system not built yet: no tests/golden_adapters/{case.system}.py")
    assert (case.directory / "io.npz").exists(), f"{case.directory} has no io.npz"
    precision = jax.enable_x64(True) if case.float64 else contextlib.nullcontext()
    with precision, jax.default_matmul_precision("highest"):
        results = {k: _on_host(v) for k, v in adapter.run(case).items()}
    extra = adapter.tolerances(case) if hasattr(adapter, "tolerances") else None
    problems = golden_case.differences(case, results, extra)
    assert not problems, f"{case.id} ({case.model}):\n" + "\n".join(problems)


def _on_host(value):
    return jax.device_get(value) if isinstance(value, jax.Array) else value
