"""The frozen networks that judge an encoder's pictures: LPIPS, identity, landmarks, mesh.

They are modules without training: their variables travel in the state as plain trees, in
evaluation mode, and their outputs on target images carry no gradient.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.interop import catalog, checkpoint
from jaxmodels.video import face_mesh
from jaxmodels.video.face_mesh import FaceModel, MeshCode
from jaxmodels.video.landmarks import landmark_loss, soft_landmarks
from jaxmodels.vision.ir_se import adaptive_average_pool, embed_faces, identity_loss
from train.naming import ConfigError

MODELS = {
    "lpips": "video.lpips",
    "identity": "vision.ir_se",
    "landmarks": "video.landmarks",
    "mesh": "video.mesh_regressor",
}
# Sizes at which the published networks look at a face.
LANDMARK_SIZE, MESH_SIZE, IMAGE_SIZE = 256, 224, 256
WEIGHTS = {"l2": 1.0, "lpips": 0.8, "identity": 0.1, "landmarks": 1.0, "mesh": 1.0, "w_norm": 0.005}
SYNTHETIC_FACE = (
    "face model: none is given (task_args.face_model_from), the synthetic one stands in (no real "
    "anatomy)"
)


@dataclasses.dataclass(frozen=True)
class Critics:
    """Terms whose weight is not zero, with their networks.

    Attributes:
      weights: {term: weight}, see `WEIGHTS`.
      modules: {term: module}. files: {term: path, or "" where an untrained network will do}.
      face: the mesh model of the mesh term.
      sizes: {"landmarks": S, "mesh": S}, to which faces are resized.
    """

    weights: Mapping[str, float]
    modules: Mapping[str, nn.Module]
    files: Mapping[str, str]
    face: FaceModel | None
    sizes: Mapping[str, int]

    def init(self, rng: jax.Array) -> dict[str, Any]:
        """Untrained variables of every network."""
        found = {}
        for name, module in self.modules.items():
            examples = [jnp.zeros(x.shape, x.dtype) for x in module.example_inputs()]
            found[name] = dict(module.init(jax.random.fold_in(rng, len(found)), *examples))
        return found

    def load(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """The variables with what the files hold in place of the untrained ones.

        Raises FileNotFoundError naming the file and the key that switches its term off.
        """
        loaded = dict(variables)
        for name, module in self.modules.items():
            path = self.files.get(name, "")
            if not path:
                continue
            require(path, f"config.task_args.weights.{name}=0")
            state = read_state(path)
            given, done = catalog.import_state(
                catalog.find(MODELS[name]), module, state, source=os.fspath(path)
            )
            catalog.log_what_was_taken(os.fspath(path), "", done)
            loaded[name] = {
                collection: jax.tree.map(
                    lambda x, like: jnp.asarray(x, like.dtype), given[collection], tree
                )
                for collection, tree in variables[name].items()
            }
        return loaded

    def image_terms(
        self, variables: Mapping[str, Any], y_hat: jax.Array, y: jax.Array
    ) -> dict[str, jax.Array]:
        """Weighted L2, LPIPS and identity terms of images [B, S, S, 3], S at most 256."""
        y = jax.lax.stop_gradient(y)
        terms = {"l2": jnp.square(y_hat - y).mean()}
        if "lpips" in self.modules:
            module = self.modules["lpips"]
            terms["lpips"] = module.apply(variables["lpips"], y_hat, y).mean()
        if "identity" in self.modules:
            module = self.modules["identity"]
            a, b = (embed_faces(module, variables["identity"], x) for x in (y_hat, y))
            terms["identity"] = identity_loss(a, b)
        return {name: self.weights[name] * value for name, value in terms.items()}

    def geometry_terms(
        self, variables: Mapping[str, Any], y_hat: jax.Array, y: jax.Array
    ) -> dict[str, jax.Array]:
        """Weighted landmark and mesh terms of images [B, S, S, 3]."""
        y, terms = jax.lax.stop_gradient(y), {}
        if "landmarks" in self.modules:
            a, b = (self.landmarks(variables, x) for x in (y_hat, y))
            terms["landmarks"] = landmark_loss(a, b, self.sizes["landmarks"] / 4)
        if "mesh" in self.modules:
            a, b = (self.mesh_code(variables, x) for x in (y_hat, y))
            terms["mesh"] = face_mesh.mesh_loss(self.face, a, b)
        return {name: self.weights[name] * value for name, value in terms.items()}

    def measures(
        self, variables: Mapping[str, Any], y_hat: jax.Array, y: jax.Array
    ) -> dict[str, jax.Array]:
        """Distances of every image [B], unweighted: PSNR in dB, LPIPS, identity cosine, landmark
        error in pixels of a 256-pixel image, mesh error, each where its network is there."""
        mse = jnp.square(y_hat - y).mean((1, 2, 3))
        found = {"psnr": 10 * jnp.log10(4 / jnp.maximum(mse, 1e-12))}
        if "lpips" in self.modules:
            found["lpips"] = self.modules["lpips"].apply(variables["lpips"], y_hat, y)
        if "identity" in self.modules:
            module = self.modules["identity"]
            a, b = (embed_faces(module, variables["identity"], x) for x in (y_hat, y))
            found["identity"] = (a * b).sum(-1)
        if "landmarks" in self.modules:
            a, b = (self.landmarks(variables, x) for x in (y_hat, y))
            scale = 4 * LANDMARK_SIZE / self.sizes["landmarks"]
            found["landmark_error"] = jnp.linalg.norm(a - b, axis=-1).mean(-1) * scale
        if "mesh" in self.modules:
            a, b = (self.mesh_code(variables, x) for x in (y_hat, y))
            a, b = (face_mesh.project(face_mesh.pose_face(self.face, m), b.camera) for m in (a, b))
            found["mesh_error"] = jnp.abs(a - b).sum(-1).mean(-1)
        return found

    def landmarks(self, variables: Mapping[str, Any], images: jax.Array) -> jax.Array:
        """[B, K, 2] in heat-map pixels of images in [-1, 1], differentiable."""
        faces = resize((images + 1) / 2, self.sizes["landmarks"])
        return soft_landmarks(self.modules["landmarks"].apply(variables["landmarks"], faces)[-1])

    def mesh_code(self, variables: Mapping[str, Any], images: jax.Array) -> MeshCode:
        """The faces' codes of images in [-1, 1], differentiable."""
        module = self.modules["mesh"]
        faces = resize((images + 1) / 2, self.sizes["mesh"])
        return module.mesh_code(module.apply(variables["mesh"], faces))


