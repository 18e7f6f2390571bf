"""ConvNeXt: names, sizes, both publishers' files, and its numbers against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

import jaxmodels
from jaxmodels.interop.catalog import export, find, shapes
from jaxmodels.interop.conversion import to_torch
from jaxmodels.security.attribution import AttributionNet
from jaxmodels.vision.convnext import ConvNeXt
from jaxmodels.vision.efficientnet import EfficientNet

SMALL = {"depths": (1, 2), "dims": (4, 6), "num_classes": 3, "patch_size": 2}


def random_state(module, seed=0):
    rng = np.random.default_rng(seed)
    return to_torch(
        jax.tree.map(lambda s: rng.normal(0, 0.4, s.shape).astype(np.float32), shapes(module))
    )


def test_published_parameter_counts():
    for name, count in (
        ("tiny", 28_589_128),
        ("small", 50_223_688),
        ("base", 88_591_464),
        ("large", 197_767_336),
        ("xlarge", 350_196_968),
    ):
        tree = shapes(find(f"vision.convnext:convnext_{name}").build())
        assert sum(int(np.prod(s.shape)) for s in jax.tree.leaves(tree)) == count, name


def test_names_and_shapes_are_timms():
    state = {k: v.shape for k, v in random_state(ConvNeXt(**SMALL)).items()}
    block = {
        "conv_dw.weight": (6, 1, 7, 7),
        "conv_dw.bias": (6,),
        "norm.weight": (6,),
        "norm.bias": (6,),
        "mlp.fc1.weight": (24, 6),
        "mlp.fc1.bias": (24,),
        "mlp.fc2.weight": (6, 24),
        "mlp.fc2.bias": (6,),
        "gamma": (6,),
    }
    for b in (0, 1):
        for name, shape in block.items():
            assert state.pop(f"stages.1.blocks.{b}.{name}") == shape
    state = {k: v for k, v in state.items() if not k.startswith("stages.0.blocks.0.")}
    assert state == {
        "stem.0.weight": (4, 3, 2, 2),
        "stem.0.bias": (4,),
        "stem.1.weight": (4,),
        "stem.1.bias": (4,),
        "stages.1.downsample.0.weight": (4,),
        "stages.1.downsample.0.bias": (4,),
        "stages.1.downsample.1.weight": (6, 4, 2, 2),
        "stages.1.downsample.1.bias": (6,),
        "head.norm.weight": (6,),
        "head.norm.bias": (6,),
        "head.fc.weight": (3, 6),
        "head.fc.bias": (3,),
    }


def official(state):
    """The same file under the authors' names."""
    found = {}
    for key, value in state.items():
        for ours, theirs in (
            ("stem.", "downsample_layers.0."),
            ("stages.1.downsample.", "downsample_layers.1."),
            (".blocks.", "."),
            ("conv_dw", "dwconv"),
            ("mlp.fc", "pwconv"),
            ("head.norm", "norm"),
            ("head.fc", "head"),
        ):
            key = key.replace(ours, theirs)
        found[key] = value
    return found


def layer_norm(x, scale, bias):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale + bias


def patches(x, weight, bias):
    size = weight.shape[-1]
    n, h, w, c = x.shape
    cut = x.reshape(n, h // size, size, w // size, size, c)
    return np.einsum("nhiwjc,ocij->nhwo", cut, weight) + bias


def reference(state, x):
    """The network on NumPy in double precision, x [B, H, W, 3]."""
    s = {k: v.astype(np.float64) for k, v in state.items()}
    pair = lambda name: (s[f"{name}.weight"], s[f"{name}.bias"])  # noqa: E731
    x = layer_norm(patches(x, *pair("stem.0")), *pair("stem.1"))
    for stage, depth in enumerate((1, 2)):
        if stage:
            x = layer_norm(x, *pair("stages.1.downsample.0"))
            x = patches(x, *pair("stages.1.downsample.1"))
        for b in range(depth):
            name = f"stages.{stage}.blocks.{b}"
            weight, bias = pair(f"{name}.conv_dw")
            padded = np.pad(x, ((0, 0), (3, 3), (3, 3), (0, 0)))
            y = sum(
                padded[:, i : i + x.shape[1], j : j + x.shape[2]] * weight[:, 0, i, j]
                for i in range(7)
                for j in range(7)
            )
            y = layer_norm(y + bias, *pair(f"{name}.norm"))
            weight, bias = pair(f"{name}.mlp.fc1")
            y = y @ weight.T + bias
            y = y * 0.5 * (1 + erf(y / np.sqrt(2)))
            weight, bias = pair(f"{name}.mlp.fc2")
            x = x + (y @ weight.T + bias) * s[f"{name}.gamma"]
    weight, bias = pair("head.fc")
    return layer_norm(x.mean((1, 2)), *pair("head.norm")) @ weight.T + bias


def test_both_publishers_files_give_the_same_numbers_and_go_out_again():
    state = random_state(ConvNeXt(**SMALL))
    x = np.random.default_rng(1).normal(size=(2, 12, 8, 3)).astype(np.float32)
    want = reference(state, x)
    for given in (state, official(state)):
        module, variables = jaxmodels.load("vision.convnext", given, **SMALL)
        np.testing.assert_allclose(jax.jit(module.apply)(variables, x), want, atol=1e-4)
        back = export("vision.convnext", module, variables)
        assert back.keys() == state.keys()
        assert all(np.array_equal(back[k], v) for k, v in state.items())


def test_without_a_head_it_gives_features_and_small_images_are_refused():
    module = ConvNeXt(**SMALL | {"num_classes": 0})
    key, image = jax.random.key(0), jnp.zeros((1, 8, 8, 3))
    out, tree = jax.eval_shape(module.init_with_output, key, image)
    assert out.shape == (1, 6) and "head.fc" not in tree["params"]
    assert "head.norm" in tree["params"]
    with pytest.raises(ValueError, match="images of at least 4x4, got 3x8"):
        jax.eval_shape(module.init, key, image[:, :3])
    with pytest.raises(ValueError, match="one entry a stage"):
        ConvNeXt(depths=(1, 1), dims=(4,))
    dropping = ConvNeXt(**SMALL | {"drop_path_rate": 0.5})
    out = jax.eval_shape(lambda v: dropping.apply(v, image, True, rngs={"dropout": key}),
                         shapes(ConvNeXt(**SMALL)))  # fmt: skip
    assert out.shape == (1, 3)


def test_attribution_stands_on_any_of_the_three_backbones():
    small = {"convnext": {"depths": (1, 1, 1, 1), "dims": (4, 4, 6, 6)},
             "efficientnet": {"channel_multiplier": 0.25}}  # fmt: skip
    for backbone, kind in (("convnext", ConvNeXt), ("efficientnet", EfficientNet)):
        module = AttributionNet(backbone=backbone, backbone_args=small[backbone], classes=5)
        out, tree = jax.eval_shape(
            module.init_with_output, jax.random.key(0), jnp.zeros((1, 128, 128, 3))
        )
        assert out["logits"].shape == (1, 5) and out["parts"].shape[:2] == (1, 9)
        bare = kind(num_classes=0, **small[backbone])
        own = jax.eval_shape(bare.init, jax.random.key(0), jnp.zeros((1, 128, 128, 3)))
        assert tree["params"]["encoder"].keys() == own["params"].keys()
    with pytest.raises(ValueError, match="backbone 'vgg'; known: resnet, efficientnet, convnext"):
        AttributionNet(backbone="vgg")
