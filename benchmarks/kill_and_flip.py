"""Kills a training run at random moments and flips random bytes of its checkpoints.

    python benchmarks/kill_and_flip.py [--kills 200] [--flips 200] [--out FILE]

Kills: a child process trains a small seeded model, saving after every fifth step, and is killed
(SIGKILL) a random time after it resumed (one in ten: after it started); the same run is started
again until it reaches its last step. Every start must resume from the newest checkpoint that was
finished at the kill, and every final state must equal that of a run that was never stopped, bit
for bit.

Flips: one random byte of one random file of the newest checkpoint gets another value. The
checkpoint must be named and the previous one restored exactly. For comparison, Orbax is asked to
restore the flipped arrays without the manifest. The same is done with files cut at a random length.
"""

import argparse
import hashlib
import os
import platform
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

from train.checkpoint_manifest import candidates, examine
from train.checkpoints import Checkpoints

STEPS, SAVE_EVERY, LONGEST_LIFE_S = 60, 5, 1.0
OPTIMIZER = optax.adam(1e-2)


def initial_state() -> dict[str, Any]:
    rng = jax.random.key(0)
    params = {f"layers.{i}": {"kernel": jax.random.normal(rng, (128, 128))} for i in range(4)}
    return {"params": params, "opt_state": OPTIMIZER.init(params), "rng": rng, "step": jnp.int32(0)}


@jax.jit
def update(state: dict[str, Any]) -> dict[str, Any]:
    x = jax.random.normal(jax.random.fold_in(state["rng"], state["step"]), (32, 128))

    def loss(params: dict[str, Any]) -> jax.Array:
        y = x
        for layer in params.values():
            y = jnp.tanh(y @ layer["kernel"] / 11.3)
        return jnp.mean((y - x) ** 2)

    grads = jax.grad(loss)(state["params"])
    updates, opt_state = OPTIMIZER.update(grads, state["opt_state"])
    return {
        "params": optax.apply_updates(state["params"], updates),
        "opt_state": opt_state,
        "rng": state["rng"],
        "step": state["step"] + 1,
    }


def digest(state: dict[str, Any]) -> str:
    state = state | {"rng": jax.random.key_data(state["rng"])}
    total = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
        total.update(np.asarray(leaf).tobytes())
    return total.hexdigest()


