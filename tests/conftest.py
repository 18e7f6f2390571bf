"""Test session set-up: eight host devices, the CPU backend, shape checks on in tests only."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Eight devices for the mesh tests; single-device tests simply use the first.
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    ).strip()


def pytest_addoption(parser):
    parser.addoption(
        "--golden",
        metavar="DIR",
        help="run the golden cases found below DIR, not the committed ones",
    )
