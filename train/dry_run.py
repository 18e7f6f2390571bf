"""One compile instead of a run: what a step costs on this machine or on a TPU slice one lacks."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys

import jax
import numpy as np

from train.naming import ConfigError

# Per chip: bf16 TFLOP/s, HBM GB/s (vendor's figures), cores a chip counts for in the type's name.
CHIPS = {
    "v4": (275.0, 1228.0, "v4-{cores}", 2),
    "v5e": (197.0, 819.0, "v5litepod-{cores}", 1),
    "v5p": (459.0, 2765.0, "v5p-{cores}", 2),
    "v6e": (918.0, 1640.0, "v6e-{cores}", 1),
}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_CHILD = "JAXMODELS_DRY_RUN_CHILD"


class DoesNotFit(ConfigError):
    """The compiled step needs more memory than a chip has."""


def dry_run(config, argv: list[str]) -> str:
    """A report on the step of `config`: parameters, FLOPs, memory, shardings, collectives.

    `config.dry_run` is `host` (these devices) or a TPU topology (`v5e:4x4`), for which the TPU
    compiler of the extra `tpu` is used, without a TPU.
    """
    name = config.dry_run
    if name == "host":
        return describe(config, jax.devices(), None)
    kind, _, shape = name.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"\d+(x\d+)+", shape):
        raise ConfigError(
            f"config.dry_run: {name!r}; known: host, or one of {', '.join(CHIPS)} with a shape, "
            "such as v5e:4x4"
        )
    if os.environ.get(_CHILD):
        return _on_topology(config, name, kind)
    chips = math.prod(int(s) for s in shape.split("x"))
    _, _, template, cores = CHIPS[kind]
    environment = {
        **os.environ,
        _CHILD: "1",
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "TPU_ACCELERATOR_TYPE": template.format(cores=chips * cores),
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
    }
    child = subprocess.run(
        [sys.executable, "-m", "train", *argv[1:]],
        env=environment,
        capture_output=True,
        text=True,
    )
    if child.returncode:
        lines = child.stderr.strip().splitlines() or ["the compiler ended without a word"]
        said = [line for line in lines if line.startswith("error: ")]
        raise ConfigError((said or lines)[-1].removeprefix("error: "))
    return child.stdout.strip()


def _on_topology(config, name: str, kind: str) -> str:
    from jax.experimental import topologies

    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except Exception as error:
        raise ConfigError(
            f"config.dry_run {name}: no TPU compiler for it here "
            f"({str(error).splitlines()[0]}); it comes with the extra `tpu`"
        ) from None
    try:
        return describe(config, devices, kind)
    except DoesNotFit as error:
        raise ConfigError(f"{error}; {_remedy(config, devices, kind)}") from None


def _remedy(config, devices, kind) -> str:
    """The sharding or the batch size that fits, found by compiling."""
    trials = []
    if config.parallel.fsdp == 1:
        trials.append({"parallel.data": 1, "parallel.fsdp": len(devices)})
    rows = len(devices) * config.optimizer.accumulate
    size = config.batch_size // 2 // rows * rows
    while size >= rows and len(trials) < 6:
        trials.append({"batch_size": size})
        size = size // 2 // rows * rows
    for trial in trials:
        changed = config.copy_and_resolve_references()
        changed.unlock()
        changed.update_from_flattened_dict(trial)
        try:
            describe(changed, devices, kind)
        except DoesNotFit:
            continue
        return "this fits: " + " ".join(f"--config.{k}={v}" for k, v in trial.items())
    return "neither sharding nor a smaller batch was found to fit; try a larger slice"


def compile_step(config, devices):
    """`(plan, compiled step)` for a list of devices, real or described."""
    from train.loop import Plan

    plan = Plan(config, devices)
    from train.parallel import batch_sharding

    rows = batch_sharding(plan.mesh)
    batch = {
        k: jax.ShapeDtypeStruct((config.batch_size, *s.shape), s.dtype, sharding=rows)
        for k, s in plan.spec.items()
    }
    if config.parallel.mode == "pmap":
        raise ConfigError(
            "config.dry_run: compiles the jit mode; leave config.parallel.mode at jit"
        )
    try:
        lowered = plan.run.step.lower(plan.like, batch)
        compiled = lowered.compile()
    except Exception as error:
        text = " ".join(str(error).split())
        if "RESOURCE_EXHAUSTED" not in text and "Oom" not in text:
            raise
        used = re.search(r"Used ([\d.]+\w) of ([\d.]+\w)", text) or re.search(
            r"\(([\d.]+\w)\) exceeds available HBM \(([\d.]+\w)\)", text
        )
        sizes = f"needs {used[1]} of {used[2]} HBM a chip" if used else text[:160]
        raise DoesNotFit(
            f"batch {config.batch_size} on {plan.mesh.size} chips ({_axes(plan.mesh)}) does not "
            f"fit: {sizes}"
        ) from None
    return plan, batch, lowered, compiled


def _axes(mesh) -> str:
    return " ".join(f"{k}={v}" for k, v in mesh.shape.items())


def collectives(text: str) -> dict[str, int]:
    """How many of each collective a compiled program holds (asynchronous pairs count once)."""
    return {c: len(re.findall(rf"= .*? {c}(?:-start)?\(", text)) for c in COLLECTIVES}


def measure(config, devices) -> dict:
    """The numbers of a dry run: per-chip HBM, FLOPs, bytes, collectives, and the compile's plan."""
    plan, batch, lowered, compiled = compile_step(config, devices)
    memory = compiled.memory_analysis()
    cost = compiled.cost_analysis() or {}
    cost = cost[0] if isinstance(cost, list) else cost
    return {
        "plan": plan,
        "batch": batch,
        "parameters": sum(int(np.prod(x.shape)) for x in jax.tree.leaves(plan.abstract.params)),
        "hbm": memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "flops": float(cost.get("flops", float("nan"))),
        "whole_flops": float((lowered.cost_analysis() or {}).get("flops", float("nan"))),
        "bytes": float(cost.get("bytes accessed", float("nan"))),
        "collectives": collectives(compiled.as_text()),
    }


