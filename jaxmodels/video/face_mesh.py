"""A face as a posed mesh: blendshapes, linear blend skinning, landmarks and projection.

FLAME (T. Li et al., "Learning a model of facial shape and expression from 4D scans", 2017) as
YadiraF/DECA@f5b6b42 (`decalib/models/lbs.py`, `FLAME.py`, `decalib/utils/util.py`) computes it. Its
basis is licensed and not part of this project: `FaceModel` holds whatever basis it is given, and
`synthetic_face_model` makes one from nothing, for tests and for runs without the file.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

PARENTS = (-1, 0, 1, 1, 1)  # global, neck, jaw, left eye, right eye
GLOBAL, NECK, JAW = 0, 1, 2
SHAPE, TEXTURE, EXPRESSION, POSE, CAMERA, LIGHT = 100, 50, 50, 6, 3, 27
LARGEST_YAW = 39  # degrees, beyond which the contour stays as it is


class FaceModel(NamedTuple):
    """A basis. V vertices, J joints, B shape and expression directions, K landmarks.

    Attributes:
      v_template: [V, 3]. shapedirs: [V, 3, B], shape before expression.
      posedirs: [9 (J - 1), 3 V]. J_regressor: [J, V]. lbs_weights: [V, J].
      faces: [F, 3] int. lmk_faces_idx, lmk_bary: [K], [K, 3], landmarks on triangles.
      dynamic_lmk_faces_idx, dynamic_lmk_bary: [79, C], [79, C, 3], contour landmarks for yaws
        0 .. 39 and then -1 .. -39 degrees; None where there are none.
      parents: joint tree.
      shape_size: how many of the B directions are shape.
    """

    v_template: jax.Array
    shapedirs: jax.Array
    posedirs: jax.Array
    J_regressor: jax.Array
    lbs_weights: jax.Array
    faces: jax.Array
    lmk_faces_idx: jax.Array
    lmk_bary: jax.Array
    dynamic_lmk_faces_idx: jax.Array | None = None
    dynamic_lmk_bary: jax.Array | None = None
    parents: tuple[int, ...] = PARENTS
    shape_size: int = SHAPE

    @property
    def expression_size(self) -> int:
        """Directions after the shape's."""
        return self.shapedirs.shape[-1] - self.shape_size


class MeshCode(NamedTuple):
    """A face: shape [B, S], expression [B, E], pose [B, 6] (global and jaw rotation vectors in
    radians), camera [B, 3] (scale, x, y)."""

    shape: jax.Array
    expression: jax.Array
    pose: jax.Array
    camera: jax.Array


class Skinned(NamedTuple):
    """vertices [B, V, 3] and posed joints [B, J, 3]."""

    vertices: jax.Array
    joints: jax.Array


