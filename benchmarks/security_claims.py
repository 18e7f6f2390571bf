"""Claims of the attacks: `python -m benchmarks.security_claims CLAIM`.

transfer  digits at 32x32: success on two hidden victims of random signs, PGD and MI on one network,
          MI on four, MI with diverse inputs and smoothed gradients on four, at three budgets.
patches   a patch optimized over placements beside one optimized for a single placement, both judged
          at fresh placements, on the same networks.
margins   verification of letters after training with ArcFace and with softmax for the same steps;
          `new_identities`: of letters that were left out of training.
scenarios  share of ten scenes a seed in which a search finds a collision that counts, by method and
          number of rollouts, for an ego without and with forecasts (constant velocity).
textures  share of drive-ups in which a vehicle is found with its paint, a random texture, and one
          optimized on two detectors, on two by the objective `hide`, on two and on four with
          diverse scenes; by the attacked detectors and by a hidden one.
forecasts  VectorNet on the highway: displacement errors of tracks as driven and as attacked, and
          scenarios against an ego that plans by it.
attribution  which tool forged it, `configs/ai_security.py` as it is: accuracy of known tools and
          NMI of novel ones beside k-means on supervised features, with the labels, and (seed 0
          alone) with labels drawn by chance (known tools are then at .2).
detection  real or forged: AUC and log-loss of frames and videos in the same domain, by Xception,
          EfficientNet-B0 and Xception with frequency residuals.

`--seeds 0 1 2 ...`. With `--augment` the networks of transfer and patches are trained on digits
under noise of standard deviation .2, turned, scaled and shifted; rows are then called
CLAIM_augmented. Finished rows stand in `results/security_runs.csv` and are not repeated;
`results/security_claims.md` is written from them. Networks below .95 are reported and refused.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import runs
from benchmarks.measure import RESULTS, machine, markdown, versions

RUNS = RESULTS / "security_runs.csv"
COLUMNS = ("claim", "seed", "what", "on", "value")
BUDGETS, STEPS, LEAST_ACCURACY = (0.05, 0.1, 0.2), 10, 0.95
PATCH_STEPS, PATCH_DRAWS = 100, 4
_CONV = (12, "M", 24, "M", 32, "M")
# name: (model, arguments); the last two are hidden.
NETWORKS = {
    "resnet_8": ("vision.resnet", {"layers": (1, 1, 1, 1), "width": 8, "leaky": 0.2}),
    "resnet_10": ("vision.resnet", {"layers": (1, 1, 1, 1), "width": 10, "leaky": 0.0}),
    "conv_12": ("vision.vgg", {"cfg": _CONV}),
    "conv_16": ("vision.vgg", {"cfg": (16, "M", 16, "M", 48, "M")}),
    "hidden_resnet_14": ("vision.resnet", {"layers": (1, 1, 1, 1), "width": 14, "leaky": 0.1}),
    "hidden_conv_20": ("vision.vgg", {"cfg": (20, 20, "M", 40, "M", 40, "M")}),
}


def train_network(name: str, seed: int, steps: int, augment: bool = False):
    """(pixels [B, 32, 32, 3] of 0..1 -> logits, accuracy, test images, test labels)."""
    from ml_collections import ConfigDict

    from train.checkpoints import load_params
    from train.competition.roster import member_config
    from train.loop import fit
    from train.tasks import adversarial_detection as task_module

    entry = {
        "config": "configs/mhui.py:softmax",
        "set": {
            "seed": 100 * seed + list(NETWORKS).index(name),
            "steps": steps,
            "schedule.warmup_steps": max(steps // 6, 1),
            "data.options.image_size": 32,
            "task_args.attacks": "()",
            "checkpoint.every": 0,
            "data.options.augment": augment,
            "data.options.noise": 0.2 if augment else 0.0,
        },
    }
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder)
        config = member_config(entry, workdir)
        with config.unlocked():
            config.model, arguments = NETWORKS[name]
            config.model_args = ConfigDict({**arguments, "num_classes": 10})
        fit(config, workdir)
        variables = load_params(workdir)
    task = task_module.from_config(config)
    images, labels = task_module._evaluation_images(config)

    def apply(x):
        return task.model.apply(variables, (x - 0.5) / 0.5)

    logits = jax.jit(apply)(images)
    return apply, float((np.asarray(logits).argmax(-1) == labels).mean()), images, labels


def train_all(
    seed: int, steps: int, augment: bool
) -> tuple[dict, np.ndarray, np.ndarray, list[tuple]]:
    """(networks by name, test images, test labels, rows of their accuracies)."""
    found, rows = {}, []
    for name in NETWORKS:
        found[name], accuracy, images, labels = train_network(name, seed, steps, augment)
        rows.append(("accuracy", name, accuracy))
    return found, images, labels, rows


def transfer(seed: int, steps: int, augment: bool = False) -> list[tuple]:
    """Success on each hidden network, of images that it classified rightly; budgets of 0..1."""
    from jaxmodels.security.attacks import attack, make
    from jaxmodels.security.ensembles import average_outputs
    from jaxmodels.security.input_transforms import diverse_input

    networks, images, labels, rows = train_all(seed, steps, augment)
    if any(value < LEAST_ACCURACY for _, _, value in rows) and steps >= 100:
        return rows
    hidden = {name: fn for name, fn in networks.items() if name.startswith("hidden")}
    pool = [fn for name, fn in networks.items() if name not in hidden]
    images, labels = jnp.asarray(images[:300]), jnp.asarray(labels[:300])
    key = jax.random.key(seed)
    right = {name: np.asarray(apply(images).argmax(-1) == labels) for name, apply in hidden.items()}
    for eps in BUDGETS:
        bounded = {"eps": eps, "steps": STEPS, "step_size": eps / STEPS}
        methods = {
            "PGD, one network": (pool[0], make("pgd", **bounded)),
            "MI, one network": (pool[0], make("mi", **bounded)),
            "MI, four networks": (average_outputs(pool), make("mi", **bounded)),
            "TI + DI + MI, four networks": (
                average_outputs(pool),
                make("ti", kernel_size=5, transform=diverse_input, **bounded),
            ),
        }
        signs = jax.random.rademacher(key, images.shape, images.dtype)
        attacked = {"random signs": jnp.clip(images + eps * signs, 0, 1)}
        for name, (apply, cfg) in methods.items():
            run = jax.jit(lambda x, y, apply=apply, cfg=cfg: attack(key, apply, x, y, cfg))
            attacked[name] = run(images, labels)
        for victim, apply in hidden.items():
            for name, x in attacked.items():
                fooled = np.asarray(apply(x).argmax(-1) != labels)[right[victim]]
                rows.append((f"{name}, {eps}", victim, float(fooled.mean())))
    return rows


def patches(seed: int, steps: int, augment: bool = False) -> list[tuple]:
    """Success of a targeted patch at fresh placements, with and without EOT."""
    from jaxmodels.security import patch_attack

    apply, accuracy, images, labels = train_network("resnet_8", seed, steps, augment)
    target = seed % 10
    images = jnp.asarray(images[labels != target][:200])
    wanted = jnp.full(len(images), target)
    mask, gray = jnp.ones((12, 12, 1)), jnp.full((12, 12, 3), 0.5)
    base = patch_attack.PatchAttack(
        steps=PATCH_STEPS, draws=PATCH_DRAWS, step_size=8 / 255, targeted=True, shift=0.5
    )
    rows = [("accuracy", "resnet_8", accuracy)]
    # The same number of gradients for both.
    arms = {
        "optimized over placements": base,
        "optimized for one placement": base.replace(varied=False, steps=PATCH_STEPS * PATCH_DRAWS),
    }
    found = {"gray": gray}
    for name, cfg in arms.items():
        run = jax.jit(
            lambda key, x, y, cfg=cfg: patch_attack.optimize_patch(
                key, apply, x, y, gray, mask, cfg
            )
        )
        found[name] = run(jax.random.key(seed), images[:32], wanted[:32])
    for name, patch in found.items():
        rate = patch_attack.patch_success(
            jax.random.key(seed + 1000), apply, images[32:], wanted[32:], patch, mask, base
        )
        rows.append((name, "resnet_8", float(rate)))
    return rows


def margins(seed: int, steps: int) -> list[tuple]:
    """Verification accuracy of letters that were trained."""
    return [
        (name, "letters", _verification(preset, seed, steps))
        for name, preset in (("ArcFace", "face"), ("softmax", "face_softmax"))
    ]


def new_identities(seed: int, steps: int) -> list[tuple]:
    """Verification accuracy of 13 letters that were not trained, the other 39 were."""
    arms = {
        "ArcFace, scale 32": ("face", ()),
        "ArcFace, scale 16": ("face", ("task_args.scale=16.0",)),
        "softmax": ("face_softmax", ()),
    }
    return [
        (name, "new letters", _verification(preset, seed, steps, "data.options.held_out=13", *own))
        for name, (preset, own) in arms.items()
    ]


def _verification(preset: str, seed: int, steps: int, *changes: str) -> float:
    return _trained(preset, seed, f"steps={steps}", *changes)["verification_accuracy"]


def _trained(preset: str, seed: int, *changes: str) -> dict[str, float]:
    """What a run of `configs/ai_security.py:PRESET` ends with."""
    from train.command_line import read_flags
    from train.loop import fit

    own = (f"seed={seed}", "checkpoint.every=0", *changes)
    with tempfile.TemporaryDirectory() as folder:
        config, workdir = read_flags(
            [
                "claims",
                f"--config=configs/ai_security.py:{preset}",
                f"--workdir={folder}",
                *(f"--config.{change}" for change in own),
            ],
            need_workdir=True,
        )
        return fit(config, workdir)


def attribution(seed: int, steps: int) -> list[tuple]:
    """Open-world attribution with labels, and, at seed 0 alone, with labels that say nothing."""
    del steps  # the preset's own three stages
    names = ("known_acc", "novel_nmi", "all_nmi", "kmeans_novel_nmi", "same_tool_auc")
    rows = []
    for arm, shuffled in (("labels", False), ("shuffled labels", True)):
        if shuffled and seed:
            continue
        numbers = _trained("small", seed, f"data.options.shuffled_labels={shuffled}")
        rows += [(name, arm, numbers[name]) for name in names]
    return rows


def detection(seed: int, steps: int) -> list[tuple]:
    """Real or forged, judged on the halves of the photographs that were not trained on."""
    del steps
    arms = {
        "Xception": ("detection", ()),
        "EfficientNet-B0": ("detection_b0", ()),
        "Xception, pixels alone": ("detection", ("task_args.frequency=False",)),
    }
    rows = []
    for arm, (preset, changes) in arms.items():
        numbers = _trained(preset, seed, *changes)
        rows += [(name, arm, numbers[name]) for name in ("auc", "log_loss", "video_auc")]
    return rows


def _collisions(seed, traffic, forecaster, method, restarts, iterations, count) -> list[bool]:
    """Whether a valid collision was found in each of the seed's scenes."""
    from jaxmodels.security.driving_simulator import sample_scene
    from jaxmodels.security.scenario_search import search

    return [
        bool(
            search(
                jax.random.fold_in(jax.random.key(seed), i),
                sample_scene(1000 * (seed + 1) + i, traffic),
                traffic,
                forecaster,
                method=method,
                restarts=restarts,
                iterations=iterations,
            ).outcome.collision
        )
        for i in range(count)
    ]


