"""Every attack keeps its budget, says what it cannot do, and is the attack it is named after."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.security import attacks, input_transforms, optimization_attacks, perturbations
from jaxmodels.security.auto_pgd import checkpoints
from jaxmodels.security.ensembles import (
    average_losses,
    average_outputs,
    same_architecture,
    stack_outputs,
)
from jaxmodels.security.gradient_attacks import GradientAttack, gradient_attack

SIDE, CLASSES = 16, 5
KEY = jax.random.key(0)


@functools.cache
def victim(seed=0):
    """A smooth two-layer network on 16x16 images."""
    rng = np.random.default_rng(seed)
    first = rng.normal(0, 0.3, (SIDE * SIDE * 3, 12)).astype(np.float32)
    second = rng.normal(0, 1.0, (12, CLASSES)).astype(np.float32)
    return lambda x: jnp.tanh((x - 0.5).reshape(x.shape[0], -1) @ first) @ second


@functools.cache
def data():
    rng = np.random.default_rng(1)
    x = rng.uniform(0.1, 0.9, (6, SIDE, SIDE, 3)).astype(np.float32)
    return x, np.asarray(victim()(x).argmax(-1))


def run(cfg, x=None, y=None, apply=None):
    given, labels = data()
    x, y, apply = given if x is None else x, labels if y is None else y, apply or victim()
    return jax.jit(lambda x, y: attacks.attack(KEY, apply, x, y, cfg))(x, y)


LANDMARKS = np.random.default_rng(0).uniform(2, 14, (6, 68, 2)).astype(np.float32)
GRADIENT = ("fgsm", "bim", "pgd", "mi", "ni", "si_ni", "di", "ti", "cim", "lgc", "vmi", "eot")


def options_of(name):
    own = {
        "lgc": {"landmarks": LANDMARKS},
        "ti": {"kernel_size": 5},
        "vmi": {"variance_samples": 3},
        "eot": {"transform": input_transforms.diverse_input, "draws": 2},
    }
    return {"steps": 1 if name == "fgsm" else 4, **own.get(name, {})}


@pytest.mark.parametrize("name", [*GRADIENT, "apgd_ce", "apgd_dlr", "square", "nes"])
def test_every_bounded_attack_keeps_its_budget_and_range_and_misleads(name):
    eps = 0.06
    if name == "square":
        cfg = attacks.make(name, eps=eps, queries=40)
    elif name == "nes":
        cfg = attacks.make(name, eps=eps, steps=6, samples=20)
    elif name.startswith("apgd"):
        cfg = attacks.make(name, eps=eps, steps=8)
    else:
        cfg = attacks.make(name, eps=eps, **options_of(name))
    found = run(cfg)
    images = np.asarray(getattr(found, "images", found))
    x, y = data()
    assert np.abs(images - x).max() <= eps + 1e-6
    assert images.min() >= 0 and images.max() <= 1
    before = perturbations.cross_entropy(victim()(x), y).mean()
    assert perturbations.cross_entropy(victim()(images), y).mean() > before
    if name in ("square", "nes"):
        queries = np.asarray(found.queries)
        wrong = np.asarray(victim()(images).argmax(-1) != y)
        np.testing.assert_array_equal(wrong, found.success)
        limit = 40 if name == "square" else 1 + 6 * 21
        assert queries.min() >= 1 and queries.max() <= limit
        # Who was done early asked less.
        assert not (~wrong).any() or (queries[~wrong] == limit).all()


def test_l2_budgets_of_each_image_hold_and_masks_leave_the_rest_bit_for_bit():
    x, _ = data()
    eps = np.linspace(0.2, 1.2, len(x)).astype(np.float32)
    mask = np.zeros((SIDE, SIDE, 1), np.float32)
    mask[4:9, 5:12] = 1
    images = run(attacks.make("mi", eps=eps, norm="l2", steps=5, mask=mask))
    sizes = optimization_attacks.perturbation_sizes(images, x)["l2"]
    assert (np.asarray(sizes) <= eps + 1e-5).all() and (np.asarray(sizes) > 0.3 * eps).all()
    outside = np.broadcast_to(mask == 0, x.shape)
    np.testing.assert_array_equal(np.asarray(images)[outside], x[outside])


def test_masks_are_checked_however_an_attack_is_made_and_may_be_traced():
    x, y = data()
    classes = (cls for cls, _ in attacks.ATTACKS.values())
    for cls in dict.fromkeys(classes):
        for bad, message in ((0.5, "only 0 and 1"), (0.0, "mask is empty")):
            cfg = cls(mask=np.full((SIDE, SIDE, 1), bad))
            with pytest.raises(ValueError, match=message):
                attacks.attack(KEY, victim(), x, y, cfg)
    corner = np.zeros((SIDE, SIDE, 1), np.float32)
    corner[:4, :4] = 1

    @jax.jit
    def masked(mask):
        return attacks.attack(KEY, victim(), x, y, attacks.make("fgsm", eps=0.1, mask=mask))

    changed = np.asarray(masked(corner)) != x
    assert changed[:, :4, :4].any() and not (changed & (corner == 0)).any()


def test_targets_are_reached_and_iterating_is_no_worse_than_one_step():
    _, y = data()
    target = (y + 1) % CLASSES
    images = run(attacks.make("pgd", eps=0.1, steps=12, targeted=True), y=target)
    assert (np.asarray(victim()(images).argmax(-1)) == target).mean() >= 0.8
    losses = [
        perturbations.cross_entropy(victim()(run(attacks.make(name, eps=0.03))), y).mean()
        for name in ("fgsm", "bim")
    ]
    assert losses[1] >= losses[0] - 1e-4


def test_another_eps_compiles_nothing_and_attacks_can_be_mapped():
    x, y = data()

    @jax.jit
    @chex.assert_max_traces(1)
    def one(eps):
        return gradient_attack(KEY, victim(), x, y, GradientAttack(eps=eps, steps=3))

    sizes = [float(np.abs(np.asarray(one(e)) - x).max()) for e in (0.02, 0.05)]
    np.testing.assert_allclose(sizes, (0.015, 0.0375), rtol=1e-3)  # three steps of eps / 4
    many = jax.vmap(lambda e: gradient_attack(KEY, victim(), x, y, GradientAttack(e, steps=3)))(
        jnp.array([0.02, 0.05])
    )
    np.testing.assert_allclose(many[1], one(0.05), atol=1e-6)


def test_carlini_wagner_finds_near_images_and_bisecting_c_nearer_ones():
    x, y = data()
    plain = run(attacks.make("cw", c=20.0, steps=40, learning_rate=0.02))
    searched = run(attacks.make("cw", c=1e-2, steps=40, learning_rate=0.02, search_rounds=8))
    fool = run(attacks.make("deepfool", steps=10))
    sizes = []
    for images in (plain, searched, fool):
        wrong = np.asarray(victim()(images).argmax(-1) != y)
        assert wrong.mean() >= 0.95
        sizes.append(float(optimization_attacks.perturbation_sizes(images, x)["l2"].mean()))
    assert sizes[1] <= sizes[0] + 1e-4
    assert sizes[2] < 2 * sizes[0]
    # An image that cannot be misled comes back as it was.
    never = lambda x: jnp.zeros((x.shape[0], 3)).at[:, 0].set(x.sum((1, 2, 3)) * 1e3)  # noqa: E731
    zeros = np.zeros(len(x), np.int64)
    np.testing.assert_array_equal(run(attacks.make("cw", steps=3), y=zeros, apply=never), x)


def test_the_evolutionary_attack_walks_towards_the_image():
    x, y = data()
    start = np.random.default_rng(5).uniform(0, 1, x.shape).astype(np.float32)
    usable = np.asarray(victim()(start).argmax(-1)) != y
    found = run(attacks.make("evolutionary", queries=150, start=start, side=8))
    np.testing.assert_array_equal(found.success, usable)
    near = np.linalg.norm((np.asarray(found.images) - x).reshape(len(x), -1), axis=1)
    far = np.linalg.norm((start - x).reshape(len(x), -1), axis=1)
    assert (near[usable] < 0.9 * far[usable]).all()
    assert (np.asarray(victim()(found.images).argmax(-1)) != y)[usable].all()
    assert (np.asarray(found.queries)[usable] == 151).all()


def test_apgd_looks_at_the_papers_checkpoints():
    assert checkpoints(100)[:6] == (0, 22, 41, 57, 70, 80)


def test_ensembles_average_outputs_or_losses_and_refuse_other_sizes():
    x, y = data()
    both = [victim(0), victim(3)]
    np.testing.assert_allclose(average_outputs(both)(x), (both[0](x) + both[1](x)) / 2, rtol=1e-5)
    loss = average_losses(perturbations.cross_entropy, (3.0, 1.0))
    want = 3 * perturbations.cross_entropy(both[0](x), y) + perturbations.cross_entropy(
        both[1](x), y
    )
    np.testing.assert_allclose(loss(stack_outputs(both)(x), y), want, rtol=1e-5)
    with pytest.raises(ValueError, match=r"sizes \[5, 3\]"):
        average_outputs([victim(), lambda x: victim()(x)[:, :3]])(x)


def test_members_of_one_architecture_are_one_model_without_grouped_convolutions():
    rng = np.random.default_rng(0)
    stacked = jnp.asarray(rng.normal(0, 0.3, (3, 5, 5, 3, 4)), jnp.float32)
    x = data()[0]

    def apply(kernel, x):
        y = jax.lax.conv_general_dilated(
            x, kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.tanh(y).mean((1, 2))

    model = same_architecture(apply, stacked)
    want = lambda x: sum(apply(kernel, x) for kernel in stacked) / 3  # noqa: E731
    compiled = jax.jit(model).lower(x).compile()
    assert "feature_group_count=3" not in compiled.as_text()
    np.testing.assert_allclose(compiled(x), want(x), atol=1e-6)
    slopes = [
        jax.grad(lambda v, f=f: jnp.square(f(v)).sum())(jnp.asarray(x)) for f in (model, want)
    ]
    np.testing.assert_allclose(*slopes, atol=1e-6)


def test_diverse_inputs_shrink_within_the_frame():
    x = np.ones((2, 20, 20, 3), np.float32)
    seen = np.asarray(input_transforms.diverse_input(KEY, x, probability=1.0))
    side = int(round(float(seen[0, :, :, 0].sum()) ** 0.5))
    assert 18 <= side < 20 and seen.shape == x.shape
    small = input_transforms.shrink(x, 10, 10, 2, 3, "nearest")
    assert float(small.sum()) == 2 * 3 * 100 and float(small[0, 2:12, 3:13].min()) == 1


BAD = {
    "no attack 'pdg', did you mean 'pgd'?": lambda: attacks.make("pdg"),
    "eps must be positive, got 0": lambda: attacks.make("pgd", eps=0.0),
    "steps must be at least 1, got 0": lambda: attacks.make("pgd", steps=0),
    "kappa must not be negative": lambda: attacks.make("cw", kappa=-1.0),
    "norm 'l3'; known: linf, l2": lambda: attacks.make("pgd", norm="l3"),
    "has no option 'epsilon'": lambda: attacks.make("pgd", epsilon=1),
    "lgc needs landmarks": lambda: attacks.make("lgc"),
    "got uint8": lambda: attacks.attack(
        KEY, victim(), np.zeros((1, 8, 8, 3), np.uint8), data()[1], attacks.make("pgd")
    ),
    "must lie in [0, 1], got 0 to 2": lambda: attacks.attack(
        KEY, victim(), np.array([[[[0.0, 2.0, 1.0]]]]), data()[1], attacks.make("pgd")
    ),
    "labels must lie in [0, 5), got 0 to 5": lambda: attacks.attack(
        KEY, victim(), data()[0][:2], np.array([0, 5]), attacks.make("bim", steps=1)
    ),
    "labels must be integers, got float32": lambda: attacks.attack(
        KEY, victim(), data()[0][:2], np.zeros(2, np.float32), attacks.make("deepfool")
    ),
    "pixels of 0..1 where high=255": lambda: perturbations.check_pixels(
        np.ones((1, 2, 2, 3)), 0, 255, 8.0
    ),
    "goal 'impersonate'; known: dodging": lambda: attacks.face_attack(
        KEY, victim(), data()[0], None, goal="impersonate"
    ),
    "needs target labels": lambda: perturbations.check_targets(data()[1], None, True),
    "targets equal the true labels at rows [0, 1": lambda: perturbations.check_targets(
        data()[1], data()[1], True
    ),
    "the patch mask is empty": lambda: perturbations.check_mask(np.zeros((4, 4, 1))),
    "the patch mask is empty (area 0 %) at rows [1]": lambda: perturbations.check_mask(
        np.stack([np.ones((4, 4, 1)), np.zeros((4, 4, 1))])
    ),
    "covers 25.00 % of the image, the budget is 10 %": lambda: perturbations.check_mask(
        np.pad(np.ones((2, 2, 1)), ((0, 2), (0, 2), (0, 0))), 0.1
    ),
    "holds only 0 and 1, got 0.5": lambda: perturbations.check_mask(np.full((4, 4, 1), 0.5)),
}


@pytest.mark.parametrize("message", BAD)
def test_a_mistake_gets_one_line(message):
    with pytest.raises(ValueError) as caught:
        BAD[message]()
    text = str(caught.value)
    assert message in text.replace("known: dodging, impersonation", "known: dodging"), text
    assert "\n" not in text
