"""What commands set in their process."""

import os
import platform
import subprocess
import sys

import pytest

# Resident memory, not page faults: those are few where pages are huge.
CODE = """
import mmap
import numpy as np
from jaxmodels.platform_choice import keep_freed_memory
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * mmap.PAGESIZE >> 20
told, before = keep_freed_memory(), resident()
np.ones(2**23).sum()  # 64 MiB, touched and freed
print(told, resident() - before)
"""

# A program whose temporary array has 64 MiB, and whose loop makes JAX run it in another thread, in
# a process that had threads before; faults of a warm call.
STEP = """
import resource, threading
from jaxmodels.platform_choice import choose_platform
choose_platform()
thread = threading.Thread(target=lambda: [bytes(n) for n in range(10_000)])
thread.start(); thread.join()
import jax, jax.numpy as jnp
x = jnp.ones((4096, 64))
f = jax.jit(lambda x: jax.lax.fori_loop(0, 2, lambda i, y: y + jnp.sin(x @ x.T * i).sum(), 0.0))
faults = []
for _ in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    f(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(True, min(faults))
"""


def _run(code=CODE, **settings) -> tuple[str, int]:
    """The word and the number that `code` prints."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "LD_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean | settings, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    told, held = done.stdout.split()
    return told, int(held)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc's allocator")
def test_freed_memory_is_kept():
    told, held = _run()
    assert told == "True" and held >= 60


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc's allocator")
def test_a_programs_temporary_memory_is_kept_between_steps():
    assert _run(STEP)[1] < 1000  # 16,384 pages


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc's allocator")
def test_the_users_own_allocator_settings_stand():
    told, held = _run(MALLOC_MMAP_THRESHOLD_="1048576")
    assert told == "False" and held < 30
