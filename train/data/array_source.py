"""Small data sets held in memory as stacked arrays: one row a dictionary."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import tensorflow_datasets as tfds


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """A random-access sequence of examples over arrays that share their first axis.

    Attributes:
      arrays: name -> [N, ...].
    """

    arrays: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {name: array[index] for name, array in self.arrays.items()}


def read_split(builder: tfds.core.DatasetBuilder, split: str) -> dict[str, np.ndarray]:
    """All examples of a prepared split, stacked by name, in the order of their keys in `index`."""
    examples = list(builder.as_data_source(split))
    order = np.argsort([int(example["index"]) for example in examples])
    return {
        name: np.stack([examples[i][name] for i in order])
        for name in examples[0]
        if name != "index"
    }
