"""Published formats: Planetoid's pickles (tkipf/gcn) and GraphSAINT's arrays.

Planetoid: `ind.NAME.{x,tx,allx,y,ty,ally,graph,test.index}`; GraphSAINT: `adj_full.npz`,
`adj_train.npz` (CSR), `role.json`, `class_map.json`, `feats.npy`.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels.graphs.graph import symmetrize
from train.data.node_graph_sets import PLANETOID, NodeGraph

# What the Planetoid files are made of; everything else in a pickle is refused.
_ALLOWED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
    ("scipy.sparse.csr", "csr_matrix"),
    ("scipy.sparse._csr", "csr_matrix"),
    ("collections", "defaultdict"),
    ("__builtin__", "list"),
    ("builtins", "list"),
    ("_codecs", "encode"),
}


def read(name: str, path: str | None, allow_pickle: bool) -> NodeGraph:
    """The data set `name` below the folder `path`.

    Raises:
      ValueError: no path; Planetoid's pickles without `allow_pickle`, or with anything in them but
        arrays, sparse matrices and dictionaries. FileNotFoundError: the first file that is missing.
    """
    if not path:
        raise ValueError(f"data.options.path: name the folder that holds {name}'s files")
    folder = Path(path)
    if name in PLANETOID:
        if not allow_pickle:
            raise ValueError(
                f"{folder}: Planetoid's files are pickles, which can hide code; set "
                "data.options.allow_pickle=True for files that you trust"
            )
        return read_planetoid(folder, name)
    return read_graphsaint(folder)


def _file(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"data.options.path: no file {path}")
    return path


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise ValueError(f"a Planetoid file asks for {module}.{name}, which no such file needs")
        return super().find_class(module, name)


def read_planetoid(folder: Path, name: str) -> NodeGraph:
    """Cora, Citeseer or Pubmed with the fixed split: x trains, the next 500 validate.

    Test nodes that have no row in `tx` (Citeseer's isolated ones) get zero features and label -1.
    """

    def part(kind):
        with open(_file(folder, f"ind.{name}.{kind}"), "rb") as file:
            return _Unpickler(file, encoding="latin1").load()

    x, tx, allx, y, ty, ally, neighbors = map(part, ("x tx allx y ty ally graph").split())
    index = np.loadtxt(_file(folder, f"ind.{name}.test.index"), dtype=np.int64, ndmin=1)
    n = max(int(index.max()) + 1, allx.shape[0])
    features = np.zeros((n, allx.shape[1]), np.float32)
    features[: allx.shape[0]] = _dense(allx)
    features[index] = _dense(tx)
    classes = ally.shape[1]
    hot = np.zeros((n, classes), np.int64)
    hot[: len(ally)], hot[index] = ally, ty
    labels = np.where(hot.any(1), hot.argmax(1), -1).astype(np.int32)
    train, valid, test = (np.zeros(n, bool) for _ in range(3))
    train[: len(y)], valid[len(y) : len(y) + 500], test[index] = True, True, True
    pairs = [(u, v) for u, others in neighbors.items() for v in others]
    edges = symmetrize(np.array(pairs, np.int64).reshape(-1, 2).T)[0]
    edges = edges[:, edges[0] != edges[1]]
    features /= np.maximum(features.sum(1, keepdims=True), 1e-12)
    del x
    return NodeGraph(edges, features, labels, train, valid, test & (labels >= 0), classes)


def _dense(matrix) -> np.ndarray:
    return np.asarray(matrix.todense() if hasattr(matrix, "todense") else matrix, np.float32)


def read_graphsaint(folder: Path) -> NodeGraph:
    """A GraphSAINT folder; features standardized with the training nodes' statistics."""

    def csr(name):
        with np.load(_file(folder, name), allow_pickle=False) as stored:
            indptr, indices = stored["indptr"], stored["indices"].astype(np.int64)
            kept = stored["data"] != 0
        receivers = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
        return np.stack([indices[kept], receivers[kept]])

    edges, train_edges = csr("adj_full.npz"), csr("adj_train.npz")
    role = json.loads(_file(folder, "role.json").read_text())
    classes = json.loads(_file(folder, "class_map.json").read_text())
    x = np.load(_file(folder, "feats.npy"), allow_pickle=False).astype(np.float32)
    n = len(x)
    masks = []
    for part in ("tr", "va", "te"):
        mask = np.zeros(n, bool)
        mask[np.asarray(role[part], np.int64)] = True
        masks.append(mask)
    first = next(iter(classes.values()))
    if isinstance(first, list):
        labels = np.zeros((n, len(first)), np.float32)
        for node, values in classes.items():
            labels[int(node)] = values
        count = len(first)
    else:
        labels = np.full(n, -1, np.int32)
        for node, value in classes.items():
            labels[int(node)] = value
        labels -= max(labels[labels >= 0].min(), 0)
        count = int(labels.max()) + 1
    mean, std = x[masks[0]].mean(0), x[masks[0]].std(0)
    x = (x - mean) / np.where(std > 0, std, 1)
    return NodeGraph(edges, x, labels, *masks, count, train_edges)
