"""Peak memory and time of reading checkpoints, against the size of the tensors asked for.

    python -m benchmarks.checkpoint_reader [MEBIBYTES]

Writes one checkpoint of 4 MiB tensors in each format and, in a process of its own for every row,
reads all of it, or the first quarter in the file's order, and sums every entry of the tensors asked
for. The peak is Linux's VmHWM beyond its value before reading, mapped pages included. Target: 1.3.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from jaxmodels.interop import checkpoint

_READ = """
import sys, time
import numpy as np
from jaxmodels.interop import checkpoint
from jaxmodels.interop import nesting, torch_archive  # what it imports is not the file's

def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])

path, share = sys.argv[1], float(sys.argv[2])
before, start = peak(), time.perf_counter()
tensors = checkpoint.read(path).tensors
opened = time.perf_counter() - start
names = list(tensors)[: max(1, int(len(tensors) * share))]
asked = sum(tensors[n].nbytes for n in names)
total = sum(float(tensors[n].sum(dtype=np.float32)) for n in names)
print(asked / 2**20, (peak() - before) / 1024, opened * 1e3, time.perf_counter() - start)
"""


def main() -> None:
    """Print the table; `benchmarks/results/checkpoint_reader.md` keeps it."""
    mebibytes = int(sys.argv[1]) if len(sys.argv) > 1 else 256
    root = Path(__file__).resolve().parents[1]
    sys.path.insert(0, os.fspath(root / "tests" / "interop"))
    import torch_files

    tensors = {
        f"layer.{n}.weight": np.full((1024, 1024), n, np.float32) for n in range(mebibytes // 4)
    }
    print("| format | asked MiB | peak MiB | ratio | open ms | read and sum s |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name in ("a.safetensors", "zip.pth", "legacy.pth"):
            path = os.path.join(folder, name)
            if name == "a.safetensors":
                checkpoint.write_safetensors(path, tensors)
            else:
                make = torch_files.zip_bytes if name == "zip.pth" else torch_files.legacy_bytes
                Path(path).write_bytes(make({"state_dict": tensors}))
            for share in ("1.0", "0.25"):
                run = subprocess.run(
                    [sys.executable, "-c", _READ, path, share],
                    capture_output=True, text=True, check=True, cwd=root,
                )  # fmt: skip
                asked, peak, opened, seconds = map(float, run.stdout.split())
                print(
                    f"| {name.split('.')[0 if name[0] != 'a' else 1]} | {asked:.0f} | {peak:.0f} "
                    f"| {peak / asked:.2f} | {opened:.1f} | {seconds:.2f} |"
                )
            os.unlink(path)


if __name__ == "__main__":
    main()
