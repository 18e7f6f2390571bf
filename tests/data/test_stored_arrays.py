"""Many threads that read arrays."""

import ast
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from train.data import stored_arrays


def test_threads_read_one_after_the_other_what_was_written(tmp_path, monkeypatch):
    rows = {str(i): np.arange(i + 3) for i in range(8)}
    np.savez(tmp_path / "a.npz", **rows)
    np.save(tmp_path / "b.npy", rows["5"])
    parse, alone, parsed = ast.literal_eval, threading.Lock(), []

    def watched(header):
        # What CPython cannot do in two threads at once.
        assert alone.acquire(blocking=False), "two headers were parsed at once"
        try:
            time.sleep(1e-4)
            parsed.append(header)
            return parse(header)
        finally:
            alone.release()

    monkeypatch.setattr(ast, "literal_eval", watched)

    def read(_):
        found = stored_arrays.arrays_of(tmp_path / "a.npz")
        flat = stored_arrays.mapped_array(tmp_path / "b.npy")
        same = all(np.array_equal(found[k], v) for k, v in rows.items()) and len(found) == 8
        return same and np.array_equal(flat, rows["5"])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(20)))
    assert len(parsed) == 20 * (8 + 1)