def resize(images: jax.Array, size: int) -> jax.Array:
    """Bilinear, [B, S, S, 3] -> [B, size, size, 3]."""
    if images.shape[1] == size:
        return images
    shape = (len(images), size, size, images.shape[3])
    return jax.image.resize(images, shape, "linear")


def pool(images: jax.Array, size: int = IMAGE_SIZE) -> jax.Array:
    """Images averaged down to `size`; smaller ones are left alone."""
    return adaptive_average_pool(images, size) if images.shape[1] > size else images


def require(path: str | os.PathLike, switch: str) -> None:
    """Raise FileNotFoundError that names a missing file and the setting that does without it."""
    for part in parts_of(path):
        if not os.path.exists(part):
            raise FileNotFoundError(f"no file {part!r}; {switch} runs without this term")


def parts_of(path: str | os.PathLike) -> list[str]:
    """One file, or several joined by "+" (LPIPS: trunk and linear maps)."""
    name = os.fspath(path)
    return [name] if os.path.exists(name) else name.split("+")


def read_state(path: str) -> dict[str, np.ndarray]:
    """Tensors of one file, or of several joined by "+"."""
    state: dict[str, np.ndarray] = {}
    for part in parts_of(path):
        state |= checkpoint.read(part).tensors
    return state


def load_face_model(
    path: str, switch: str, expression: int = face_mesh.EXPRESSION, say=print
) -> FaceModel:
    """The mesh model of an npz file (FLAME's arrays by their own names), or the synthetic one, of
    which `say` is told."""
    if not path:
        say(SYNTHETIC_FACE)
        return face_mesh.synthetic_face_model(expression=expression)
    require(path, switch)
    if not str(path).endswith(".npz"):
        raise ConfigError(
            f"config.task_args.face_model_from: {path} is no npz file; a pickle (FLAME's "
            "generic_model.pkl) is never run here: save its arrays, and those of the landmark "
            "embedding, by their own names with numpy.savez"
        )
    arrays = checkpoint.read_npz(path)
    try:
        return face_mesh.face_model_from_arrays(arrays, expression=expression, landmarks=arrays)
    except ValueError as error:
        raise ConfigError(f"config.task_args.face_model_from: {path}: {error}") from None


def build_critics(args: dict[str, Any], say=print, provided: tuple[str, ...] = ()) -> Critics:
    """Critics of `task_args`, whose keys `weights`, `networks` ({term: arguments}), `files`
    ({term: path}), `sizes`, `face_model_from` and `untrained_critics` are taken out.

    `provided` are terms whose networks the caller loads itself.

    Raises ConfigError for unknown terms, and for terms without weights unless `untrained_critics`
    allows them.
    """
    weights = {**WEIGHTS, **dict(args.pop("weights", {}))}
    networks, files = dict(args.pop("networks", {})), dict(args.pop("files", {}))
    sizes = {"landmarks": LANDMARK_SIZE, "mesh": MESH_SIZE, **dict(args.pop("sizes", {}))}
    face_from, untrained = args.pop("face_model_from", ""), args.pop("untrained_critics", False)
    for given, known, key in (
        (weights, WEIGHTS, "weights"),
        (networks, MODELS, "networks"),
        (files, MODELS, "files"),
    ):
        wrong = sorted(set(given) - set(known))
        if wrong:
            raise ConfigError(f"config.task_args.{key}: no term {wrong[0]!r}; {', '.join(known)}")
    modules = {}
    for name, model in MODELS.items():
        if not weights[name]:
            continue
        if not files.get(name) and not untrained and name not in provided:
            raise ConfigError(
                f"config.task_args.files.{name}: the {name} term needs weights of {model}; set "
                f"config.task_args.weights.{name}=0 to train without it"
            )
        modules[name] = catalog.find(model).build(**dict(networks.get(name, {})))
    face = None
    if "mesh" in modules:
        face = load_face_model(face_from, "config.task_args.weights.mesh=0", say=say)
    return Critics(weights, modules, files, face, sizes)
