"""MH-UI against its rivals: `python -m benchmarks.mhui_claims [--seeds 0 1 ...] [--methods ...]`.

Every method is trained on the digits for every seed and attacked by itself (white box, on what it
predicts from; `adaptive` also through its own detector). `mhui_vgg` is MH-UI on a narrow VGG16,
`mhui_textures` and `softmax_textures` are on crops of photographs. Rows stand in
`results/mhui_runs.csv`, how far smallest perturbations go in `results/mhui_sizes.csv`; what is
there is not repeated (for attacks that are missing a method is trained again), and
`results/mhui_claims.md` is written from them.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks import runs
from benchmarks.measure import RESULTS, machine, markdown, versions

RUNS = RESULTS / "mhui_runs.csv"
SIZES = RESULTS / "mhui_sizes.csv"
SIZE_COLUMNS = ("method", "seed", "attack", "success", "l2")
COLUMNS = (
    *("method", "seed", "attack", "protocol", "score"),
    *("auroc", "aupr", "fpr95", "accuracy", "clean_accuracy", "seconds"),
)
# Rows called mc_dropout are of an attack that left the dropout out.
METHODS = ("mhui", "softmax", "mc_dropout_eot", "ensemble", "dpn_forward", "dpn_reverse")
# Method -> preset, where it bears another name.
PRESETS = {
    "mhui": "small",
    "mc_dropout_eot": "mc_dropout",
    "mhui_vgg": "vgg",
    "mhui_textures": "textures",
    "softmax_textures": "textures_softmax",
}
BOUNDED = ("fgsm:0.05", "fgsm:0.1", "fgsm:0.2", "pgd:0.05", "pgd:0.1", "pgd:0.2")
SIZED = ("pgd_l2:0.25", "pgd_l2:0.5", "pgd_l2:1.0", "cw")
ATTACKS = (*BOUNDED, *SIZED)
ADAPTIVE = ("adaptive:0.05", "adaptive:0.1")
CW_WEIGHT = 10.0
# Variants of MH-UI: name -> flags.
VARIANTS = {
    "mhui_taps_2": ("model_args.taps=('layer1','layer4')",),
    "mhui_taps_3": ("model_args.taps=('layer2','layer3','layer4')",),
    "mhui_detached": ("model_args.detach_shallow=True",),
}
KNOWN = (*METHODS, *VARIANTS, *(name for name in PRESETS if name not in METHODS))
# The score each method is judged by in the summary, and adaptively attacked through; others: EPKL.
JUDGED = {
    "softmax": "max_p",
    "softmax_textures": "max_p",
    "mc_dropout": "mi",
    "mc_dropout_eot": "mi",
    "ensemble": "mi",
    "dpn_forward": "mi",
    "dpn_reverse": "mi",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=KNOWN)
    arguments = parser.parse_args()
    from train.process import prepare_process

    prepare_process()
    for seed in arguments.seeds:
        for method in arguments.methods:
            left = missing(method, seed)
            if left:
                one(method, seed, left)
    report()


def missing(method: str, seed: int) -> tuple[str, ...]:
    """Attacks whose rows, or sizes, are not there."""
    scored, sized = (
        {r["attack"] for r in runs.read(path) if (r["method"], r["seed"]) == (method, str(seed))}
        for path in (RUNS, SIZES)
    )
    return tuple(
        attack
        for attack in (*ATTACKS, *ADAPTIVE)
        if attack not in scored or (attack in SIZED and attack not in sized)
    )


def one(method: str, seed: int, chosen: tuple[str, ...]) -> None:
    """Train, attack, append the rows of these attacks that are not there."""
    from train.checkpoints import load_params
    from train.command_line import read_flags
    from train.loop import fit
    from train.tasks import adversarial_detection as task_module

    preset = "small" if method in VARIANTS else PRESETS.get(method, method)
    flags = [f"--config.{flag}" for flag in VARIANTS.get(method, ())]
    begin = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        config, workdir = read_flags(
            [
                "claims",
                f"--config=configs/mhui.py:{preset}",
                f"--config.seed={seed}",
                "--config.task_args.attacks=()",
                f"--workdir={folder}",
                *flags,
            ],
            need_workdir=True,
        )
        fit(config, workdir)
        variables = load_params(workdir)
    with config.unlocked():
        config.task_args.attacks = chosen
        config.task_args.detector = JUDGED.get(method, "epkl")
        # On the digits a C&W step of 0.01 needs a weight beyond the images' own distances.
        config.task_args.cw_c = CW_WEIGHT
    task = task_module.from_config(config)
    images, labels = task_module._evaluation_images(config)
    tables = task.detection(variables, images, labels, batch_size=150, seed=seed)
    seconds = time.process_time() - begin
    clean = tables.pop("clean")["accuracy"]
    there = {
        r["attack"] for r in runs.read(RUNS) if (r["method"], r["seed"]) == (method, str(seed))
    }
    rows, sizes = [], []
    for attack, table in tables.items():
        if attack in SIZED:
            measured = (f"{table['success']:.4f}", f"{table['l2']:.4f}")
            sizes.append(dict(zip(SIZE_COLUMNS, (method, seed, attack, *measured), strict=True)))
        if attack in there:
            continue
        for protocol in ("all", "successful"):
            for score, found in table.get(protocol, {}).items():
                numbers = (found.auroc, found.aupr, found.fpr95, table["last_accuracy"], clean)
                shown = (*(f"{v:.4f}" for v in numbers), f"{seconds:.0f}")
                named = zip(COLUMNS, (method, seed, attack, protocol, score, *shown), strict=True)
                rows.append(dict(named))
    if rows:
        runs.append(RUNS, *rows)
    if sizes:
        runs.append(SIZES, *sizes)


def cell(values: list[float]) -> str:
    """Mean and standard deviation."""
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{statistics.mean(values):.3f} +- {statistics.stdev(values):.3f}"


def report() -> Path:
    """`results/mhui_claims.md` from the rows."""
    found = runs.read(RUNS)
    seeds = sorted({int(r["seed"]) for r in found})

    def values(method, attack, score, kind="auroc", protocol="all"):
        return [
            float(r[kind])
            for r in found
            if (r["method"], r["attack"], r["score"], r["protocol"])
            == (method, attack, score, protocol)
        ]

    present = list(dict.fromkeys(r["method"] for r in found))
    attacks = [a for a in (*ATTACKS, *ADAPTIVE) if any(r["attack"] == a for r in found)]
    scores = ["last_head", "max_p", "ent", "mi_trace", "epkl_trace", "epkl_minka", "d_ent_trace"]
    own = markdown(
        ["attack", "last head's accuracy", *scores],
        [
            [a, cell(values("mhui", a, "max_p", "accuracy"))]
            + [cell(values("mhui", a, s)) for s in scores]
            for a in attacks
        ],
    )
    blocks = []
    for kind, protocol, columns in (
        ("auroc", "all", ATTACKS),
        ("aupr", "all", ATTACKS),
        ("auroc", "successful", ATTACKS),
        ("auroc", "all", ADAPTIVE),
    ):
        table = markdown(
            ["method (score)", *columns],
            [
                [f"{m} ({s})"] + [cell(values(m, a, s, kind, protocol)) for a in columns]
                for m in present
                for s in ([JUDGED[m], "max_p"] if JUDGED.get(m, "max_p") != "max_p" else
                          ["max_p"] if m in JUDGED else ["epkl_trace", "mi_trace", "max_p"])
            ],
        )  # fmt: skip
        what = "all attacked images" if protocol == "all" else "successful attacks only"
        if columns == ADAPTIVE:
            what = "attacked through the detector as well (each method's first score)"
        blocks.append(f"## {kind.upper()}, {what}\n\n{table}")
    sizes = runs.read(SIZES)
    if sizes:

        def of(kind, method, attack):
            rows = [r for r in sizes if (r["method"], r["attack"]) == (method, attack)]
            return cell([float(r[kind]) for r in rows])

        table = markdown(
            ["method", *SIZED],
            [
                [m, *(f"{of('success', m, a)}; {of('l2', m, a)}" for a in SIZED)]
                for m in dict.fromkeys(r["method"] for r in sizes)
            ],
        )
        blocks.append(
            "## Share of rightly classified images that are misled; mean L2 of their perturbations"
            f"\n\nC&W with weight {CW_WEIGHT:g} of the margin (its default is 1).\n\n{table}"
        )
    clean = markdown(
        ["method", "seeds", "clean accuracy", "CPU seconds a run"],
        [
            [
                m,
                str(len({r["seed"] for r in found if r["method"] == m})),
                cell(list({r["seed"]: float(r["clean_accuracy"]) for r in found
                           if r["method"] == m}.values())),
                cell(list({r["seed"]: float(r["seconds"]) for r in found
                           if r["method"] == m}.values())),
            ]
            for m in present
        ],
    )  # fmt: skip
    path = RESULTS / "mhui_claims.md"
    path.write_text(
        "# Telling attacked digits from natural ones\n\n"
        f"`python -m benchmarks.mhui_claims`, seeds {', '.join(map(str, seeds))}, written on "
        f"{machine()}; {versions()}. Mean +- standard deviation over seeds; 450 test images (480 "
        "crops of textures), each method attacked through its own prediction (MH-UI through its "
        "last head, an ensemble through the mean of its members' logits, mc_dropout_eot through "
        "that of four dropout masks, others at every step; mc_dropout without its dropout). All "
        f"scores of all runs: `{RUNS.name}`.\n\n"
        f"{clean}\n## MH-UI, AUROC by score\n\n{own}\n" + "\n".join(blocks)
    )
    return path


if __name__ == "__main__":
    main()
