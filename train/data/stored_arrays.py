"""Arrays read from `.npy` and `.npz` files by several threads at once.

numpy reads an array's header with `ast.literal_eval`, and CPython 3.11 and 3.12 count the depth of
what they parse for all threads together (python/cpython#106905): threads that read at the same
moment end now and then in "SystemError: AST constructor recursion depth mismatch". What runs in the
threads of a pipeline therefore reads through here.
"""

from __future__ import annotations

import os
import threading

import numpy as np

_ONE_AT_A_TIME = threading.Lock()


def mapped_array(path: str | os.PathLike) -> np.ndarray:
    """A `.npy` file's array, read-only and mapped into memory. Raises as `numpy.load`."""
    with _ONE_AT_A_TIME:
        return np.load(path, mmap_mode="r", allow_pickle=False)


def arrays_of(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """All arrays of an `.npz` file. Raises as `numpy.load`."""
    with _ONE_AT_A_TIME, np.load(path, allow_pickle=False) as stored:
        return dict(stored)
