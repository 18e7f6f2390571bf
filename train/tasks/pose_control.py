"""Training the pose and expression control network, the encoder frozen (the third stage).

Pairs (s, t) of one clip; the low codes of s, moved from s's mesh code to t's, should be those of t.
Batches are `key` and `frame` [B, S, S, 3] (codes by the frozen encoder, mesh codes by the frozen
regressor), or `z`, `source`, `target` (clips that a generator makes, whose codes are known).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.video import face_mesh
from jaxmodels.video.face_mesh import FaceModel, MeshCode
from jaxmodels.video.pose_control import PoseControl, PoseEditor, apply_control
from jaxmodels.video.video_encoder import VideoEncoder, join_codes
from train.building import build_model, build_named
from train.checkpoints import load_params
from train.naming import ConfigError, nearest
from train.tasks.mesh_regression import Drive, build_drive, driven_frames, split_control
from train.tasks.video_inversion import encoder_variables, load_generator
from train.video_critics import Critics, build_critics, load_face_model, pool

WEIGHTS = {"codes": 1.0, "cycle": 0.5, "image": 1.0, "source_identity": 0.1}


@dataclasses.dataclass(frozen=True)
class PoseControlTraining:
    """L = codes |w' - w_low(t)|^2 + image (terms of G(w', w_high) against frame t, landmarks and
    mesh among them) + cycle |back(w') - w_low(s)|^2 + source_identity (1 - cos to frame s).

    Squared code errors are means over layers and width. Without an identity network its term is
    left out.

    Attributes:
      model: the control network. generator, encoder, critics: frozen. face: the mesh model.
      drive: codes of made-up clips. parts: weights of the four terms.
    """

    model: PoseControl
    generator: nn.Module
    critics: Critics
    face: FaceModel
    drive: Drive
    encoder: VideoEncoder | None = None
    generator_from: str = ""
    encoder_from: str = ""
    regressor_from: str = ""
    parts: Mapping[str, float] = dataclasses.field(default_factory=lambda: dict(WEIGHTS))

    frozen = ("generator", "critics", "encoder")

    def init(self, rng: jax.Array, batch) -> tuple[Any, Any]:
        """The control network's parameters; `generator`, `critics`, perhaps `encoder`."""
        del batch
        keys = jax.random.split(rng, 4)
        examples = [jnp.zeros(x.shape, x.dtype) for x in self.model.example_inputs()]
        extra = {
            "generator": dict(self.generator.init(keys[1], jnp.zeros((1, self.generator.z_dim)))),
            "critics": self.critics.init(keys[2]),
        }
        if self.encoder is not None:
            size = self.encoder.image_size
            extra["encoder"] = dict(self.encoder.init(keys[3], jnp.zeros((1, size, size, 3))))
        return self.model.init(keys[0], *examples)["params"], extra

    def start(self, params, extra):
        """The frozen networks from their files and runs."""
        extra = dict(extra)
        if self.generator_from:
            extra["generator"] = load_generator(
                self.generator_from, self.generator, extra["generator"]
            )
        extra["critics"] = dict(self.critics.load(extra["critics"]))
        if self.encoder_from:
            tree = load_params(self.encoder_from, ema=True)
            extra["encoder"] = _like(encoder_variables(tree), extra["encoder"], "encoder_from")
        if self.regressor_from:
            tree = load_params(self.regressor_from, ema=True)
            own = {k: tree[k] for k in ("params", "batch_stats")}
            extra["critics"]["mesh"] = _like(own, extra["critics"]["mesh"], "regressor_from")
        return params, extra

    # What a batch says.

    def pairs(self, extra, batch) -> dict[str, Any]:
        """Low codes, mesh codes and frames of source and target, and the shared high codes."""
        if "z" in batch:
            frames, codes = driven_frames(
                self.generator, extra["generator"], self.drive, batch["z"], batch["source"],
                batch["target"],
            )  # fmt: skip
            low = [c[:, : self.model.n_low] for c in codes]
            high = codes[0][:, self.model.n_low :]
            mesh = [split_control(batch[k], self.face.shape_size) for k in ("source", "target")]
            source, target = jnp.split(frames, 2)
        else:
            source, target = batch["key"], batch["frame"]
            own, split = extra["encoder"], self.model.n_low
            whole = self.encoder.apply(own, source, method="encode_key")
            both = jnp.concatenate([source, target])
            low = jnp.split(self.encoder.apply(own, both, method="encode_frame"), 2)
            high = whole[:, split:]
            mesh = [self.critics.mesh_code(extra["critics"], x) for x in (source, target)]
            source, target = pool(source), pool(target)
        found = {"low": low, "high": high, "mesh": mesh, "source": source, "target": target}
        return jax.lax.stop_gradient(found)

    def moved(self, params, low, source: MeshCode, target: MeshCode) -> jax.Array:
        """Low codes moved from one face to another."""
        return apply_control(self.model, {"params": params}, self.face, low, source, target)

    def loss(self, params, extra, batch, rng):
        """The weighted terms, each logged under its name."""
        del rng
        frozen = jax.lax.stop_gradient(extra)
        pair = self.pairs(frozen, batch)
        (low_s, low_t), (mesh_s, mesh_t) = pair["low"], pair["mesh"]
        moved = self.moved(params, low_s, mesh_s, mesh_t)
        terms = {"codes": jnp.square(moved - low_t).mean()}
        back = self.moved(params, moved, mesh_t, mesh_s)
        terms["cycle"] = jnp.square(back - low_s).mean()
        if self.parts["image"] or self.parts["source_identity"]:
            codes = join_codes(moved, pair["high"])
            image = pool(self.generator.apply(frozen["generator"], codes, method="synthesize"))
            critics = frozen["critics"]
            found = self.critics.image_terms(critics, image, pair["target"])
            found |= self.critics.geometry_terms(critics, image, pair["target"])
            terms["image"] = sum(found.values())
            if "identity" in self.critics.modules:
                own = self.critics.image_terms(critics, image, pair["source"])["identity"]
                terms["source_identity"] = own / self.critics.weights["identity"]
        total = sum(self.parts[name] * value for name, value in terms.items())
        return total, (extra, terms)

    def evaluate(self, variables, batch):
        """Squared code error beside that of leaving the codes alone."""
        pair = self.pairs(variables, batch)
        (low_s, low_t), mesh = pair["low"], pair["mesh"]
        moved = self.moved(variables["params"], low_s, *mesh)
        mask = batch["mask"]

        def error(low):
            return jnp.square(low - low_t).mean((1, 2)) * mask

        return {
            "codes": error(moved).sum(),
            "codes_unmoved": error(low_s).sum(),
            "relative_codes|codes_unmoved": error(moved).sum(),
            "count": mask.sum(),
        }

    def report(self, variables, sums, config):
        """Correlation of the yaw asked for and the yaw measured again, on made-up clips."""
        del sums
        if not config.data.name.startswith("latent_walks"):
            return {}
        asked, measured = self.yaw_study(jax.device_put(variables), config)
        numbers = {}
        for name, values in measured.items():
            numbers[f"yaw_correlation_{name}"] = float(np.corrcoef(asked, values)[0, 1])
            numbers[f"yaw_mean_error_{name}"] = float(np.abs(asked - values).mean())
        return numbers

    def yaw_study(self, variables, config) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(yaw asked for, {how: yaw measured}) in degrees, of the evaluation split.

        `codes` reads the mesh code off the moved codes by least squares; `image`, where a mesh
        regressor was trained, off the picture. Both then pose the mesh and measure its vertices.
        """
        from train.data import pipeline

        editor = PoseEditor(self.model, {"params": variables["params"]}, self.face)
        average = variables["generator"]["buffers"]["mapping"]["w_avg"]
        matrix = self.drive.matrix().reshape(-1, self.drive.n_low * self.drive.w_dim)
        offset, spread = self.drive.scales()

        def yaw(mesh):
            return face_mesh.yaw_of(face_mesh.pose_face(self.face, mesh), self.face)

        @jax.jit
        def one(variables, batch, angle):
            _, (codes,) = driven_frames(
                self.generator, variables["generator"], self.drive, batch["z"], batch["source"]
            )
            mesh = split_control(batch["source"], self.face.shape_size)
            moved = editor.set_pose(codes, mesh, yaw=angle, pitch=0.0, roll=0.0)
            found = (moved[:, : self.drive.n_low] - average).reshape(len(moved), -1)
            control = jnp.linalg.lstsq(matrix.T, found.T)[0].T * spread + offset
            neutral = split_control(control, self.face.shape_size)
            measured = {"codes": yaw(_rigid(neutral))}
            if self.regressor_from or "mesh" in self.critics.modules:
                image = self.generator.apply(variables["generator"], moved, method="synthesize")
                code = self.critics.mesh_code(variables["critics"], pool(image))
                measured["image"] = yaw(_rigid(code))
            return measured

        asked, rows = [], []
        rng = np.random.default_rng(0)
        size = config.eval.batch_size or config.batch_size
        for batch in pipeline.eval_batches(config.data, "test", batch_size=size):
            angle = rng.uniform(-25, 25, size).astype(np.float32)
            found = one(variables, {k: batch[k] for k in ("z", "source")}, angle)
            keep = batch["mask"] > 0
            asked.append(angle[keep])
            rows.append({k: np.asarray(v)[keep] for k, v in found.items()})
        return np.concatenate(asked), {k: np.concatenate([r[k] for r in rows]) for k in rows[0]}


def _rigid(code: MeshCode) -> MeshCode:
    """The head's turn alone: expressions and the jaw move vertices that yaw does not."""
    pose = code.pose.at[:, 3:].set(0)
    return code._replace(
        pose=pose, expression=jnp.zeros_like(code.expression), shape=jnp.zeros_like(code.shape)
    )


def _like(given, like, key: str):
    """Arrays of a run in the place of freshly initialized ones of the same shapes."""

    def choose(path, leaf):
        node = given
        for part in path:
            if part.key not in node:
                raise ConfigError(f"config.task_args.{key}: the run has no {part.key}")
            node = node[part.key]
        if np.shape(node) != leaf.shape:
            raise ConfigError(
                f"config.task_args.{key}: {path[-1].key} is {np.shape(node)}, wanted {leaf.shape}"
            )
        return jnp.asarray(node, leaf.dtype)

    return jax.tree_util.tree_map_with_path(choose, like)


def from_config(config) -> PoseControlTraining:
    """`task_args`: `generator_args`, `encoder_args` (empty: codes come with the data), the keys of
    `build_critics`, `drive_seed`, `drive_std`, `parts`, and the fields that name runs and files."""
    args = dict(config.task_args)
    generator = build_named(
        config,
        "video.stylegan2",
        dict(args.pop("generator_args", {})),
        "config.task_args.generator_args",
    )
    encoder_args = dict(args.pop("encoder_args", {}))
    encoder = None
    if encoder_args:
        encoder = build_named(
            config, "video.video_encoder", encoder_args, "config.task_args.encoder_args"
        )
    expression = config.data.options.get("expression", face_mesh.EXPRESSION)
    face = load_face_model(
        args.get("face_model_from", ""), "config.task='video_inversion'", expression
    )
    if not face.lmk_faces_idx.size:
        raise ConfigError(
            f"config.task_args.face_model_from: {args['face_model_from']} has no landmarks "
            "(full_lmk_faces_idx, full_lmk_bary_coords of the landmark embedding)"
        )
    provided = ()
    if args.get("regressor_from"):
        args["weights"] = {**dict(args.get("weights", {}))}
        args["weights"]["mesh"] = args["weights"].get("mesh", 1.0) or 1.0
        provided = ("mesh",)
    # The face model was spoken of above.
    critics = build_critics(args, say=lambda text: None, provided=provided)
    parts = {**WEIGHTS, **dict(args.pop("parts", {}))}
    for name in parts:
        if name not in WEIGHTS:
            raise ConfigError(f"config.task_args.parts: no term {name!r}; {nearest(name, WEIGHTS)}")
    drive = build_drive(config, args, generator)
    model = build_model(config)
    if not config.data.name.startswith("latent_walks"):
        if encoder is None or "mesh" not in critics.modules:
            raise ConfigError(
                "config.task_args: clips of images need encoder_args and the mesh term (its "
                "network gives the mesh codes)"
            )
        if encoder.split != model.n_low:
            raise ConfigError(
                f"config.model_args.n_low: {model.n_low}, the encoder's is {encoder.split}"
            )
    return PoseControlTraining(
        model=model,
        generator=generator,
        critics=critics,
        face=face,
        drive=drive,
        encoder=encoder,
        parts=parts,
        **args,
    )