def describe(config, devices, kind: str | None) -> str:
    """The report of a dry run as a table."""
    m = measure(config, devices)
    plan = m["plan"]
    shardings = jax.tree.leaves(plan.sharding.params)
    sharded = sum(any(s.spec) for s in shardings)
    memory, temporary = m["hbm"] / 2**20, m["temporary"] / 2**20
    rows = {
        "devices": f"{plan.mesh.size} x {devices[0].device_kind} ({_axes(plan.mesh)})",
        "parameters": f"{m['parameters']:,}",
        "sharded parameter arrays": f"{sharded} of {len(shardings)}",
        **{
            f"batch.{k}": f"{list(b.shape)} {b.dtype} over {b.sharding.spec[0]}"
            for k, b in m["batch"].items()
        },
        "memory per device": f"{memory:,.1f} MiB (temporary {temporary:,.1f})",
        "FLOPs per device and step": f"{m['flops']:.4g}",
        "bytes per device and step": f"{m['bytes']:.4g}",
        "collectives": ", ".join(f"{n} {c}" for c, n in m["collectives"].items() if n) or "none",
    }
    if kind is None:
        # Well below 1: devices repeat each other's work. Unknown where the compiler is not at home.
        share = m["whole_flops"] / m["flops"] / plan.mesh.size
        rows["parallel efficiency"] = f"{share:.2f} (FLOPs of the step / of all devices together)"
    else:
        peak, bandwidth, _, _ = CHIPS[kind]
        compute, traffic = m["flops"] / peak / 1e9, m["bytes"] / bandwidth / 1e6
        rate = config.batch_size / max(compute, traffic) * 1e3
        bound = "arithmetic" if compute > traffic else "HBM"
        rows["roofline"] = (
            f"{max(compute, traffic):.3g} ms a step ({bound}-bound: arithmetic {compute:.3g} ms, "
            f"HBM {traffic:.3g} ms; {rate:,.0f} examples/s)"
        )
    width = max(map(len, rows))
    return "\n".join(f"{k:<{width}}  {v}" for k, v in rows.items())
