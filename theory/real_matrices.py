"""Small real matrices bundled with scikit-learn, scikit-image and networkx, scaled to norm 1."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class RealMatrix(NamedTuple):
    """A matrix [out, in] with spectral norm 1 and the task it is used for.

    data: X [in, N] and Y [out, N] of a regression, whose matrix is the least-squares solution.
    """

    name: str
    matrix: np.ndarray
    task: str  # reconstruction, completion, symmetric or regression
    data: dict[str, np.ndarray] = {}


def _standardized(array: np.ndarray) -> np.ndarray:
    return (array - array.mean(axis=0)) / array.std(axis=0)


def _digits() -> np.ndarray:
    from sklearn.datasets import load_digits

    pixels = load_digits().data
    pixels = pixels - pixels.mean(axis=0)
    return pixels.T @ pixels


def _wine() -> np.ndarray:
    from sklearn.datasets import load_wine

    return _standardized(load_wine().data)


def _breast_cancer() -> np.ndarray:
    from sklearn.datasets import load_breast_cancer

    return _standardized(load_breast_cancer().data)


def _camera() -> np.ndarray:
    from skimage.data import camera

    image = camera().astype(np.float64)
    size = image.shape[0] // 64
    return image.reshape(64, size, 64, size).mean(axis=(1, 3)) / 255.0


def _karate() -> np.ndarray:
    import networkx

    return networkx.to_numpy_array(networkx.karate_club_graph(), weight=None)


def _les_miserables() -> np.ndarray:
    import networkx

    return networkx.to_numpy_array(networkx.les_miserables_graph(), weight=None)


def _regression(inputs: np.ndarray, outputs: np.ndarray) -> dict[str, np.ndarray]:
    """X [in, N] and Y [out, N] from standardized columns, Y scaled so that Y X^+ has norm 1."""
    X, Y = _standardized(inputs).T, _standardized(outputs).T
    return {"X": X, "Y": Y / np.linalg.norm(Y @ np.linalg.pinv(X), 2)}


def _wine_classes() -> dict[str, np.ndarray]:
    from sklearn.datasets import load_wine

    wine = load_wine()
    return _regression(wine.data, np.eye(3)[wine.target])


def _breast_cancer_worst() -> dict[str, np.ndarray]:
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer().data  # ten means, their ten errors, ten worst values
    return _regression(data[:, :20], data[:, 20:])


MATRICES = {
    "digits": (_digits, "reconstruction"),
    "wine": (_wine, "completion"),
    "breast_cancer": (_breast_cancer, "completion"),
    "camera": (_camera, "completion"),
    "wine_classes": (_wine_classes, "regression"),
    "breast_cancer_worst": (_breast_cancer_worst, "regression"),
    "karate": (_karate, "symmetric"),
    "les_miserables": (_les_miserables, "symmetric"),
}


def load(name: str) -> RealMatrix:
    """A bundled matrix by name; ValueError lists the names."""
    if name not in MATRICES:
        raise ValueError(f"names: unknown matrix {name!r}; choose from {', '.join(MATRICES)}")
    make, task = MATRICES[name]
    if task == "regression":
        data = make()
        return RealMatrix(name, data["Y"] @ np.linalg.pinv(data["X"]), task, data)
    matrix = np.asarray(make(), np.float64)
    return RealMatrix(name, matrix / np.linalg.norm(matrix, 2), task)
