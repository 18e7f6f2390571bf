"""`make demo`: real images to a trained and folded network, held against a PyTorch checkpoint."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from jaxmodels.platform_choice import choose_platform

choose_platform()

from train.command_line import load_config, stop_with_one_line  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
CASE = ROOT / "tests" / "golden" / "repghost" / "net_w020_eval"
RECORDING = ROOT / "tests" / "interop" / "recorded" / "repghost_w020.npz"


def main(argv: list[str]) -> int:
    """Train RepGhost on digits, fold it, export it, compare a PyTorch checkpoint layer by layer."""
    parser = argparse.ArgumentParser(prog="python -m train.demo", description=__doc__)
    parser.add_argument("--workdir", type=Path, default=Path("runs/demo"))
    workdir = parser.parse_args(argv[1:]).workdir
    began = time.perf_counter()
    pictures: list[Path] = []
    rows: list[tuple[str, str]] = []

    _headline("1. Three saddle escapes of a rank-3 target (theory)")
    rows += _theory(workdir / "theory", pictures)

    from train.loop import fit
    from train.process import prepare_process

    prepare_process()
    _headline("2. RepGhost on real handwritten digits, trained and folded")
    config = load_config(str(ROOT / "configs" / "repghost.py"))
    numbers = fit(config, workdir / "repghost", command="make demo")
    pictures.append(workdir / "repghost" / "curves.png")
    rows += [
        ("folded test accuracy", f"{numbers['folded_accuracy']:.4f}"),
        ("logistic regression, same split", f"{numbers['logistic_regression']:.4f}"),
        ("folded and unfolded predictions agree", f"{numbers['folded_agrees']:.2%}"),
    ]

    _headline("3. The trained network under its official PyTorch names, and back")
    rows.append(_round_trip(config, workdir / "repghost"))

    _headline("4. A PyTorch checkpoint, layer by layer")
    rows += _compare(workdir, pictures)

    _headline(f"Done in {time.perf_counter() - began:.0f} s")
    width = max(len(k) for k, _ in rows)
    print("\n".join(f"{k:<{width}}  {v}" for k, v in rows))
    print("pictures:", *(f"  {p}" for p in pictures), sep="\n")
    return 0


def _headline(text: str) -> None:
    print(f"\n== {text}", flush=True)


def _theory(workdir: Path, pictures: list[Path]) -> list[tuple[str, str]]:
    import subprocess

    # A process of its own: the theory computes in float64, the rest of the demo in float32.
    command = [
        sys.executable,
        "-m",
        "theory",
        "--config",
        str(ROOT / "configs" / "dmf.py") + ":demo",
    ]
    subprocess.run([*command, "--workdir", str(workdir)], check=True)
    import csv

    with open(workdir / "runs.csv") as file:
        run = next(csv.DictReader(file))
    pictures += sorted(workdir.rglob("*.png"))
    return [("saddle-escape stages of a rank-3 target", run["n_stages"])]


def _round_trip(config, run: Path) -> tuple[str, str]:
    import jax
    import numpy as np

    import jaxmodels
    from train.checkpoints import load_params

    variables = load_params(run)
    name, args = config.model, dict(config.model_args)
    module, _ = jaxmodels.load(name, **args)
    path = run / "repghost.safetensors"
    jaxmodels.save(path, name, module, variables)
    again, loaded = jaxmodels.load(name, path, **args)
    image = np.random.default_rng(0).standard_normal((2, 32, 32, 3), np.float32)
    apply = jax.jit(again.apply)
    same = np.array_equal(apply(variables, image), apply(loaded, image))
    print(f"{path} written and read back")
    return ("exported, re-imported logits are equal to the bit", "yes" if same else "NO")


def _compare(workdir: Path, pictures: list[Path]) -> list[tuple[str, str]]:
    if not CASE.is_dir():
        print("the recorded PyTorch activations come with the repository, not with the wheel")
        return []
    import json

    import jaxmodels
    from jaxmodels.interop import activations

    args = json.loads((CASE / "meta.json").read_text())["config"]
    module, variables = jaxmodels.load("vision.repghost", CASE / "weights.safetensors", **args)
    result = activations.compare(module, variables, *activations.read_recording(RECORDING))
    report = activations.format_report(result, "highest", 1e-4, 1e-5).splitlines()
    (workdir / "layers.txt").write_text("\n".join(report) + "\n")
    print("\n".join([*report[:6], "...", *report[-8:]]))
    print(f"every layer: {workdir / 'layers.txt'}")
    path = workdir / "layers.png"
    _draw_layers(result, path)
    pictures.append(path)
    worst = max(layer.max_rel for layer in result.layers)
    departing = result.first_departing
    return [
        ("layers compared with PyTorch", str(len(result.layers))),
        ("first layer that departs", departing.name if departing else "none"),
        ("largest relative error", f"{worst:.1e}"),
    ]


def _draw_layers(result, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    errors = [max(layer.max_rel, 1e-9) for layer in result.layers]
    figure, axis = plt.subplots(figsize=(8, 3.5))
    axis.semilogy(errors, ".", color="#4477aa")
    axis.axhline(1e-4, color="#cc6677", linestyle="--", label="tolerance")
    axis.set(
        xlabel="module, in the order of the forward pass",
        ylabel="largest error / largest entry",
        title="RepGhost 0.2x: JAX against PyTorch",
    )
    axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(stop_with_one_line(main, sys.argv))