def train(directory: Path, log: Path) -> None:
    """One start of the run: resumes, trains to the end, writes what happened to `log`."""

    def tell(line: str) -> None:
        with open(log, "a") as file:
            file.write(line + "\n")

    jax.config.update("jax_compilation_cache_dir", str(log.parent / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    state = initial_state()
    jax.block_until_ready(update(state))  # compiled before the clock of the killer starts
    with Checkpoints(directory, report=lambda line: tell(f"named {line}")) as checkpoints:
        restored = checkpoints.restore(state)
        step, state = restored or (0, state)
        tell(f"resumed {step}")
        while step < STEPS:
            state = update(state)
            step += 1
            if step % SAVE_EVERY == 0:
                checkpoints.save(step, state)
    tell(f"final {digest(state)}")


def start(directory: Path, log: Path) -> int:
    """Forks a child that trains; jax is imported here but has no backend or threads yet."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        train(directory, log)
        status = 0
    finally:
        os._exit(status)


def newest_finished(directory: Path) -> int:
    if not directory.exists():
        return 0
    return max((s for s, p in candidates(directory) if not examine(p)[1]), default=0)


def kill_runs(scratch: Path, kills: int, random: np.random.Generator) -> Counter[str]:
    count: Counter[str] = Counter()
    log = scratch / "reference.log"
    os.waitpid(start(scratch / "reference", log), 0)
    reference = log.read_text().splitlines()[-1]
    assert reference.startswith("final ")

    run = 0
    while count["kills"] < kills:
        run += 1
        directory, log = scratch / f"run{run}", scratch / f"run{run}.log"
        log.touch()
        finished = False
        while not finished:
            before = len(log.read_text().splitlines())
            expected = newest_finished(directory)
            child = start(directory, log)
            if count["kills"] < kills:
                done = 0
                if count["kills"] % 10:
                    while not done and "resumed" not in "".join(
                        log.read_text().splitlines()[before:]
                    ):
                        time.sleep(0.005)
                        done, status = os.waitpid(child, os.WNOHANG)
                if not done:
                    time.sleep(random.uniform(0, LONGEST_LIFE_S))
                    # The child may have finished by itself; then there is nothing to kill.
                    done, status = os.waitpid(child, os.WNOHANG)
                if not done:
                    os.kill(child, signal.SIGKILL)
                    _, status = os.waitpid(child, 0)
            else:
                _, status = os.waitpid(child, 0)
            lines = log.read_text().splitlines()[before:]
            for line in lines:
                if line.startswith("resumed "):
                    count["starts that resumed"] += int(line.split()[1]) > 0
                    count["starts from a wrong step"] += int(line.split()[1]) != expected
            count["unfinished checkpoints named"] += sum(x.startswith("named ") for x in lines)
            finished = os.WIFEXITED(status)
            if finished:
                assert os.WEXITSTATUS(status) == 0, f"{directory}: child failed: {lines}"
                count["runs completed"] += 1
                count["final states that differ"] += lines[-1] != reference
            else:
                count["kills"] += 1
                writing = directory.exists() and any(directory.glob("*.*"))
                count["kills in the middle of a save"] += writing
                if not any(line.startswith("resumed ") for line in lines):
                    count["kills before the first step"] += 1
    return count


def orbax_alone(step: Path, sound: dict[str, np.ndarray]) -> str:
    """What Orbax does with the arrays when nobody checks the manifest."""
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            arguments = {key: ocp.RestoreArgs(restore_type=np.ndarray) for key in sound}
            restored = reader.restore(
                step / "arrays", args=ocp.args.PyTreeRestore(item=sound, restore_args=arguments)
            )
    except Exception:
        return "error"
    same = all(np.array_equal(restored[key], sound[key]) for key in sound)
    return "right values" if same else "wrong values"


def damage_files(
    scratch: Path, kind: str, trials: int, random: np.random.Generator
) -> Counter[str]:
    count: Counter[str] = Counter()
    directory = scratch / kind
    state = initial_state()
    with Checkpoints(directory, config={"seed": 0}) as checkpoints:
        for step in (1, 2):
            state = update(state)
            checkpoints.save(step, state)
            checkpoints.wait()
            if step == 1:
                previous = digest(state)
    newest = directory / "2"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        tree = reader.metadata(newest / "arrays").item_metadata.tree
        arguments = {key: ocp.RestoreArgs(restore_type=np.ndarray) for key in tree}
        sound = reader.restore(
            newest / "arrays", args=ocp.args.PyTreeRestore(restore_args=arguments)
        )
    files = sorted(p for p in newest.rglob("*") if p.is_file() and p.stat().st_size)
    sizes = np.array([p.stat().st_size for p in files], float)
    for trial in range(trials):
        # Half of them where most bytes are, half spread evenly over the small files.
        weights = sizes / sizes.sum() if trial % 2 else None
        file = files[random.choice(len(files), p=weights)]
        content = file.read_bytes()
        if kind == "flips":
            changed = bytearray(content)
            changed[random.integers(len(content))] ^= int(random.integers(1, 256))
        else:
            changed = content[: random.integers(len(content))]
        file.write_bytes(changed)
        lines: list[str] = []
        step, restored = Checkpoints(directory, report=lines.append).restore(state)
        count["trials"] += 1
        count["named, with the right file"] += (
            len(lines) == 1 and file.relative_to(newest).as_posix() in lines[0]
        )
        count["previous one restored exactly"] += step == 1 and digest(restored) == previous
        count[f"Orbax alone: {orbax_alone(newest, sound)}"] += 1
        file.write_bytes(content)
    step, restored = Checkpoints(directory).restore(state)
    assert step == 2 and digest(restored) == digest(state)
    return count


def table(counts: dict[str, Counter[str]]) -> str:
    rows = ["| trial | what happened | count |", "|---|---|---:|"]
    for trial, count in counts.items():
        rows += [f"| {trial} | {what} | {number} |" for what, number in count.items()]
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--flips", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="Markdown file to write")
    options = parser.parse_args()
    random = np.random.default_rng(options.seed)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        counts = {"SIGKILL": kill_runs(scratch, options.kills, random)}
        counts["byte flip"] = damage_files(scratch, "flips", options.flips, random)
        counts["truncation"] = damage_files(scratch, "cuts", options.flips // 4, random)
    text = (
        "# Random kills and damaged files\n\n"
        f"`python benchmarks/kill_and_flip.py --kills {options.kills} --flips {options.flips} "
        f"--seed {options.seed}`, {time.monotonic() - begin:.0f} s, {platform.system()} "
        f"{platform.machine()}, {os.cpu_count()} cores, jax {jax.__version__}, "
        f"orbax-checkpoint {ocp.__version__}.\n\n"
        f"A run has {STEPS} steps and saves after every {SAVE_EVERY}; it is killed after 0 to "
        f"{LONGEST_LIFE_S} s after it resumed. Half of the damaged files are drawn by size, half "
        "evenly.\n\n"
        f"{table(counts)}\n"
    )
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)
    kill, flip, cut = counts.values()
    wrong = kill["final states that differ"] + kill["starts from a wrong step"]
    for count in (flip, cut):
        wrong += 2 * count["trials"]
        wrong -= count["named, with the right file"] + count["previous one restored exactly"]
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
