"""Face recognition track: transfer attacks from white-box models to victims that nobody sees."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.security import attacks, margin_losses
from jaxmodels.security.ensembles import average_losses, stack_outputs
from jaxmodels.security.face_track import (
    face_mask,
    face_score,
    minimal_perturbation,
    successes,
)
from jaxmodels.security.input_transforms import (
    compose,
    cutout,
    diverse_input,
    physical_jitter,
)
from jaxmodels.security.patches import total_variation
from jaxmodels.security.perturbations import check_mask, feature_distance
from train.competition.roster import Member, train_members
from train.competition.submissions import check_budget, read_head, read_images, write_head
from train.data import pipeline
from train.naming import ConfigError
from train.tasks.face_recognition import HEAD

EOT_DRAWS = 8  # views a step of a printed patch


def embedder(member: Member):
    """`faces [B, H, W, 3] of 0..255 -> unit embeddings`, the normalization inside."""
    variables = dict(member.variables)
    variables["params"] = {k: v for k, v in variables["params"].items() if k != HEAD}
    model = member.task.model

    def embed(pixels):
        return margin_losses.unit(model.apply(variables, (pixels / 255 - 0.5) / 0.5))

    return embed


def read_pairs(rules: dict[str, Any], member: Member) -> tuple[np.ndarray, np.ndarray]:
    """(attackers [N, H, W, 3], references [N, H, W, 3]) of 0..255, from the evaluation split.

    Impersonation pairs are of two identities, dodging pairs of one.
    """
    family, options = pipeline.resolve(member.config.data)
    examples = family.source(family.SPLITS[1], options)
    labels = np.asarray([int(examples[i]["label"]) for i in range(len(examples))])
    rows, same = family.pairs(labels, 2 * rules["pairs"], rules["seed"])
    rows = rows[same == (rules["goal"] == "dodging")][: rules["pairs"]]
    images = [np.stack([np.float32(examples[i]["image"]) for i in column]) for column in rows.T]
    return images[0], images[1]


def attempt(rules: dict[str, Any], workdir: Path, folder: Path) -> dict[str, float]:
    """Train, attack the white-box models by every listed recipe, submit the last one's images."""
    surrogates = train_members(rules["surrogates"], workdir)
    victims = train_members(rules["victims"], workdir)
    attackers, references = read_pairs(rules, surrogates[0])
    numbers: dict[str, float] = {}
    images = attackers
    for recipe in rules["recipes"]:
        images = run_recipe(rules, recipe, surrogates, attackers, references)
        cosines, thresholds = judge(victims, np.rint(images), references)
        won = successes(cosines, thresholds, rules["goal"])
        numbers[f"asr/{recipe['name']}"] = float(won.mean())
    clean, thresholds = judge(victims, attackers, references)
    numbers["asr/none"] = float(successes(clean, thresholds, rules["goal"]).mean())
    numbers |= minimal_perturbations(rules, surrogates, attackers, references)
    write_head(folder, "face", goal=rules["goal"])
    for old in folder.glob("*.npy"):
        old.unlink()
    for name, image in zip(file_names(len(images)), images):
        np.save(folder / name, np.rint(image).astype(np.float32))
    return {**score(rules, workdir, folder), **numbers}


def file_names(count: int) -> list[str]:
    """Names of the images of a submission."""
    return [f"{i:04d}.npy" for i in range(count)]


def run_recipe(rules, recipe, surrogates, attackers, references) -> np.ndarray:
    """Attacked images [N, H, W, 3] of 0..255, within the rules' budget."""
    used = [m for m in surrogates if m.name in recipe.get("models", [m.name])]
    check_sizes(used, attackers.shape[1:])
    embedders = [embedder(m) for m in used]
    goal, budget = rules["goal"], rules["budget"]
    # Towards the victim, or away from another photo of oneself.
    targets = tuple(fn(jnp.asarray(references)) for fn in embedders)
    options: dict[str, Any] = {}
    transforms = {"di": diverse_input, "cim": cutout}
    chosen = [
        functools.partial(transforms[name], probability=1.0, rate=0.85)
        if name == "di"
        else transforms[name]
        for name in recipe.get("transforms", [])
    ]
    draws = recipe.get("draws", 1)
    if budget["kind"] == "patch" and recipe.get("eot", True):
        # A printed patch is seen from other sides and in other light.
        chosen.insert(0, functools.partial(physical_jitter, high=255.0))
        draws = recipe.get("draws", EOT_DRAWS)
    if chosen:
        options["transform"] = compose(*chosen)
    steps, step = recipe["steps"], None
    eps, mask, start = budget.get("eps", 255.0), None, None
    if budget["kind"] == "patch":
        mask = face_mask(budget["mask"], attackers.shape[1:3])
        check_mask(mask, budget["area"])
        eps, step = 255.0, recipe.get("step", 2.0)
        # Any content may stand in the mask: begin from gray.
        start = attackers * (1 - mask) + 127.0 * mask
    elif goal == "dodging":
        # From the very same image there is no gradient.
        noise = np.random.default_rng(rules["seed"]).uniform(-1, 1, attackers.shape)
        start = np.clip(attackers + noise, 0, 255)
    apply, loss = stack_outputs(embedders), average_losses(feature_distance)
    if recipe.get("smoothness"):
        apply, loss = smooth_patches(apply, loss, mask, recipe["smoothness"], goal)
    norm = budget.get("norm", "linf")
    unit = float(np.sqrt(np.prod(attackers.shape[1:]))) if norm == "l2" else 1.0
    cfg = attacks.make(
        "ti" if recipe.get("kernel") else "mi" if recipe.get("momentum", 1.0) else "bim",
        eps=eps * unit,
        step_size=(step or 1.5 * eps / steps) * unit,
        steps=steps,
        norm=norm,
        targeted=goal == "impersonation",
        draws=draws,
        loss=loss,
        high=255.0,
        mask=mask,
        **({"kernel_size": recipe["kernel"]} if recipe.get("kernel") else {}),
        **options,
    )
    size = rules["batch"]

    @jax.jit
    def run(key, x, begin, targets):
        return attacks.gradient_attack(key, apply, x, targets, cfg, start=begin)

    results = []
    begin = attackers if start is None else start.astype(np.float32)
    for i in range(0, len(attackers), size):
        key = jax.random.fold_in(jax.random.key(rules["seed"]), i)
        rows = slice(i, i + size)
        part = tuple(t[rows] for t in targets)
        results.append(np.asarray(run(key, attackers[rows], begin[rows], part)))
    return np.concatenate(results)


