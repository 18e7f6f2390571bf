"""Blend skinning, landmarks, projection and alignment: rigid where rigid, smooth at zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.video import face_alignment, face_mesh
from jaxmodels.video.face_mesh import MeshCode

FACE = face_mesh.synthetic_face_model(shape=10, expression=5)
skin = jax.jit(lambda betas, pose: face_mesh.linear_blend_skinning(FACE, betas, pose))


def code(batch=1, **parts):
    zero = MeshCode(
        jnp.zeros((batch, 10)), jnp.zeros((batch, 5)), jnp.zeros((batch, 6)), jnp.ones((batch, 3))
    )
    return zero._replace(**{k: jnp.asarray(v, jnp.float32) for k, v in parts.items()})


def test_zero_pose_returns_template_and_blendshapes():
    betas = jax.random.normal(jax.random.key(0), (2, 15))
    skinned = skin(betas, jnp.zeros((2, 15)))
    wanted = FACE.v_template + jnp.einsum("bl,vkl->bvk", betas, FACE.shapedirs)
    np.testing.assert_allclose(skinned.vertices, wanted, atol=1e-6)


def test_a_global_rotation_turns_all_vertices_rigidly_about_the_first_joint():
    betas = jax.random.normal(jax.random.key(0), (1, 15))
    pose = jnp.zeros((1, 15)).at[0, :3].set(jnp.asarray([0.3, -0.7, 0.2]))
    rest, turned = (
        skin(jnp.tile(betas, (2, 1)), p) for p in (jnp.zeros((2, 15)), jnp.tile(pose, (2, 1)))
    )
    rotation = face_mesh.rodrigues(pose[:, :3])[0]
    center = rest.joints[:, :1]
    np.testing.assert_allclose(
        turned.vertices, (rest.vertices - center) @ rotation.T + center, atol=1e-5
    )


def test_gradients_at_zero_rotation_are_finite():
    def total(pose):
        return jnp.square(face_mesh.pose_face(FACE, code()._replace(pose=pose))).sum()

    assert jnp.isfinite(jax.jit(jax.grad(total))(jnp.zeros((1, 6)))).all()


def test_yaw_is_measured_back_from_vertices_and_angles_go_there_and_back():
    yaw, pitch, roll = jnp.array([-30.0, 0, 12]), jnp.array([4.0, 0, -9]), jnp.array([0.0, 0, 5])
    turned = face_mesh.euler_to_axis_angle(yaw, pitch, roll)
    for found, wanted in zip(face_mesh.axis_angle_to_euler(turned), (yaw, pitch, roll)):
        np.testing.assert_allclose(found, wanted, atol=1e-3)
    pose = jnp.concatenate([turned, jnp.zeros((3, 3))], -1)
    run = jax.jit(lambda c: face_mesh.yaw_of(face_mesh.pose_face(FACE, c), FACE))
    np.testing.assert_allclose(run(code(3, pose=pose)), yaw, atol=0.5)


def test_projection_translates_before_it_scales_and_flips_two_axes():
    point = jnp.asarray([[[1.0, 2.0, 3.0]]])
    camera = jnp.asarray([[2.0, 0.5, -1.0]])
    np.testing.assert_allclose(face_mesh.project(point, camera), [[[3.0, -2.0, -6.0]]])
    np.testing.assert_allclose(face_mesh.to_pixels(jnp.asarray([-1.0, 0, 1]), 224), [0, 112, 224])


def test_contour_rows_follow_the_rounded_yaw():
    def row(yaw):
        turn = face_mesh.rodrigues(jnp.asarray([[[0.0, np.radians(yaw), 0]]]))
        rotations = jnp.broadcast_to(jnp.eye(3), (1, 5, 3, 3)).at[:, 0].set(turn[:, 0])
        return int(face_mesh.contour_index(rotations)[0])

    assert [row(y) for y in (0, 10.4, 39.4, 80)] == [0, 10, 39, 39]
    assert [row(y) for y in (-1, -39, -60)] == [40, 78, 78]


def test_mesh_loss_is_zero_for_equal_codes_and_does_not_train_the_target():
    a, b = code(pose=0.1 * np.ones((1, 6))), code()
    run = jax.jit(jax.value_and_grad(lambda c, t: face_mesh.mesh_loss(FACE, c, t), (0, 1)))
    assert float(run(a, a)[0]) == 0
    loss, (own, target) = run(a, b)
    assert float(loss) > 0 and float(jnp.abs(own.pose).max()) > 0
    assert all((g == 0).all() for g in target)


def flame_arrays(v=12):
    rng = np.random.default_rng(0)
    return {
        "v_template": rng.normal(size=(v, 3)),
        "shapedirs": rng.normal(size=(v, 3, 400)),
        "posedirs": rng.normal(size=(v, 3, 36)),
        "J_regressor": rng.normal(size=(5, v)),
        "weights": rng.normal(size=(v, 5)),
        "f": rng.integers(0, v, (8, 3)),
        "kintree_table": np.array([[4294967295, 0, 1, 1, 1], [0, 1, 2, 3, 4]]),
    }


def test_contours_that_follow_the_yaw_replace_the_fixed_ones_and_68_landmarks_stay():
    rng = np.random.default_rng(1)
    fixed = {
        "full_lmk_faces_idx": rng.integers(0, 8, (1, 68)),
        "full_lmk_bary_coords": rng.random((1, 68, 3)),
    }
    contours = {
        "dynamic_lmk_faces_idx": rng.integers(0, 8, (79, 17)),
        "dynamic_lmk_bary_coords": rng.random((79, 17, 3)),
    }
    inner = {
        "static_lmk_faces_idx": fixed["full_lmk_faces_idx"][0, 17:],
        "static_lmk_bary_coords": fixed["full_lmk_bary_coords"][0, 17:],
    }
    pose = jnp.zeros((2, 6))
    found = []
    for given in (fixed, fixed | contours, fixed | contours | inner, contours | inner):
        model = face_mesh.face_model_from_arrays(flame_arrays(), landmarks=given)
        vertices = jnp.broadcast_to(model.v_template, (2, 12, 3))
        found.append(face_mesh.face_landmarks(model, vertices, pose))
    assert {x.shape for x in found} == {(2, 68, 3)}
    for x in found[1:]:
        np.testing.assert_array_equal(x[:, 17:], found[0][:, 17:])
        np.testing.assert_array_equal(x, found[1])
    assert np.abs(found[1][:, :17] - found[0][:, :17]).max() > 1e-3


def test_flame_arrays_become_a_model_and_missing_ones_are_named():
    arrays, v = flame_arrays(), 12
    model = face_mesh.face_model_from_arrays(arrays)
    assert model.parents == (-1, 0, 1, 1, 1) and model.shapedirs.shape == (v, 3, 150)
    np.testing.assert_allclose(model.shapedirs[..., 100], arrays["shapedirs"][..., 300], rtol=1e-6)
    del arrays["weights"]
    with pytest.raises(ValueError, match="lacks weights"):
        face_mesh.face_model_from_arrays(arrays)


def landmarks(frames=4):
    points = np.full((frames, 68, 2), 100.0)
    points[:, 36:42], points[:, 42:48] = [80, 90], [120, 90]
    points[:, 48], points[:, 54] = [88, 130], [112, 130]
    return points + np.arange(frames)[:, None, None]


def test_ffhq_crop_is_upright_square_and_centered_on_the_face():
    quads = face_alignment.ffhq_quads(landmarks())
    # Eyes 40 apart, mouth 40 below: x = (40 + 40, 0) direction, length max(80, 72).
    np.testing.assert_allclose(quads.x[0], [80, 0])
    np.testing.assert_allclose(quads.y[0], [0, 80])
    np.testing.assert_allclose(quads.center[0], [100, 94])
    np.testing.assert_allclose(quads.corners()[0][0], [20, 14])


def test_a_crop_pasted_back_leaves_the_frame_as_it_was():
    rows, columns = np.mgrid[:64, :64]
    frame = jnp.asarray(np.stack([rows, columns, rows + columns], -1) / 64, jnp.float32)
    quad = face_alignment.Quad(
        np.array([30.0, 34.0]), np.array([15.0, 4.0]), np.array([-4.0, 15.0])
    )
    crop = face_alignment.crop_quad(frame, quad, 64)
    pasted = face_alignment.paste_quad(frame, crop, quad)
    assert float(jnp.abs(pasted - frame).max()) < 0.02
    changed = face_alignment.paste_quad(frame, crop + 1, quad)
    assert float(jnp.abs(changed - frame)[30:36, 28:32].min()) > 0.9
    assert jnp.array_equal(changed[:8], frame[:8])


def test_a_large_crop_is_averaged_into_a_small_place():
    crop = np.random.default_rng(0).uniform(-1, 1, (64, 64, 3)).astype(np.float32)
    place = face_alignment.Quad(*(np.array(a, float) for a in ([16, 16], [8, 0], [0, 8])))
    pasted = np.asarray(face_alignment.paste_quad(jnp.zeros((32, 32, 3)), crop, place, 0.0))
    # Each pixel shows 4x4 of the crop, not the nearest few: a sixteenth of the variance.
    np.testing.assert_allclose(pasted[10:22, 10:22].std(), crop.std() / 4, rtol=0.2)
    assert (pasted[:6] == 0).all()


def test_smoothing_steadies_centers_and_keeps_still_clips():
    shaky = landmarks(20) + np.random.default_rng(0).normal(0, 2, (20, 1, 2))
    quads = face_alignment.ffhq_quads(shaky)
    smooth = face_alignment.smooth_quads(quads, 2.0, 2.0)
    assert (
        np.abs(np.diff(smooth.center, 2, axis=0)).mean()
        < 0.5 * np.abs(np.diff(quads.center, 2, axis=0)).mean()
    )
    still = face_alignment.ffhq_quads(np.tile(landmarks(1), (5, 1, 1)))
    np.testing.assert_allclose(face_alignment.smooth_quads(still, 2.0, 2.0).center, still.center)


def test_landmarks_with_gaps_or_of_another_length_name_the_frame():
    with pytest.raises(ValueError, match="3 sets of landmarks for 5 frames; frame 3"):
        face_alignment.check_landmarks(landmarks(3), 5)
    broken = landmarks(4)
    broken[2, 10] = np.nan
    with pytest.raises(ValueError, match="frame 2 are not finite"):
        face_alignment.check_landmarks(broken, 4)