def rodrigues(rotation: jax.Array) -> jax.Array:
    """Rotation matrices [..., 3, 3] of axis-angle vectors [..., 3] in radians.

    The angle is |r + 1e-8|, as in the official code: rotations of zero have finite gradients.
    """
    shifted = rotation + 1e-8
    angle = jnp.sqrt(jnp.square(shifted).sum(-1, keepdims=True))
    axis = rotation / angle
    x, y, z = (axis[..., i] for i in range(3))
    zero = jnp.zeros_like(x)
    rows = [zero, -z, y, z, zero, -x, -y, x, zero]
    k = jnp.stack(rows, -1).reshape(*rotation.shape[:-1], 3, 3)
    sine, cosine = jnp.sin(angle)[..., None], jnp.cos(angle)[..., None]
    return jnp.eye(3, dtype=rotation.dtype) + sine * k + (1 - cosine) * _product(k, k)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def linear_blend_skinning(model: FaceModel, betas: jax.Array, pose: jax.Array) -> Skinned:
    """Posed vertices and joints.

    betas [B, shape and expression], pose [B, 3 J] axis-angle in radians, parents before children.
    v = sum_j w_j A_j [v_shaped + pose blend; 1], A_j the chain with the rest joint removed.
    """
    batch, joints = len(betas), len(model.parents)
    if pose.shape[-1] != 3 * joints:
        raise ValueError(
            f"pose must be [batch, {3 * joints}] for {joints} joints, got {pose.shape}"
        )
    if betas.shape[-1] != model.shapedirs.shape[-1]:
        raise ValueError(f"betas must be [batch, {model.shapedirs.shape[-1]}], got {betas.shape}")
    shaped = model.v_template + jnp.einsum("bl,vkl->bvk", betas, model.shapedirs)
    rest = jnp.einsum("bvk,jv->bjk", shaped, model.J_regressor)
    rotations = rodrigues(pose.reshape(batch, joints, 3))
    feature = (rotations[:, 1:] - jnp.eye(3, dtype=pose.dtype)).reshape(batch, -1)
    posed = shaped + (feature @ model.posedirs).reshape(batch, -1, 3)
    transforms, places = rigid_chain(rotations, rest, model.parents)
    blended = jnp.einsum("vj,bjmn->bvmn", model.lbs_weights, transforms)
    vertices = jnp.einsum("bvmn,bvn->bvm", blended[..., :3], posed) + blended[..., 3]
    return Skinned(vertices, places)


