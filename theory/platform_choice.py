"""Which backend jax uses, decided before it is imported.

The TPU library comes with the extra `tpu`, and jax would search for a TPU at import, loudly. Where
no accelerator's device file exists the answer is known: `JAX_PLATFORMS` is set to `cpu`, unless it
is set. (`jaxmodels.platform_choice` does the same; `theory` imports nothing of the other packages.)
"""

import glob
import importlib.util
import os

DEVICE_FILES = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*", "/dev/kfd")

if importlib.util.find_spec("libtpu") and not any(glob.glob(path) for path in DEVICE_FILES):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
