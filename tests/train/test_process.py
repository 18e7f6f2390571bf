"""What commands set in their process."""

import os
import platform
import subprocess
import sys

import pytest

CODE = """
import mmap, resource, sys
import numpy as np
from train.process import keep_freed_memory
told = keep_freed_memory()
np.ones(2**23).sum()  # 64 MiB, touched and freed
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    np.ones(2**23).sum()
print(told, (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * mmap.PAGESIZE >> 20)
"""


def _run(**settings) -> tuple[str, int]:
    """Whether the allocator was told, and MiB of fresh pages for eight arrays of 64 MiB."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "LD_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=clean | settings, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    told, fresh = done.stdout.split()
    return told, int(fresh)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc's allocator")
def test_freed_memory_is_kept():
    told, fresh = _run()
    assert told == "True" and fresh < 8


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc's allocator")
def test_the_users_own_allocator_settings_stand():
    told, fresh = _run(MALLOC_MMAP_THRESHOLD_="1048576")
    assert told == "False" and fresh >= 8
