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
from train.process import keep_freed_memory
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * mmap.PAGESIZE >> 20
told, before = keep_freed_memory(), resident()
np.ones(2**23).sum()  # 64 MiB, touched and freed
print(told, resident() - before)
"""


def _run(**settings) -> tuple[str, int]:
    """Whether the allocator was told, and how many of 64 freed MiB the process holds."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "LD_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=clean | settings, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    told, held = done.stdout.split()
    return told, int(held)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc's allocator")
def test_freed_memory_is_kept():
    told, held = _run()
    assert told == "True" and held >= 60


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc's allocator")
def test_the_users_own_allocator_settings_stand():
    told, held = _run(MALLOC_MMAP_THRESHOLD_="1048576")
    assert told == "False" and held < 30