def scenarios(seed: int, steps: int) -> list[tuple]:
    """Collision rates by method and rollouts; nothing is trained."""
    from jaxmodels.security.driving_simulator import Traffic
    from jaxmodels.security.ego_forecasts import ConstantVelocity

    del steps
    rows = []
    for ego, forecaster in (("no forecasts", None), ("forecasts", ConstantVelocity())):
        for iterations in (1, 4, 16):
            for method in ("gradient", "cem", "random"):
                found = _collisions(seed, Traffic(), forecaster, method, 8, iterations, 10)
                rows.append((method, f"{ego}, {8 * iterations} rollouts", float(np.mean(found))))
    return rows


def textures(seed: int, steps: int) -> list[tuple]:
    """Detection rates on the scorer's drive-ups; detectors are trained as the rules say."""
    import yaml

    from train.competition import driving
    from train.competition.roster import train_members

    del steps
    rules = yaml.safe_load(Path("configs/rules/driving.yaml").read_text())
    entry = rules["detectors"][1]
    others = [
        {
            **entry,
            "name": f"white_detector_{2 + i}",
            "set": {**entry["set"], **changes, "seed": 2 + i},
        }
        for i, changes in enumerate(
            ({"model_args.width": 10}, {"model_args.width": 12, "model_args.act": "silu"})
        )
    ]
    four = rules["detectors"] + others
    for member in (*four, *rules["hidden_detector"]):
        settings = member.get("set") or {}
        member["set"] = settings | {"seed": settings.get("seed", 0) + 100 * seed}
    confident = rules["texture_attack"] | {"objective": "hide"}
    diverse = rules["texture_attack"] | {"diversity": 0.5}
    arms = {
        "two detectors": {},
        "two detectors, log-confidences": {"texture_attack": confident},
        "two detectors, diverse scenes": {"texture_attack": diverse},
        "four detectors, diverse scenes": {"texture_attack": diverse, "detectors": four},
    }
    base, rows = driving.base_texture(rules), []
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder)
        (hidden,) = train_members(rules["hidden_detector"], workdir)
        for i, (name, changes) in enumerate(arms.items()):
            own = {**rules, **changes, "seed": seed}
            texture = driving.optimize(own, workdir, base)
            white = driving.white_box_rates(own, workdir, texture)
            found = driving.detection_tables(own, hidden, driving.judged_textures(own, texture))
            for which, table in found.items():
                label = name if which == "attacked" else f"{which} texture"
                if which == "attacked" or i == 0:
                    rows.append((label, "attacked", white[f"white_box_rate/{which}"]))
                    rows.append((label, "hidden", float(table.mean())))
    return rows


