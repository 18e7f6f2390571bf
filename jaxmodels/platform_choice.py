"""Which backend a command uses, decided before jax is imported."""

from __future__ import annotations

import glob
import importlib.util
import os

DEVICE_FILES = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*", "/dev/kfd")


def choose_platform() -> None:
    """Set `JAX_PLATFORMS=cpu` where a TPU library is installed but no accelerator is there.

    The library comes with the extra `tpu` (dry runs use its compiler) and would otherwise search
    for a TPU, loudly, at the import of jax. Does nothing where `JAX_PLATFORMS` is set.
    """
    if importlib.util.find_spec("libtpu") and not any(glob.glob(p) for p in DEVICE_FILES):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
