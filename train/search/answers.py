"""What both supernet tasks answer with: classes of images, and the data's own baseline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from train.data import pipeline
from train.data.image_folder import images_below


def class_rows(logits: Callable, variables: Any, path, config) -> list[tuple]:
    """Rows (file, class, probability) of the images below `path`, under a header.

    `logits(variables, images)` is pure.
    """
    size = config.eval.batch_size or config.batch_size
    apply = jax.jit(lambda v, x: jax.nn.softmax(logits(v, x)))
    rows: list[tuple] = [("file", "class", "probability")]
    for names, images in images_below(path, config.data, batch_size=size):
        p = np.asarray(apply(variables, images))[: len(names)]
        rows += [(n, int(q.argmax()), float(q.max())) for n, q in zip(names, p)]
    return rows


def baseline_numbers(config) -> dict[str, float]:
    """Accuracy of logistic regression on the data's pixels, where the family offers it."""
    family, _ = pipeline.resolve(config.data)
    value = family.baseline(config.data) if hasattr(family, "baseline") else None
    return {} if value is None else {"logistic_regression": value}
