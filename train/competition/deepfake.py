"""Deepfake track: which tool made a fake, in an open world. A submission is a cluster an image."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels.security.attribution import open_world_metrics
from train.competition.roster import member_config, train_members
from train.competition.submissions import read_clusters, read_head, write_head
from train.data import pipeline
from train.naming import ConfigError


def attempt(rules: dict[str, Any], workdir: Path, folder: Path) -> dict[str, float]:
    """Train the networks, average their probabilities, submit the most probable clusters."""
    for entry in rules["members"]:
        classes = member_config(entry, workdir).model_args.classes
        if classes > rules["clusters"]:
            raise ConfigError(
                f"rules: {entry['name']} tells {classes} classes apart, clusters allows "
                f"{rules['clusters']}"
            )
    members = train_members(rules["members"], workdir)
    first = members[0]
    probs = None
    for member in members:
        own, _, _ = member.task.features(member.variables, member.config)
        # Novel clusters of two networks bear other numbers: bring them into the first one's order.
        own = own if probs is None else align_clusters(probs, own, first.task.known)
        probs = own if probs is None else probs + own
    clusters = probs.argmax(-1)
    write_head(folder, "deepfake")
    names, _ = truth(rules, first.config)
    write_images(workdir / "images", names, first.config)
    with open(folder / "clusters.csv", "w", newline="", encoding="utf-8") as file:
        rows = sorted(zip(names, map(int, clusters), strict=True))
        csv.writer(file).writerows([("image", "cluster"), *rows])
    numbers = score(rules, workdir, folder)
    baseline = first.numbers.get("kmeans_novel_nmi", float("nan"))
    return {**numbers, "kmeans_novel_nmi": baseline}


def align_clusters(reference: np.ndarray, probs: np.ndarray, known: int) -> np.ndarray:
    """Columns of probs [N, K] from `known` on, permuted to agree best with `reference` [N, K]."""
    from scipy.optimize import linear_sum_assignment

    agreement = reference[:, known:].T @ probs[:, known:]
    _, columns = linear_sum_assignment(agreement, maximize=True)
    return np.concatenate([probs[:, :known], probs[:, known:][:, columns]], 1)


def truth(rules: dict[str, Any], config) -> tuple[list[str], np.ndarray]:
    """Names and true tools of the track's images: the evaluation split.

    Numbers are dealt out by the rules' seed: in the split's own order they would tell the tool.
    """
    labels = []
    for batch in _batches(config):
        labels.append(batch["label"][batch["mask"] > 0])
    labels = np.concatenate(labels)
    numbers = np.random.default_rng(rules["seed"]).permutation(len(labels))
    return [f"{i:05d}" for i in numbers], labels


def _batches(config):
    split = pipeline.eval_split(config.data)
    return pipeline.eval_batches(config.data, split, batch_size=config.eval.batch_size)


def write_images(folder: Path, names: list[str], config) -> None:
    """What is to be attributed, as `NAME.png`: all that a team gets to see."""
    from PIL import Image

    _, options = pipeline.resolve(config.data)
    mean, std = (np.asarray(options[key], np.float32) for key in ("mean", "std"))
    folder.mkdir(parents=True, exist_ok=True)
    left = iter(names)
    for batch in _batches(config):
        for image in batch["image"][batch["mask"] > 0]:
            pixels = np.rint(255 * (image * std + mean)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{next(left)}.png")


def score(rules: dict[str, Any], workdir: Path, folder: Path) -> dict[str, float]:
    """100 NMI over all images, and the other metrics of the paper."""
    read_head(folder, "deepfake", rules.get("deadline"))
    config = member_config(rules["members"][0], workdir)
    names, labels = truth(rules, config)
    clusters = read_clusters(folder, names, most=rules["clusters"])
    numbers = open_world_metrics(clusters, labels, config.task_args.known)
    return {"score": 100 * numbers[rules["metric"]], **numbers}