def forecasts(seed: int, steps: int) -> list[tuple]:
    """Errors of a trained VectorNet under attack, and collisions of egos that plan by it or not."""
    from jaxmodels.security.driving_simulator import Traffic
    from jaxmodels.security.ego_forecasts import ConstantVelocity
    from train.competition import ego
    from train.competition.roster import train_members

    del steps  # the preset's own: with a few hundred the network is behind constant velocity
    entry = {
        "name": "forecaster",
        "config": "configs/vectornet.py:highway",
        "set": {"seed": seed, "checkpoint.every": 0},
    }
    with tempfile.TemporaryDirectory() as folder:
        (member,) = train_members([entry], Path(folder))
    numbers = member.numbers
    rows = [
        ("DE@3s", "VectorNet", numbers["DE@3s"]),
        ("DE@3s", "constant velocity", numbers["constant_velocity_DE@3s"]),
    ]
    network = ego.network_forecaster(member)
    methods = ("gradient", "cem", "random")
    searched = {"scenes": 24, "methods": methods, "restarts": 8, "iterations": 20}
    attacked = ego.attack_forecasts({"seed": seed, "trajectory_attack": searched}, network, member)
    for name, value in attacked.items():
        error, _, how = name.removeprefix("forecast_").partition("/")
        rows.append((f"{error.upper()}, {how}", "VectorNet", value))
    for name, forecaster in (
        ("ego without forecasts", None),
        ("constant velocity", ConstantVelocity()),
        ("VectorNet", network),
    ):
        found = _collisions(seed, Traffic(), forecaster, "gradient", 8, 8, 5)
        rows.append(("collisions, gradient, 64 rollouts", name, float(np.mean(found))))
    return rows


