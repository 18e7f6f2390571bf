"""What a command settles before jax is imported: its backend and, on a CPU, its allocator."""

from __future__ import annotations

import ctypes
import glob
import importlib.util
import os

DEVICE_FILES = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*", "/dev/kfd")
# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def choose_platform() -> None:
    """Set `JAX_PLATFORMS=cpu` where a TPU library is installed but no accelerator is there.

    The library comes with the extra `tpu` (dry runs use its compiler) and would otherwise search
    for a TPU, loudly, at the import of jax. A `JAX_PLATFORMS` that is set stands. Where a CPU is
    all there is, freed memory is kept between steps (`keep_freed_memory`).
    """
    accelerators = any(glob.glob(pattern) for pattern in DEVICE_FILES)
    if importlib.util.find_spec("libtpu") and not accelerators:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if os.environ.get("JAX_PLATFORMS", "" if accelerators else "cpu") == "cpu":
        keep_freed_memory()


def keep_freed_memory() -> bool:
    """Let glibc's allocator hold on to memory that was freed; whether it was told to.

    XLA allocates a program's buffers anew in every call. By default glibc maps blocks of more than
    32 MiB and gives them back at once, so that every step meets each of its pages as a fault: a
    sixth of a step of ResNet-18 or T5-small, a quarter of CoditT5's small one. One arena, because
    only the main one can grow beyond 64 MiB; glibc settles their number when the first thread asks
    for memory, and libraries begin some when they are imported. Settings of the user's own
    (`MALLOC_*`, `GLIBC_TUNABLES`, another allocator) stand.
    """
    own = ("GLIBC_TUNABLES", "LD_PRELOAD")
    if any(name in own or name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None:
        return False
    wanted = ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1))
    return all([mallopt(option, value) for option, value in wanted])
