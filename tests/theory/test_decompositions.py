"""Decompositions equal NumPy's and never hand a batch to jaxlib's waiting LAPACK calls on a CPU."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from theory import decompositions

# Every host device decomposes a batch inside a loop at the same time, on a pool of as many threads:
# with batched LAPACK calls of jaxlib 0.10.2 this stands still within the first few rounds.
PROGRAM = """
import jax, jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from theory.decompositions import singular_values
from theory.lanes import matmul

def step(w, _):
    return tuple(matmul(x, w[0]) * 0.01 + x for x in w), w[0].sum()

def chunk(w, _):
    s = jax.vmap(singular_values)(jnp.moveaxis(matmul(w[1], w[0]), -1, 0))
    w, trace = jax.lax.scan(step, w, None, length=100)
    return w, (s, trace)

def run(*w):
    tiles = tuple(jnp.moveaxis(x.reshape(-1, 64, 10, 10), 1, -1) for x in w)
    return jax.lax.map(lambda w: jax.lax.scan(chunk, w, None, length=4), tiles)

count = len(jax.devices())
mesh, spec = Mesh(jax.devices(), ("lanes",)), PartitionSpec("lanes")
program = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
x = jax.random.normal(jax.random.key(0), (128 * count, 10, 10)) * 0.01
x = jax.device_put(x, NamedSharding(mesh, spec))
for _ in range(30):
    jax.block_until_ready(program(x, x))
print("finished on", count)
"""


@pytest.mark.parametrize("name", ["singular_values", "svd", "qr", "eigh", "eigvalsh"])
def test_batches_equal_numpy_one_matrix_at_a_time(name):
    batch = np.random.default_rng(3).standard_normal((4, 6, 6))
    if name.startswith("eig"):
        batch = batch + batch.swapaxes(1, 2)
    function = getattr(decompositions, name)
    found = jax.jit(jax.vmap(function))(jnp.asarray(batch))
    reference = {
        "singular_values": lambda m: (np.linalg.svd(m, compute_uv=False),),
        "svd": np.linalg.svd,
        "qr": np.linalg.qr,
        "eigh": np.linalg.eigh,
        "eigvalsh": lambda m: (np.linalg.eigvalsh(m),),
    }[name]
    for one in range(4):
        expected = reference(batch[one])
        got = jax.tree.map(lambda x, one=one: np.asarray(x[one]), found)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(tuple(expected))):
            np.testing.assert_allclose(np.abs(a), np.abs(b), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="expected two axes"):
        function(jnp.asarray(batch))


def test_as_many_devices_as_cores_do_not_wait_for_each_other():
    cores = len(os.sched_getaffinity(0))
    flags = f"--xla_force_host_platform_device_count={cores}"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.stdout.strip() == f"finished on {cores}", result.stderr[-2000:]
