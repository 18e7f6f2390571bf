"""Heads at depth: what they read, what trains them, and which checkpoints fit them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmodels
from jaxmodels.interop.catalog import export, shapes
from jaxmodels.interop.conversion import CheckpointMismatch, to_torch
from jaxmodels.security import mhui, uncertainty
from jaxmodels.security.detection import detection_metrics
from jaxmodels.security.mhui import MHUIVGG, MHUIResNet
from jaxmodels.vision.vgg import VGG

TINY = {"width": 4, "layers": (1, 1, 1, 1), "head_features": 6, "num_classes": 3}


def random_state(module, seed=0):
    rng = np.random.default_rng(seed)
    variables = jax.tree.map(
        lambda s: np.abs(rng.normal(0.1, 0.3, s.shape)).astype(np.float32), shapes(module)
    )
    return to_torch(variables)


def test_a_checkpoint_goes_in_and_out_bit_for_bit_under_either_name_of_projections():
    state = random_state(MHUIResNet(**TINY))
    renamed = {f"module.{k.replace('downsample', 'shortcut')}": v for k, v in state.items()}
    for given in (state, renamed):
        module, variables = jaxmodels.load("security.mhui", given, **TINY)
        back = export("security.mhui", module, variables)
        assert back.keys() == state.keys()
        for key, value in state.items():
            np.testing.assert_array_equal(back[key], value)
            assert back[key].dtype == value.dtype


def test_published_parameter_counts():
    for name, count in (
        ("vision.resnet:resnet18_cifar", 11_173_962),
        ("vision.resnet:resnet34_cifar", 21_282_122),
        ("vision.resnet:resnet50_cifar", 23_520_842),
        ("vision.vgg:vgg16_bn_cifar", 14_728_266),
        ("vision.iresnet:iresnet50", 43_590_976),
        ("vision.xception", 20_811_050),
        ("vision.efficientnet:efficientnet_b0", 4_010_110),
        ("vision.efficientnet:efficientnet_b4", 17_552_202),
    ):
        from jaxmodels.interop.catalog import find

        arguments = {"num_classes": 2} if "efficient" in name else {}
        tree = shapes(find(name).build(**arguments))["params"]
        found = sum(int(np.prod(s.shape)) for s in jax.tree.leaves(tree))
        assert abs(found - count) <= 0.002 * count, (name, found)


def test_a_plain_classifier_becomes_the_backbone_and_the_last_linear_head():
    from jaxmodels.vision.resnet import ResNet

    plain = random_state(ResNet(layers=(1, 1, 1, 1), width=4, num_classes=3))
    module, variables = jaxmodels.load(
        "security.mhui",
        {f"module.{key}": value for key, value in plain.items()},  # as DataParallel saves it
        skip=r"heads\.[0-2]",
        **TINY | {"head_kind": ("mlp", "mlp", "conv", "linear"), "leaky": 0.0},
    )
    x = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    want_module, want = jaxmodels.load(
        "vision.resnet", plain, layers=(1, 1, 1, 1), width=4, num_classes=3
    )
    got = jax.jit(module.apply)(variables, x)[:, -1]
    np.testing.assert_allclose(got, jax.jit(want_module.apply)(want, x), rtol=1e-6)


def test_a_plain_classifier_is_dropped_by_name_or_not_at_all():
    from jaxmodels.vision.resnet import ResNet

    plain = random_state(ResNet(layers=(1, 1, 1, 1), width=4, num_classes=3))
    with pytest.raises(CheckpointMismatch, match=r"linear\.weight"):
        jaxmodels.load("security.mhui", plain, skip="heads", **TINY)
    renamed = mhui.upgrade_checkpoint(plain, MHUIResNet(**TINY))
    assert {"linear.weight", "linear.bias", "backbone.conv1.weight"} <= renamed.keys()


def test_a_plain_vggs_classifier_becomes_the_last_linear_head():
    cfg = (4, "M", 6, "M")
    plain = random_state(VGG(cfg=cfg, num_classes=3))
    linear = {"cfg": cfg, "head_kind": "linear", "num_classes": 3}
    _, variables = jaxmodels.load("security.mhui:MHUIVGG", plain, skip=r"heads\.0", **linear)
    kernel = variables["params"]["heads.1"]["classifier"]["kernel"]
    np.testing.assert_array_equal(kernel, plain["classifier.weight"].T)
    np.testing.assert_array_equal(
        variables["params"]["features.0"]["bias"], plain["features.0.bias"]
    )


def test_detached_shallow_heads_do_not_reach_the_trunk_and_all_heads_do_otherwise():
    x = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (4, 16, 16, 3)), jnp.float32)
    labels = jnp.array([0, 1, 2, 0])

    rng = np.random.default_rng(1)
    variables = jax.tree.map(
        lambda s: np.abs(rng.normal(0.1, 0.3, s.shape)).astype(np.float32),
        shapes(MHUIResNet(**TINY)),
    )

    def losses(kernel, detach):
        params = variables["params"]
        params = {**params, "backbone": {**params["backbone"], "conv1": {"kernel": kernel}}}
        module = MHUIResNet(**TINY, detach_shallow=detach)
        return mhui.head_losses(module.apply({**variables, "params": params}, x), labels)

    # Forward mode along one direction gives all heads' slopes at once.
    kernel = variables["params"]["backbone"]["conv1"]["kernel"]
    for detach in (False, True):
        slopes = jax.jit(lambda k, d=detach: jax.jvp(lambda k: losses(k, d), (k,), (k,))[1])(kernel)
        np.testing.assert_array_equal(slopes[:3] == 0, detach)
        assert slopes[3] != 0


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_every_kind_of_head_and_any_two_taps(kind):
    module = MHUIResNet(**TINY, head_kind=kind, taps=("layer2", "layer4"))
    out, _ = jax.eval_shape(
        module.init_with_output, jax.random.key(0), jnp.zeros((2, 16, 16, 3), jnp.float32)
    )
    assert out.shape == (2, 2, 3)


def test_backbones_of_two_to_five_stages_have_a_head_after_each():
    for stages in (2, 3, 5):
        module = MHUIResNet(**TINY | {"layers": (1,) * stages})
        variables = shape_of(module, 1, 32, 32, 3)
        logits = jax.eval_shape(module.apply, variables, jnp.zeros((1, 32, 32, 3)))
        assert logits.shape == (1, stages, TINY["num_classes"])
        assert f"heads.{stages - 1}" in variables["params"]


def test_sixteen_bit_trunks_have_float32_logits():
    module = MHUIResNet(**TINY, dtype=jnp.bfloat16)
    out, _ = jax.eval_shape(module.init_with_output, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    assert out.dtype == jnp.float32


def test_images_do_not_see_their_batch_and_sixteen_bits_detect_alike():
    rng = np.random.default_rng(3)

    def draw(path, spec):
        value = rng.normal(0, 0.35, spec.shape)
        positive = path[-1].key in ("var", "scale")
        return np.asarray(np.abs(value) + 0.7 if positive else value, np.float32)

    variables = jax.tree_util.tree_map_with_path(draw, shapes(MHUIResNet(**TINY)))
    smooth = rng.uniform(-1, 1, (64, 4, 4, 3)).repeat(4, 1).repeat(4, 2)
    noisy = smooth[:32] + rng.normal(0, 0.8, (32, 16, 16, 3))
    x = np.concatenate([smooth, noisy]).astype(np.float32)
    apply = jax.jit(MHUIResNet(**TINY).apply)
    logits = apply(variables, x)
    others = apply(variables, np.concatenate([x[:3], 0 * x[3:]]))
    np.testing.assert_allclose(others[:3], logits[:3], atol=1e-5, rtol=1e-5)
    half = jax.jit(MHUIResNet(**TINY, dtype=jnp.bfloat16).apply)(variables, x)
    found = []
    for z in (logits, half):
        fit = uncertainty.moment_match(z, "trace", from_logits=True)
        for name in ("epkl", "mi", "max_p"):
            score = uncertainty.scores(uncertainty.measures(fit.alpha))[name]
            found.append(detection_metrics(score, np.arange(96) >= 64).auroc)
    assert max(abs(v - 0.5) for v in found) > 0.05  # there is something to tell apart
    np.testing.assert_allclose(found[:3], found[3:], atol=0.01)


def test_attack_losses_are_of_the_heads_they_name():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 5)), jnp.float32)
    labels = jnp.array([0, 4, 2])
    nll = -jax.nn.log_softmax(logits)[jnp.arange(3), :, labels]
    np.testing.assert_allclose(mhui.attack_loss("final")(logits, labels), nll[:, -1], rtol=1e-5)
    np.testing.assert_allclose(mhui.attack_loss("sum")(logits, labels), nll.sum(1), rtol=1e-5)
    mean = -jnp.log(jax.nn.softmax(logits).mean(1)[jnp.arange(3), labels])
    np.testing.assert_allclose(mhui.attack_loss("mean")(logits, labels), mean, rtol=1e-5)
    adaptive = mhui.attack_loss("final", lambda z: z[:, 0, 0], 2.0)(logits, labels)
    np.testing.assert_allclose(adaptive, nll[:, -1] - 2 * logits[:, 0, 0], rtol=1e-5)


def load_wrong(**changes):
    return jaxmodels.load("security.mhui", random_state(MHUIResNet(**TINY)), **TINY | changes)


def shape_of(module, *shape):
    return jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))


BAD = {
    "at least 2 heads, got 1": lambda: MHUIResNet(taps=("layer4",)),
    "no tap 'layer5' in this backbone; valid taps: layer1": lambda: MHUIResNet(
        taps=("layer1", "layer5")
    ),
    "shallow to deep": lambda: MHUIResNet(taps=("layer2", "layer1")),
    "head_kind names 2 kinds for 4 heads": lambda: MHUIResNet(head_kind=("mlp", "linear")),
    "head_kind 'mpl'": lambda: MHUIResNet(head_kind="mpl"),
    "at least 16x16, got 8x8": lambda: shape_of(MHUIResNet(**TINY), 1, 8, 8, 3),
    "multiples of 32 (at least 32), got 16x16": lambda: shape_of(VGG(), 1, 16, 16, 3),
    "multiples of 4 (at least 4), got 30x30": lambda: shape_of(
        MHUIVGG(cfg=(4, "M", 4, "M"), head_features=3), 1, 30, 30, 3
    ),
    "labels must be integers, got float64": lambda: mhui.check_labels([0.0, 1.0], 3),
    "labels must lie in [0, 3), got -1 to 2": lambda: mhui.check_labels([-1, 2], 3),
    "labels must lie in [0, 3), got -1 to -1": lambda: mhui.head_losses(
        jnp.zeros((1, 2, 3)), jnp.array([-1])
    ),
    "labels must lie in [0, 3), got 3 to 3": lambda: mhui.attack_loss("final")(
        jnp.zeros((1, 2, 3)), jnp.array([3])
    ),
    "4 heads (heads.0.classifier.4.weight": lambda: load_wrong(taps=("layer1", "layer4")),
    "has 3 classes in the checkpoint, the model num_classes=7": lambda: load_wrong(num_classes=7),
    "attack target 'all'": lambda: mhui.attack_loss("all"),
}


@pytest.mark.parametrize("message", BAD)
def test_a_mistake_gets_one_line(message):
    with pytest.raises(ValueError) as caught:
        BAD[message]()
    assert message in str(caught.value) and "\n" not in str(caught.value)