def rigid_chain(
    rotations: jax.Array, rest: jax.Array, parents: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """(A [B, J, 3, 4] relative to the rest pose, posed joints [B, J, 3]) down a kinematic tree."""
    turned, moved = [], []
    for joint, parent in enumerate(int(p) for p in parents):
        if joint == 0:
            turned.append(rotations[:, 0])
            moved.append(rest[:, 0])
            continue
        if not 0 <= parent < joint:
            raise ValueError(f"parents: joint {joint} has parent {parent}; parents come first")
        offset = rest[:, joint] - rest[:, parent]
        turned.append(_product(turned[parent], rotations[:, joint]))
        moved.append(_product(turned[parent], offset[..., None])[..., 0] + moved[parent])
    turn, place = jnp.stack(turned, 1), jnp.stack(moved, 1)
    shift = place - _product(turn, rest[..., None])[..., 0]
    return jnp.concatenate([turn, shift[..., None]], -1), place


def vertices_to_landmarks(
    vertices: jax.Array, faces: jax.Array, faces_idx: jax.Array, bary: jax.Array
) -> jax.Array:
    """Points on triangles, [B, K, 3]; faces_idx [K] or [B, K], bary [K, 3] or [B, K, 3]."""
    batch = len(vertices)
    faces_idx = jnp.broadcast_to(faces_idx, (batch, faces_idx.shape[-1]))
    bary = jnp.broadcast_to(bary, (batch, *bary.shape[-2:]))
    corners = jnp.asarray(faces)[faces_idx]
    points = jax.vmap(lambda v, c: v[c])(vertices, corners)
    return jnp.einsum("bkci,bkc->bki", points, bary)


def full_pose(pose: jax.Array, joints: int = 5) -> jax.Array:
    """(global 3, jaw 3) [B, 6] -> [B, 3 J]: neck and eyes at rest."""
    zero = jnp.zeros((len(pose), 3 * joints - 9), pose.dtype)
    neck = jnp.zeros((len(pose), 3), pose.dtype)
    return jnp.concatenate([pose[:, :3], neck, pose[:, 3:6], zero], -1)


def pose_face(model: FaceModel, code: MeshCode) -> jax.Array:
    """Vertices [B, V, 3] of a code, not projected."""
    betas = jnp.concatenate([code.shape, code.expression], -1)
    return linear_blend_skinning(model, betas, full_pose(code.pose, len(model.parents))).vertices


def contour_index(rotations: jax.Array, chain: tuple[int, ...] = (NECK, GLOBAL)) -> jax.Array:
    """Row [B] of the dynamic landmark tables for the head's yaw, from rotations [B, J, 3, 3].

    `chain` are the neck's joints, innermost first. The yaw is rounded to degrees and held within
    +-39; rows 40 .. 78 belong to negative ones.
    """
    relative = jnp.eye(3, dtype=rotations.dtype)
    for joint in chain:
        relative = _product(rotations[:, joint], relative)
    sine = jnp.sqrt(jnp.square(relative[:, 0, 0]) + jnp.square(relative[:, 1, 0]))
    yaw = jnp.degrees(jnp.arctan2(-relative[:, 2, 0], sine))
    yaw = jnp.round(jnp.minimum(yaw, LARGEST_YAW)).astype(jnp.int32)
    negative = jnp.where(yaw < -LARGEST_YAW, 2 * LARGEST_YAW, LARGEST_YAW - yaw)
    return jnp.where(yaw < 0, negative, yaw)


def face_landmarks(model: FaceModel, vertices: jax.Array, pose: jax.Array) -> jax.Array:
    """Landmarks [B, C + K, 3]: the contour of the head's yaw, where the basis has one, then the
    static ones. pose [B, 6]."""
    static = vertices_to_landmarks(vertices, model.faces, model.lmk_faces_idx, model.lmk_bary)
    if model.dynamic_lmk_faces_idx is None:
        return static
    full = full_pose(pose, len(model.parents))
    row = contour_index(rodrigues(full.reshape(len(pose), -1, 3)))
    contour = vertices_to_landmarks(
        vertices, model.faces, model.dynamic_lmk_faces_idx[row], model.dynamic_lmk_bary[row]
    )
    return jnp.concatenate([contour, static], 1)


def project(points: jax.Array, camera: jax.Array) -> jax.Array:
    """Orthographic projection s (x + t_x, y + t_y, z), then y and z negated: image axes.

    points [B, K, 3], camera [B, 3] (s, t_x, t_y) -> [B, K, 3] in [-1, 1] where the face is seen.
    """
    moved = points.at[..., :2].add(camera[:, None, 1:])
    scaled = moved * camera[:, None, :1]
    return scaled * jnp.asarray([1, -1, -1], points.dtype)


def to_pixels(points: jax.Array, size: int) -> jax.Array:
    """[-1, 1] -> pixels of a square image: p size / 2 + size / 2."""
    return points * (size / 2) + size / 2


def projected_mesh(model: FaceModel, code: MeshCode) -> jax.Array:
    """Projected vertices [B, V, 3] of a code."""
    return project(pose_face(model, code), code.camera)


def projected_landmarks(model: FaceModel, code: MeshCode) -> jax.Array:
    """Projected landmarks [B, K, 3] of a code."""
    return project(face_landmarks(model, pose_face(model, code), code.pose), code.camera)


def mesh_loss(
    model: FaceModel, code: MeshCode, target: MeshCode, parameter_weight: float = 0.1
) -> jax.Array:
    """mean over vertices of |V(y_hat) - V(y)|_1 under the target's camera, plus 0.1 times the same
    on expression and pose. The target carries no gradient."""
    target = jax.lax.stop_gradient(target)
    camera = target.camera
    found = project(pose_face(model, code), camera)
    wanted = project(pose_face(model, target), camera)
    vertices = jnp.abs(found - wanted).sum(-1).mean()
    parameters = jnp.abs(code.expression - target.expression).mean()
    parameters += jnp.abs(code.pose - target.pose).mean()
    return vertices + parameter_weight * parameters


def yaw_of(vertices: jax.Array, model: FaceModel) -> jax.Array:
    """Yaw [B] in degrees re-measured from vertices [B, V, 3]: that of the rotation that best takes
    the template to them (Kabsch)."""
    centered = vertices - vertices.mean(1, keepdims=True)
    template = model.v_template - model.v_template.mean(0)
    u, _, vt = jnp.linalg.svd(jnp.einsum("bvi,vj->bij", centered, template))
    flip = jnp.sign(jnp.linalg.det(u @ vt))
    u = u.at[:, :, 2].multiply(flip[:, None])
    rotation = u @ vt
    flat = jnp.sqrt(jnp.square(rotation[:, 0, 0]) + jnp.square(rotation[:, 1, 0]))
    return jnp.degrees(jnp.arctan2(-rotation[:, 2, 0], flat))


def euler_to_axis_angle(yaw: jax.Array, pitch: jax.Array, roll: jax.Array) -> jax.Array:
    """Rotation vectors [..., 3] in radians of Rz(roll) Ry(yaw) Rx(pitch), angles in degrees."""
    yaw, pitch, roll = jnp.broadcast_arrays(
        *(jnp.radians(jnp.asarray(a)) for a in (yaw, pitch, roll))
    )
    # By half-angle quaternions: no matrix logarithm, smooth at zero.
    (cy, sy), (cp, sp), (cr, sr) = ((jnp.cos(a / 2), jnp.sin(a / 2)) for a in (yaw, pitch, roll))
    w = cr * cy * cp + sr * sy * sp
    vector = jnp.stack(
        [cr * cy * sp - sr * sy * cp, cr * sy * cp + sr * cy * sp, sr * cy * cp - cr * sy * sp], -1
    )
    length = jnp.linalg.norm(vector, axis=-1, keepdims=True)
    angle = 2 * jnp.arctan2(length, w[..., None])
    return vector * jnp.where(length > 1e-12, angle / jnp.maximum(length, 1e-12), 2.0)


def axis_angle_to_euler(rotation: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(yaw, pitch, roll) in degrees of rotation vectors [..., 3], inverse of the above."""
    r = rodrigues(rotation)
    flat = jnp.sqrt(jnp.square(r[..., 0, 0]) + jnp.square(r[..., 1, 0]))
    yaw = jnp.arctan2(-r[..., 2, 0], flat)
    pitch = jnp.arctan2(r[..., 2, 1], r[..., 2, 2])
    roll = jnp.arctan2(r[..., 1, 0], r[..., 0, 0])
    return tuple(jnp.degrees(a) for a in (yaw, pitch, roll))


def synthetic_face_model(
    vertices: int = 600,
    shape: int = SHAPE,
    expression: int = EXPRESSION,
    landmarks: int = 68,
    seed: int = 0,
) -> FaceModel:
    """A basis made from nothing: an ellipsoid with smooth random directions and skinning.

    The grid has about `vertices` points (500 to 1000); directions are orthonormal over the mesh and
    decay with their number; the jaw moves the lower front. It resembles no person and no licensed
    data; runs on it must say so.
    """
    rng = np.random.default_rng(seed)
    columns = max(int(np.sqrt(vertices * 1.5)), 8)
    rows = max(vertices // columns, 6)
    # Poles left out, so that no triangle is degenerate.
    latitude = np.linspace(0.08, 0.92, rows) * np.pi
    longitude = np.arange(columns) / columns * 2 * np.pi
    theta, phi = (a.ravel() for a in np.meshgrid(latitude, longitude, indexing="ij"))
    unit = np.stack([np.sin(theta) * np.sin(phi), np.cos(theta), np.sin(theta) * np.cos(phi)], -1)
    template = unit * np.array([0.072, 0.1, 0.085])
    # A nose: without one a yawed ellipsoid looks like itself.
    template[:, 2] += (
        0.02 * np.exp(-((unit[:, 0] / 0.2) ** 2 + (unit[:, 1] / 0.3) ** 2)) * (unit[:, 2] > 0)
    )
    count = len(template)
    index = np.arange(rows * columns).reshape(rows, columns)
    right = np.roll(index, -1, 1)
    upper, lower = index[:-1].ravel(), index[1:].ravel()
    upper_right, lower_right = right[:-1].ravel(), right[1:].ravel()
    faces = np.concatenate(
        [np.stack([upper, lower, upper_right], -1), np.stack([upper_right, lower, lower_right], -1)]
    )

    def smooth(number: int) -> np.ndarray:
        """Orthonormal smooth fields [V, 3, number]: random waves over the sphere."""
        waves = np.stack(
            [
                np.cos(unit @ rng.normal(0, 2.5, 3) + rng.uniform(0, 2 * np.pi))
                for _ in range(3 * number)
            ]
        ).reshape(number, 3, count)
        q, _ = np.linalg.qr(waves.transpose(2, 1, 0).reshape(count * 3, number))
        decay = 1 / (1 + np.arange(number)) ** 0.7
        return q.reshape(count, 3, number) * (0.12 * decay)

    shape_directions, expression_directions = smooth(shape), smooth(expression)
    # Expressions live on the front, most of all around the mouth.
    front = 1 / (1 + np.exp(-8 * unit[:, 2])) * np.exp(-((unit[:, 1] + 0.3) ** 2) / 0.3)
    expression_directions = expression_directions * front[:, None, None]
    jaw = 1 / (1 + np.exp(12 * (unit[:, 1] + 0.35))) * (1 / (1 + np.exp(-8 * unit[:, 2])))
    weights = np.zeros((count, 5))
    weights[:, JAW] = 0.9 * jaw
    for joint, side in ((3, -1), (4, 1)):
        center = np.array([0.35 * side, 0.25, 0.9])
        weights[:, joint] = 0.2 * np.exp(-np.square(unit - center).sum(-1) / 0.02)
    weights[:, NECK] = 1 - weights.sum(1)
    centers = [
        (0, -0.9, -0.3),
        (0, -0.7, -0.3),
        (0, -0.3, 0.1),
        (-0.35, 0.25, 0.7),
        (0.35, 0.25, 0.7),
    ]
    regressor = np.exp(-np.square(unit[None] - np.asarray(centers)[:, None]).sum(-1) / 0.1)
    regressor /= regressor.sum(1, keepdims=True)
    posedirs = rng.normal(0, 1e-4, (36, 3 * count))
    # Landmarks on the visible side, spread by farthest points from the nose on.
    middle = unit[faces].mean(1)
    seen = np.flatnonzero(middle[:, 2] > 0.15)
    chosen = [seen[middle[seen, 2].argmax()]]
    for _ in range(landmarks - 1):
        distance = np.linalg.norm(middle[seen, None] - middle[chosen][None], axis=-1).min(1)
        chosen.append(seen[distance.argmax()])
    bary = rng.dirichlet((4, 4, 4), landmarks)
    directions = np.concatenate([shape_directions, expression_directions], -1)
    as_floats = dict(
        v_template=template,
        shapedirs=directions,
        posedirs=posedirs,
        J_regressor=regressor,
        lbs_weights=weights,
        lmk_bary=bary,
    )
    return FaceModel(
        **{k: jnp.asarray(v, jnp.float32) for k, v in as_floats.items()},
        faces=jnp.asarray(faces, jnp.int32),
        lmk_faces_idx=jnp.asarray(chosen, jnp.int32),
        shape_size=shape,
    )


def face_model_from_arrays(
    arrays: dict[str, np.ndarray],
    *,
    shape: int = SHAPE,
    expression: int = EXPRESSION,
    landmarks: dict[str, np.ndarray] | None = None,
) -> FaceModel:
    """A `FaceModel` of a FLAME file's arrays (`v_template`, `shapedirs`, `posedirs`,
    `J_regressor`, `weights`, `f`, `kintree_table`) and of its landmark embedding.

    FLAME's 400 directions are 300 of shape and 100 of expression; the first `shape` and the first
    `expression` are taken. `landmarks` has `full_lmk_faces_idx` and `full_lmk_bary_coords`, and
    `dynamic_lmk_faces_idx`, `dynamic_lmk_bary_coords` where contours follow the yaw.

    Raises ValueError for arrays that are absent or do not fit each other.
    """
    needed = ("v_template", "shapedirs", "posedirs", "J_regressor", "weights", "f", "kintree_table")
    absent = [name for name in needed if name not in arrays]
    if absent:
        raise ValueError(f"the face model lacks {', '.join(absent)}; it has {sorted(arrays)}")
    get = {k: np.asarray(arrays[k]) for k in needed}
    _check_sizes(get, expression)
    all_directions = get["shapedirs"]
    first = (
        300
        if all_directions.shape[-1] >= 300 + expression
        else all_directions.shape[-1] - expression
    )
    directions = np.concatenate(
        [all_directions[..., :shape], all_directions[..., first : first + expression]], -1
    )
    posedirs = get["posedirs"]
    posedirs = posedirs.reshape(-1, posedirs.shape[-1]).T if posedirs.ndim == 3 else posedirs
    parents = get["kintree_table"][0].astype(np.int64)
    embedding = {} if landmarks is None else dict(landmarks)
    dynamic = embedding.get("dynamic_lmk_faces_idx")
    alone = dynamic is not None and "static_lmk_faces_idx" in embedding
    kind = "static" if alone else "full"
    triangles = np.asarray(embedding.get(f"{kind}_lmk_faces_idx", np.zeros(0, int))).reshape(-1)
    bary = np.asarray(embedding.get(f"{kind}_lmk_bary_coords", np.zeros((0, 3)))).reshape(-1, 3)
    if dynamic is not None and not alone:
        contour = np.shape(dynamic)[-1]
        triangles, bary = triangles[contour:], bary[contour:]
    floats = {
        "v_template": get["v_template"],
        "shapedirs": directions,
        "posedirs": posedirs,
        "J_regressor": get["J_regressor"],
        "lbs_weights": get["weights"],
        "lmk_bary": bary,
    }
    return FaceModel(
        **{k: jnp.asarray(v, jnp.float32) for k, v in floats.items()},
        faces=jnp.asarray(get["f"].astype(np.int64), jnp.int32),
        lmk_faces_idx=jnp.asarray(triangles, jnp.int32),
        dynamic_lmk_faces_idx=None if dynamic is None else jnp.asarray(dynamic, jnp.int32),
        dynamic_lmk_bary=None
        if dynamic is None
        else jnp.asarray(embedding["dynamic_lmk_bary_coords"], jnp.float32),
        parents=(-1, *(int(p) for p in parents[1:])),
        shape_size=shape,
    )


def _check_sizes(arrays: dict[str, np.ndarray], expression: int) -> None:
    """Refuse arrays whose vertices, joints or directions are not of one model."""
    points = (*arrays["v_template"].shape, 0)[0]
    joints = (0, *arrays["kintree_table"].shape)[-1]
    pose = 9 * (joints - 1)
    wanted = {
        "v_template": ((points, 3),),
        "shapedirs": ((points, 3, None),),
        "posedirs": ((points, 3, pose), (pose, 3 * points)),
        "J_regressor": ((joints, points),),
        "weights": ((points, joints),),
        "f": ((None, 3),),
        "kintree_table": ((2, joints),),
    }
    for name, shapes in wanted.items():
        shape = arrays[name].shape
        if not any(
            len(shape) == len(s) and all(b in (None, a) for a, b in zip(shape, s)) for s in shapes
        ):
            text = " or ".join(str(list(s)).replace("None", "any") for s in shapes)
            raise ValueError(f"the face model's {name} is {list(shape)}, wanted {text}")
    if arrays["shapedirs"].shape[-1] <= expression:
        raise ValueError(
            f"the face model's shapedirs hold {arrays['shapedirs'].shape[-1]} directions, too few "
            f"for {expression} of expression"
        )
    if len(arrays["f"]) and not 0 <= arrays["f"].min() <= arrays["f"].max() < points:
        raise ValueError(f"the face model's f names vertices beyond its {points}")
