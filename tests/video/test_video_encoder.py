"""High codes are reused bit for bit, and control moves nothing when nothing is asked."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmodels
from jaxmodels.cost import count_cost
from jaxmodels.interop import catalog
from jaxmodels.video import face_mesh, latent_editing, query_decoder, video_encoder, vit
from jaxmodels.video.face_mesh import MeshCode
from jaxmodels.video.pose_control import PoseControl, PoseEditor
from jaxmodels.video.stylegan2 import MappingNetwork
from jaxmodels.video.video_encoder import VideoEncoder
from tests.restoration import tiny

TINY = dict(
    image_size=16, patch_size=4, hidden_size=16, num_layers=2, num_heads=2, stylegan_size=32,
    w_dim=8,
)  # fmt: skip


@functools.cache
def encoder(**changes):
    module = VideoEncoder(**{**TINY, **changes})
    variables = module.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    # Heads start at zero; random ones make codes that differ.
    heads = jax.tree.map(
        lambda x: jax.random.normal(jax.random.key(1), x.shape), variables["params"]["heads"]
    )
    return module, {**variables, "params": {**variables["params"], "heads": heads}}


def clip(frames=4, seed=0):
    return jax.random.uniform(jax.random.key(seed), (frames, 16, 16, 3), minval=-1)


def test_high_codes_are_equal_bit_for_bit_and_online_equals_offline():
    module, variables = encoder()
    assert module.split == 5
    frames = clip()
    offline = jax.jit(lambda v, x: video_encoder.encode_clip(module, v, x))(variables, frames)
    online = [codes for _, codes in video_encoder.stream(module, variables, np.asarray(frames))]
    online = jnp.concatenate(online)
    for codes in (offline, online):
        assert codes.shape == (4, 8, 8)
        assert all(np.array_equal(codes[t, 5:], codes[0, 5:]) for t in range(4))
    np.testing.assert_allclose(online, offline, atol=1e-5)
    _, state = video_encoder.encode_key(module, variables, frames[:1])
    stepped, state = video_encoder.encode_frame(module, variables, frames[2:3], state)
    np.testing.assert_allclose(stepped, offline[2:3], atol=1e-5)
    assert int(state.frames) == 1 and int(state.keys) == 1


def test_low_codes_do_not_depend_on_other_rows_or_on_high_queries():
    module, variables = encoder()
    run = jax.jit(functools.partial(module.apply, method="encode_frame"))
    frames = clip(3)
    together, alone = run(variables, frames), run(variables, frames[1:2])
    np.testing.assert_allclose(together[1:2], alone, atol=1e-5)
    params = dict(variables["params"])
    for name in ("queries", "layer_embeddings"):
        params[name] = params[name].at[5:].set(9.0)
    params["heads"] = jax.tree.map(lambda x: x.at[5:].set(7.0), params["heads"])
    changed = run({**variables, "params": params}, frames)
    np.testing.assert_array_equal(changed, together)


def test_a_running_mean_of_keys_and_refreshing():
    module, variables = encoder()
    frames = np.asarray(clip(4))
    key = jax.jit(lambda x: module.apply(variables, x, method="encode_key")[:, 5:])
    codes = [c for _, c in video_encoder.stream(module, variables, frames, "mean", 2)]
    np.testing.assert_array_equal(codes[0][:, 5:], codes[1][:, 5:])
    mean = (key(frames[:1]) + key(frames[2:3])) / 2
    np.testing.assert_allclose(codes[3][:, 5:], mean, atol=1e-5)
    codes = [c for _, c in video_encoder.stream(module, variables, frames, "every", 3)]
    np.testing.assert_allclose(codes[3][:, 5:], key(frames[3:]), atol=1e-5)


def test_a_frame_is_cheaper_than_a_key():
    module = VideoEncoder()
    costs = []
    for method in ("encode_frame", "encode_key"):
        run = jax.jit(functools.partial(module.apply, method=method))
        variables = jax.eval_shape(module.init, jax.random.key(0), *module.example_inputs())
        costs.append(run.lower(variables, *module.example_inputs()).cost_analysis()["flops"])
    assert costs[0] < costs[1]


def test_codes_start_at_the_mean_latent_and_scanned_blocks_are_the_same_network():
    module = VideoEncoder(**TINY)
    variables = module.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    variables["buffers"]["w_avg"] = jnp.arange(8.0)
    np.testing.assert_array_equal(module.apply(variables, clip(1))[0, 3], jnp.arange(8.0))
    module, variables = encoder()
    state = catalog.export("video.video_encoder", module, variables)
    scanned, stacked = jaxmodels.load(
        "video.video_encoder", state, **TINY, scan_layers=True, remat=True
    )
    assert "layers.*" in stacked["params"]
    frames = clip(2)
    np.testing.assert_allclose(
        jax.jit(scanned.apply)(stacked, frames), module.apply(variables, frames), atol=1e-5
    )


def test_images_need_be_neither_square_nor_colored():
    module = vit.ViT(
        image_size=[8, 12], patch_size=4, num_channels=1, hidden_size=8, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=16,
    )  # fmt: skip
    tokens, variables = module.init_with_output(jax.random.key(0), jnp.zeros((1, 8, 12, 1)))
    assert tokens.shape == (1, 7, 8)
    assert variables["params"]["embeddings"]["position_embeddings"].shape == (1, 7, 8)
    with pytest.raises(ValueError, match=r"\[batch, 8, 12, 1\], got \(1, 12, 8, 1\)"):
        module.apply(variables, jnp.zeros((1, 12, 8, 1)))


def test_the_vit_activation_is_an_option():
    arguments = dict(
        image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16,
    )  # fmt: skip
    x = jax.random.normal(jax.random.key(0), (1, 8, 8, 3))
    exact, variables = vit.ViT(**arguments).init_with_output(jax.random.key(0), x)
    approximate, rectified = (
        vit.ViT(hidden_act=name, **arguments).apply(variables, x) for name in ("gelu_new", "relu")
    )
    assert 0 < jnp.abs(approximate - exact).max() < 1e-2 < jnp.abs(rectified - exact).max()
    with pytest.raises(ValueError, match="hidden_act 'gleu': known are gelu, gelu_new"):
        vit.ViT(hidden_act="gleu", **arguments)


def test_published_vit_weights_of_either_spelling_load_into_the_blocks():
    arguments = dict(
        image_size=16, patch_size=4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64,
    )  # fmt: skip
    vit, weights = jaxmodels.load("video.vit", **arguments)
    state = catalog.export("video.vit", vit, weights)
    old = {}
    for key, value in state.items():
        for new, published in (
            ("attention.q_proj", "attention.attention.query"),
            ("attention.k_proj", "attention.attention.key"),
            ("attention.v_proj", "attention.attention.value"),
            ("attention.o_proj", "attention.output.dense"),
            ("mlp.fc1", "intermediate.dense"),
            ("mlp.fc2", "output.dense"),
            ("layers.", "encoder.layer."),
        ):
            key = key.replace(new, published)
        old[f"vit.{key}"] = value
    old |= {"classifier.weight": np.zeros((3, 16)), "vit.pooler.dense.bias": np.zeros(16)}
    assert "vit.encoder.layer.1.attention.attention.query.weight" in old
    _, again = jaxmodels.load("video.vit", old, **arguments)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(weights)):
        np.testing.assert_array_equal(a, b)
    skip = ("queries", "layer_embeddings", "heads", "w_avg")
    for size in (16, 32):
        _, loaded = jaxmodels.load(
            "video.video_encoder", old, skip=skip, **{**TINY, "image_size": size}
        )
        np.testing.assert_array_equal(
            loaded["params"]["layers.1"]["mlp"]["fc1"]["kernel"],
            weights["params"]["layers.1"]["mlp"]["fc1"]["kernel"],
        )
        assert loaded["params"]["embeddings"]["position_embeddings"].shape[1] == (size // 4) ** 2


def test_published_encoders_stand_behind_the_same_interface():
    module = VideoEncoder(
        backbone="e4e", width_divisor=32, se_reduction=2, stylegan_size=16, w_dim=16
    )
    shapes = jax.eval_shape(module.init, jax.random.key(0), *module.example_inputs())
    frames = jax.ShapeDtypeStruct((2, 256, 256, 3), jnp.float32)
    run = functools.partial(module.apply, method="encode_frame")
    assert jax.eval_shape(run, shapes, frames).shape == (2, 4, 16)
    assert "encoder" in shapes["params"] and "batch_stats" in shapes


def test_the_style_transformer_reads_its_files_and_the_generators_mapping_stays_as_it_is():
    # Against the official code: 6e-6 of values up to 5.5, at full width on 64 pixels.
    module = VideoEncoder(
        image_size=32, patch_size=16, backbone="style_transformer", ir_layers=18, width_divisor=64,
        se_reduction=1, stylegan_size=16, w_dim=8, mapping_layers=2,
    )  # fmt: skip
    shapes = jax.eval_shape(module.init, jax.random.key(0), *module.example_inputs())
    variables = tiny.random_like(dict(shapes), scale=0.3)
    variables["batch_stats"] = jax.tree.map(np.abs, variables["batch_stats"])
    assert not any(leaf.startswith("style.") for leaf in variables["params"])
    state = catalog.export("video.video_encoder", module, variables)
    for key in (
        "latent_avg", "encoder.module.z", "encoder.module.body.0.res_layer.0.weight",
        "encoder.module.transformerlayer_coarse.multihead_attn.in_proj_weight",
        "decoder.module.style.2.bias",
    ):  # fmt: skip
        assert key in state
    file = {**state, "decoder.module.conv1.conv.weight": np.zeros(3)}
    bare = {k.replace(".module", ""): v for k, v in file.items()}
    for given in (file, bare):
        loaded = catalog.import_state(catalog.find("video.video_encoder"), module, given)[0]
        again = catalog.export("video.video_encoder", module, loaded)
        assert all(np.array_equal(again[k], state[k]) for k in state)

    frames = jax.random.uniform(jax.random.key(1), (1, 32, 32, 3), minval=-1)
    both = tiny.compiled(
        lambda v, x: [module.apply(v, x, method=f"encode_{m}") for m in ("key", "frame")],
        variables, frames,
    )  # fmt: skip
    assert both[0].shape == (1, 6, 8) and module.split == 4
    np.testing.assert_array_equal(both[1], both[0][:, :4])

    mapping = MappingNetwork(w_dim=8, num_layers=2)
    z = jax.random.normal(jax.random.key(2), (5, 8))
    wanted, own = mapping.init_with_output(jax.random.key(3), z)
    frozen = {"buffers": query_decoder.frozen_mapping(own["params"])}
    found = query_decoder.FrozenMapping(num_layers=2).apply(frozen, z)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_mistakes_are_named():
    module, variables = encoder()
    with pytest.raises(ValueError, match="8x8, the encoder takes 16x16"):
        module.apply(variables, jnp.zeros((1, 8, 8, 3)))
    with pytest.raises(ValueError, match=r"16x12, the encoder takes 16x16"):
        module.apply(variables, jnp.zeros((1, 16, 12, 3)))
    with pytest.raises(ValueError, match=r"floats in \[-1, 1\], got uint8"):
        module.apply(variables, jnp.zeros((1, 16, 16, 3), jnp.uint8))
    with pytest.raises(ValueError, match="frames reach 255"):
        video_encoder.check_range(np.full((1, 2, 2, 3), 255.0))
    said = []
    video_encoder.check_range(np.full((1, 2, 2, 3), 0.5), said.append)
    assert "in [0, 1]?" in said[0]
    for n_low in (0, 8):
        with pytest.raises(ValueError, match=r"n_low must lie within 1 \.\. 7"):
            VideoEncoder(**TINY, n_low=n_low)
    with pytest.raises(ValueError, match="no key codes in state"):
        video_encoder.encode_frame(module, variables, clip(1), video_encoder.start_clip())
    with pytest.raises(ValueError, match="backbone is one of"):
        VideoEncoder(backbone="resnet")
    with pytest.raises(ValueError, match="timm's names"):
        jaxmodels.load("video.vit", {"blocks.0.attn.qkv.weight": np.zeros(1)})


def test_bytes_are_refused_and_a_clip_in_0_to_1_is_warned_of_wherever_frames_come_in():
    module, variables = encoder()
    frames = (np.asarray(clip(3)) + 1) / 2
    ways = {
        "apply": lambda x: module.apply(variables, x),
        "key": lambda x: video_encoder.encode_key(module, variables, x),
        "clip": lambda x: video_encoder.encode_clip(module, variables, x),
        "stream": lambda x: list(video_encoder.stream(module, variables, x)),
    }
    for name, way in ways.items():
        with pytest.raises(ValueError, match="frames reach 25"):
            way(255 * frames)
        if name != "apply":
            with pytest.warns(UserWarning, match=r"in \[0, 1\]\?"):
                way(frames)
    # A bright frame alone is no sign of it.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ways["stream"](np.concatenate([frames, -frames]))
    said = []
    list(video_encoder.stream(module, variables, frames, warn=said.append))
    assert len(said) == 1


FACE = face_mesh.synthetic_face_model(shape=4, expression=5, vertices=300)


@functools.cache
def editor():
    module = PoseControl(
        n_low=5, w_dim=8, condition_size=8, num_layers=1, num_heads=2, code_size=14
    )
    variables = module.init(
        jax.random.key(0), *(jnp.zeros(x.shape) for x in module.example_inputs())
    )
    output = {"kernel": jnp.ones((5, 8, 8)), "bias": jnp.ones((5, 8))}
    return PoseEditor(module, {"params": {**variables["params"], "output": output}}, FACE)


def face(batch=1, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    camera = jnp.tile(jnp.asarray([[8.0, 0, 0]]), (batch, 1))
    return MeshCode(
        jnp.zeros((batch, 4)),
        0.1 * jax.random.normal(keys[0], (batch, 5)),
        0.1 * jax.random.normal(keys[1], (batch, 6)),
        camera,
    )


def test_equal_faces_change_nothing_at_all_and_high_codes_never_change():
    ws, mesh = jax.random.normal(jax.random.key(0), (2, 8, 8)), face(2)
    edit = editor()

    @jax.jit
    def edits(ws, mesh):
        same = edit.drive(ws, mesh, mesh), edit.set_pose(ws, mesh)
        smiling = edit.set_expression(ws, mesh, 0.5 * jnp.ones(5), relative=True)
        return same, (edit.set_pose(ws, mesh, yaw=20.0), smiling)

    same, moved = edits(ws, mesh)
    for codes in same:
        np.testing.assert_array_equal(codes, ws)
    for codes in moved:
        assert jnp.abs(codes[:, :5] - ws[:, :5]).min() > 0
        np.testing.assert_array_equal(codes[:, 5:], ws[:, 5:])


def test_reenactment_by_a_still_driver_leaves_the_source_alone():
    source, ws = face(1), jax.random.normal(jax.random.key(0), (1, 8, 8))
    driver = jax.tree.map(lambda x: jnp.repeat(x, 3, 0), face(1, seed=5))
    run = jax.jit(editor().reenact)
    codes = run(ws, source, driver)
    np.testing.assert_array_equal(codes, jnp.repeat(ws, 3, 0))
    moved = driver._replace(pose=driver.pose.at[2, 1].add(0.4))
    codes = run(ws, source, moved)
    np.testing.assert_array_equal(codes[1], ws[0])
    assert jnp.abs(codes[2, :5] - ws[0, :5]).max() > 0


def test_the_order_of_landmarks_does_not_matter():
    edit = editor()
    inputs = [
        jax.random.normal(jax.random.key(i), x.shape)
        for i, x in enumerate(edit.module.example_inputs())
    ]
    order = jax.random.permutation(jax.random.key(9), 68)
    shuffled = [*inputs[:3], inputs[3][:, order], inputs[4][:, order]]
    run = jax.jit(edit.module.apply)
    a, b = (run(edit.variables, *x) for x in (inputs, shuffled))
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_an_edit_of_a_clip_equals_that_of_the_joined_codes():
    low, high = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate(((4, 5, 8), (3, 8))))
    direction = jax.random.normal(jax.random.key(7), (1, 8))
    whole = video_encoder.join_codes(low, high[None])
    for layers in (None, (0, 4), (3, 7), (6, 8)):
        wanted = latent_editing.move(whole, direction, 2.0, layers)
        new_low, new_high = latent_editing.edit_clip(low, high, direction, 2.0, layers)
        np.testing.assert_array_equal(video_encoder.join_codes(new_low, new_high[None]), wanted)


def test_absolute_edits_and_style_mixing():
    w = jax.random.normal(jax.random.key(0), (3, 8))
    n = latent_editing.check_direction(jnp.arange(1.0, 9.0), 8)
    moved = latent_editing.move(w, 5 * n, 2.5, absolute=True)
    np.testing.assert_allclose(moved @ n, 2.5, rtol=1e-5)
    ws = jax.random.normal(jax.random.key(1), (2, 8, 8))
    mixed = latent_editing.mix_styles(ws, jnp.zeros((8, 8)), 5)
    np.testing.assert_array_equal(mixed[:, :5], ws[:, :5])
    assert (mixed[:, 5:] == 0).all()


def test_directions_are_found_by_a_linear_machine_and_wrong_ones_are_refused():
    rng = np.random.default_rng(0)
    codes = rng.normal(size=(2000, 8)).astype(np.float32)
    truth = np.eye(8)[2]
    found, accuracy = latent_editing.train_boundary(codes, codes @ truth, 0.05)
    assert accuracy == 1 and abs(found[0, 2]) > 0.9 and np.linalg.norm(found) == pytest.approx(1)
    with pytest.raises(ValueError, match="too few"):
        latent_editing.train_boundary(codes[:20], codes[:20, 0])
    with pytest.raises(ValueError, match=r"width 8 as the codes have, got \(4,\)"):
        latent_editing.move(codes, np.ones(4), 1.0)
    with pytest.raises(ValueError, match="zero norm"):
        latent_editing.move(codes, np.zeros(8), 1.0)
    with pytest.raises(ValueError, match="span of its conditions"):
        latent_editing.project_boundary(jnp.ones((1, 2)), jnp.eye(2)[:1], jnp.eye(2)[1:])


def test_cost_of_the_default_encoder_is_counted():
    assert count_cost(VideoEncoder(**TINY)).parameters > 0