CLAIMS = {
    "transfer": transfer,
    "patches": patches,
    "margins": margins,
    "new_identities": new_identities,
    "scenarios": scenarios,
    "textures": textures,
    "forecasts": forecasts,
    "attribution": attribution,
    "detection": detection,
}
AUGMENTED = ("transfer", "patches")


def report() -> Path:
    """`results/security_claims.md` from the rows: mean and range over seeds."""
    rows = runs.read(RUNS)
    blocks = []
    for claim in (*CLAIMS, *(f"{name}_augmented" for name in AUGMENTED)):
        own = [r for r in rows if r["claim"] == claim]
        if not own:
            continue
        seeds = sorted({int(r["seed"]) for r in own})
        places = list(dict.fromkeys(r["on"] for r in own))
        table = []
        for what in dict.fromkeys(r["what"] for r in own):
            cells = []
            for place in places:
                values = [float(r["value"]) for r in own if (r["what"], r["on"]) == (what, place)]
                spread = f" ({min(values):.2f}-{max(values):.2f})" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.3f}{spread}" if values else "-")
            table.append([what, *cells])
        title = f"## {claim.capitalize().replace('_', ' ')}, seeds {', '.join(map(str, seeds))}"
        blocks.append(f"{title}\n\n{markdown(['', *places], table)}")
    path = RESULTS / "security_claims.md"
    path.write_text(
        "# Attacks of the security tracks\n\n"
        f"`python -m benchmarks.security_claims`, written on {machine()}; {versions()}. Mean "
        "(range) over seeds; transfer: shares of images that were classified rightly before; "
        "displacement errors in meters.\n\n" + "\n".join(blocks)
    )
    return path


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("claim", choices=CLAIMS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=300, help="training steps of every network")
    parser.add_argument("--augment", action="store_true", help="noise and affine maps in training")
    given = parser.parse_args()
    if given.augment and given.claim not in AUGMENTED:
        parser.error(f"--augment is of {' and '.join(AUGMENTED)}")
    run, claim = CLAIMS[given.claim], given.claim
    if given.augment:
        run, claim = functools.partial(run, augment=True), f"{claim}_augmented"
    from train.process import prepare_process

    prepare_process()
    done = {(r["claim"], int(r["seed"])) for r in runs.read(RUNS)}
    for seed in given.seeds:
        if (claim, seed) not in done:
            rows = run(seed, given.steps)
            for row in rows:
                print(seed, *row)
            named = (zip(COLUMNS, (claim, seed, *r[:2], f"{r[2]:.4f}")) for r in rows)
            runs.append(RUNS, *map(dict, named))
    report()


if __name__ == "__main__":
    main()