def minimal_perturbations(rules, surrogates, attackers, references) -> dict[str, float]:
    """Median of the smallest budgets with which MI succeeds on white-box models, by bisection.

    `minimal` of the rules: `models`, `largest` budget, `steps` of an attack, `rounds` of bisection.
    Pairs on which the largest fails count as the largest. Nothing without `minimal`, or with a
    patch, whose content has no budget.
    """
    given, goal, norm = rules.get("minimal"), rules["goal"], rules["budget"].get("norm", "linf")
    if not given or rules["budget"]["kind"] == "patch":
        return {}
    unit = float(np.sqrt(np.prod(attackers.shape[1:]))) if norm == "l2" else 1.0
    noise = np.random.default_rng(rules["seed"]).uniform(-1, 1, attackers.shape)
    begin = np.clip(attackers + noise * (goal == "dodging"), 0, 255).astype(np.float32)
    numbers = {}
    for member in surrogates:
        if member.name not in given["models"]:
            continue
        embed, threshold = embedder(member), member.numbers["threshold"]
        targets = embed(jnp.asarray(references))

        @jax.jit
        def attack(eps, embed=embed, targets=targets):
            cfg = attacks.make(
                "mi",
                eps=eps * unit,
                step_size=1.5 * eps / given["steps"] * unit,
                steps=given["steps"],
                norm=norm,
                targeted=goal == "impersonation",
                loss=feature_distance,
                high=255.0,
            )
            key = jax.random.key(rules["seed"])
            return attacks.gradient_attack(key, embed, attackers, targets, cfg, start=begin)

        @jax.jit
        def won(images, embed=embed, targets=targets, threshold=threshold):
            cosines = (embed(images) * targets).sum(-1)
            return cosines > threshold if goal == "impersonation" else cosines < threshold

        found = minimal_perturbation(
            attack, won, len(attackers), given["largest"], given.get("rounds", 8)
        )
        median = np.median(np.minimum(np.asarray(found), given["largest"]))
        numbers[f"median_minimal_{norm}/{member.name}"] = float(median)
    return numbers


def smooth_patches(apply, loss, mask, weight: float, goal: str):
    """The same attack with the total variation of what the mask shows as a penalty."""
    shown = 1.0 if mask is None else mask
    variation = jax.vmap(total_variation)
    sign = 1.0 if goal == "impersonation" else -1.0  # the loss falls, or rises

    def both(x):
        return apply(x), variation(x / 255 * shown)

    return both, lambda outputs, y: loss(outputs[0], y) + sign * weight * outputs[1]


def check_sizes(members: list[Member], shape: tuple[int, ...]) -> None:
    """Refuse networks that were trained on faces of another size than the pairs'."""
    for member in members:
        own = pipeline.element_spec(member.config.data)["image"].shape
        if own != shape:
            raise ConfigError(f"{member.name} takes faces of {own}, the pairs are of {shape}")


def judge(victims, images, references) -> tuple[np.ndarray, np.ndarray]:
    """Cosines [victims, N] and each victim's verification threshold; no gradients are taken."""
    check_sizes(victims, images.shape[1:])
    cosines = []
    for member in victims:
        embed = jax.jit(embedder(member))
        a, b = np.asarray(embed(jnp.asarray(images))), np.asarray(embed(jnp.asarray(references)))
        cosines.append((a * b).sum(-1))
    return np.stack(cosines), np.asarray([m.numbers["threshold"] for m in victims])


def score(rules: dict[str, Any], workdir: Path, folder: Path) -> dict[str, float]:
    """The competition's score of a submission folder."""
    read_head(folder, "face", rules.get("deadline"))
    victims = train_members(rules["victims"], workdir)
    attackers, references = read_pairs(rules, victims[0])
    names = file_names(len(attackers))
    images = read_images(folder, names, attackers.shape[1:])
    budget, goal = rules["budget"], rules["goal"]
    mask = None
    if budget["kind"] == "patch":
        mask = face_mask(budget["mask"], attackers.shape[1:3])
    distances = check_budget(
        names,
        images,
        attackers,
        eps=budget.get("eps"),
        mask=mask,
        norm=budget.get("norm", "linf"),
        must_change=goal == "dodging",
    )
    cosines, thresholds = judge(victims, images, references)
    clean, _ = judge(victims, attackers, references)
    # What an unchanged image achieves is nobody's success.
    won = successes(cosines, thresholds, goal) & ~successes(clean, thresholds, goal)
    limit = budget["area"] if mask is not None else budget["eps"]
    return {
        "score": face_score(won, distances, limit, rules["distance_weight"]),
        "attack_success_rate": float(won.mean()),
        "mean_cosine": float(cosines.mean()),
        "mean_distance": float(distances.mean()),
    }
