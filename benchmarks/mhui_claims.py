"""MH-UI against its rivals: `python -m benchmarks.mhui_claims [--seeds 0 1 ...] [--methods ...]`.

Every method is trained on the digits for every seed and attacked by itself (white box, on what it
predicts from). A finished run's rows stand in `results/mhui_runs.csv` and are not repeated;
`results/mhui_claims.md` is written from the rows.
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
COLUMNS = (
    *("method", "seed", "attack", "protocol", "score"),
    *("auroc", "aupr", "fpr95", "accuracy", "clean_accuracy", "seconds"),
)
METHODS = ("mhui", "softmax", "mc_dropout", "ensemble", "dpn_forward", "dpn_reverse")
ATTACKS = ("fgsm:0.05", "fgsm:0.1", "fgsm:0.2", "pgd:0.05", "pgd:0.1", "pgd:0.2", "cw")
ADAPTIVE = ("adaptive:0.05", "adaptive:0.1")
# Variants of MH-UI: name -> flags.
VARIANTS = {
    "mhui_taps_2": ("model_args.taps=('layer1','layer4')",),
    "mhui_taps_3": ("model_args.taps=('layer2','layer3','layer4')",),
    "mhui_detached": ("model_args.detach_shallow=True",),
}
# The score each method is judged by in the summary.
JUDGED = {
    "softmax": "max_p",
    "mc_dropout": "mi",
    "ensemble": "mi",
    "dpn_forward": "mi",
    "dpn_reverse": "mi",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    arguments = parser.parse_args()
    from train.process import prepare_process

    prepare_process()
    for seed in arguments.seeds:
        for method in arguments.methods:
            if (method, seed) not in {(r["method"], int(r["seed"])) for r in runs.read(RUNS)}:
                one(method, seed)
    report()


def one(method: str, seed: int) -> None:
    """Train, attack, append the rows."""
    from train.checkpoints import load_params
    from train.command_line import read_flags
    from train.loop import fit
    from train.tasks import adversarial_detection as task_module

    preset = "small" if method.startswith("mhui") else method
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
        adaptive = ADAPTIVE if method == "mhui" else ()
        config.task_args.attacks = (*ATTACKS, *adaptive)
        # On the digits a C&W step of 0.01 needs a weight beyond the images' own distances.
        config.task_args.cw_c = 10.0
    task = task_module.from_config(config)
    images, labels = task_module._evaluation_images(config)
    tables = task.detection(variables, images, labels, batch_size=150, seed=seed)
    seconds = time.process_time() - begin
    clean = tables.pop("clean")["accuracy"]
    rows = []
    for attack, table in tables.items():
        for protocol in ("all", "successful"):
            for score, found in table.get(protocol, {}).items():
                numbers = (found.auroc, found.aupr, found.fpr95, table["last_accuracy"], clean)
                shown = (*(f"{v:.4f}" for v in numbers), f"{seconds:.0f}")
                named = zip(COLUMNS, (method, seed, attack, protocol, score, *shown), strict=True)
                rows.append(dict(named))
    runs.append(RUNS, *rows)


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
    for kind, protocol in (("auroc", "all"), ("aupr", "all"), ("auroc", "successful")):
        table = markdown(
            ["method (score)", *ATTACKS],
            [
                [f"{m} ({s})"] + [cell(values(m, a, s, kind, protocol)) for a in ATTACKS]
                for m in present
                for s in ([JUDGED[m], "max_p"] if JUDGED.get(m, "max_p") != "max_p" else
                          ["max_p"] if m in JUDGED else ["epkl_trace", "mi_trace", "max_p"])
            ],
        )  # fmt: skip
        what = "all attacked images" if protocol == "all" else "successful attacks only"
        blocks.append(f"## {kind.upper()}, {what}\n\n{table}")
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
        f"{machine()}; {versions()}. Mean +- standard deviation over seeds; 450 test images, each "
        "method attacked through its own prediction (MH-UI through its last head, an ensemble "
        f"through the mean of its members' logits). All scores of all runs: `{RUNS.name}`.\n\n"
        f"{clean}\n## MH-UI, AUROC by score\n\n{own}\n" + "\n".join(blocks)
    )
    return path


if __name__ == "__main__":
    main()
