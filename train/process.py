"""What a command sets in its process before it computes."""

from __future__ import annotations

import ctypes
import functools
import os

import jax

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


@functools.cache
def prepare_process() -> None:
    """Keep compiled programs between runs and, on a CPU, memory between steps."""
    if not jax.config.jax_compilation_cache_dir:
        home = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
        jax.config.update("jax_compilation_cache_dir", os.path.join(home, "jaxmodels", "xla"))
    if jax.default_backend() == "cpu":
        keep_freed_memory()


def keep_freed_memory() -> bool:
    """Let glibc's allocator hold on to memory that was freed; whether it was told to.

    XLA allocates a program's buffers anew in every call. By default glibc maps blocks of more than
    32 MiB and gives them back at once, so that every step meets each of its pages as a fault: a
    fifth of a small training step's time. One arena, because only the main one can grow beyond
    64 MiB. Settings of the user's own (`MALLOC_*`, `GLIBC_TUNABLES`, another allocator) stand.
    """
    own = ("GLIBC_TUNABLES", "LD_PRELOAD")
    if any(name in own or name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None:
        return False
    wanted = ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1))
    return all([mallopt(option, value) for option, value in wanted])
