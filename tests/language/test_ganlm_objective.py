"""The three losses, the draws and the noisy context."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxmodels.language.ganlm_objective import (
    Draws,
    LossWeight,
    Misjudged,
    Objective,
    draw,
    loss_per_token,
    misjudged,
    noisy_context,
    sample_tokens,
    sampled_positions,
    summary,
    three_passes,
    token_losses,
)
from tests.language.test_ganlm import PAD, model

MASK = 50
OBJECTIVE = Objective(MASK, LossWeight(10.0), LossWeight(1.0))


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(5)
    source = rng.integers(4, MASK, (3, 10))
    label = rng.integers(4, MASK, (3, 9))
    label[:, 0], label[:, 4] = MASK + 1, MASK + 2
    label[1, 7:], label[2, 6:] = PAD, PAD
    return tuple(jnp.asarray(x, jnp.int32) for x in (source, label[:, :-1], label[:, 1:]))


def run(batch, objective=OBJECTIVE, **arguments):
    module, variables = model()
    arguments.setdefault("rng", jax.random.key(0))
    return jax.jit(lambda p: three_passes(module, p, *batch, objective, **arguments))(
        variables["params"]
    )


def padded_columns(array, count):
    return jnp.pad(array, ((0, 0), (0, count)), constant_values=PAD)


def test_padding_the_batch_changes_no_loss(batch):
    _, outputs = run(batch)
    draws = Draws(*(padded_columns(x, 3) for x in outputs["draws"]))
    _, padded = run(tuple(padded_columns(x, 3) for x in batch), draws=draws)
    for name in ("generator_loss", "discriminator_loss", "denoising_loss", "loss"):
        np.testing.assert_allclose(padded[name], outputs[name], rtol=1e-5)


def test_without_the_extra_losses_it_is_cross_entropy_and_the_discriminator_gets_no_gradient(batch):
    module, variables = model()
    plain = dataclasses.replace(OBJECTIVE, discriminator=LossWeight(0.0), denoising=LossWeight(0.0))

    @jax.jit
    def both(params):
        def loss(params):
            return three_passes(module, params, *batch, plain, rng=jax.random.key(1))[0]

        logits = module.apply({"params": params}, *batch[:2])
        kept = batch[2] != PAD
        log_p = jax.nn.log_softmax(logits)
        nll = -jnp.take_along_axis(log_p, batch[2][..., None], axis=-1)[..., 0]
        return jax.value_and_grad(loss)(params), jnp.where(kept, nll, 0).sum()

    (value, gradient), want = both(variables["params"])
    np.testing.assert_allclose(value, want, rtol=1e-5)
    assert all(not np.any(g) for g in jax.tree.leaves(gradient["decoder.discriminator"]))
    assert any(np.any(g) for g in jax.tree.leaves(gradient["decoder.generator"]))


def test_the_context_differs_exactly_behind_the_misjudged_tokens(batch):
    _, previous, targets = batch
    rng = np.random.default_rng(0)
    draws = Draws(
        jnp.where(sampled_positions(targets, OBJECTIVE), jnp.asarray(
            rng.integers(4, MASK, targets.shape)), targets),
        jnp.asarray(rng.integers(4, MASK, targets.shape)),
    )  # fmt: skip
    draws = draws._replace(sampled=draws.sampled.at[:, 0].set(targets[:, 0]))
    verdicts = jnp.asarray(rng.integers(0, 2, targets.shape).astype(bool)).at[:, 0].set(False)
    wrong = misjudged(targets, draws, verdicts, OBJECTIVE)
    noisy = np.asarray(noisy_context(previous, wrong, draws))
    last = (targets != PAD).sum(1) - 1
    either = np.asarray(wrong.accepted | wrong.rejected)
    assert wrong.rejected[:, 0].all() and wrong.accepted.any()
    for row in range(3):
        assert not either[row, int(last[row]) :].any()
        for t in range(targets.shape[1] - 1):
            token = draws.sampled if wrong.accepted[row, t] else draws.forced
            want = token[row, t] if either[row, t] else previous[row, t + 1]
            assert noisy[row, t + 1] == want
    np.testing.assert_array_equal(noisy[:, 0], previous[:, 0])


def test_a_detector_that_is_always_right_leaves_the_denoising_loss_at_the_generation_loss(batch):
    _, outputs = run(batch)
    right = outputs["draws"].sampled == batch[2]
    wrong = misjudged(batch[2], outputs["draws"], right, OBJECTIVE)
    assert not (wrong.accepted | wrong.rejected).any()
    np.testing.assert_array_equal(noisy_context(batch[1], wrong, outputs["draws"]), batch[1])
    gold = Draws(batch[2], outputs["draws"].forced)
    none = Misjudged(*(jnp.zeros_like(right),) * 2)
    np.testing.assert_array_equal(noisy_context(batch[1], none, gold), batch[1])
    # Verdicts that are "gold" everywhere are right where nothing is replaced.
    module, variables = model()
    params = variables["params"]
    head = params["decoder.discriminator"]["output_projection"]
    sure = {**head, "bias": jnp.asarray([-100.0, 100.0])}
    stack = {**params["decoder.discriminator"], "output_projection": sure}
    found = jax.jit(lambda p: three_passes(module, p, *batch, OBJECTIVE, draws=gold))(
        {**params, "decoder.discriminator": stack}
    )[1]
    np.testing.assert_allclose(found["denoising_loss"], found["generator_loss"], rtol=1e-6)


def test_a_batch_without_words_has_no_detection_loss_and_no_nan(batch):
    source, previous, targets = batch
    for empty in (jnp.full_like(targets, PAD), jnp.where(targets == PAD, PAD, MASK + 3)):
        loss, outputs = run((source, previous, empty))
        assert np.isfinite(loss_per_token(loss, outputs)) and outputs["discriminator_loss"] == 0
        assert all(np.isfinite(v) for v in summary(outputs).values())


def test_a_tie_counts_as_gold_and_changes_no_context_behind_a_wrong_token(batch):
    module, variables = model()
    params = jax.tree.map(lambda x: x, variables["params"])
    head = params["decoder.discriminator"]["output_projection"]
    head |= {name: jnp.zeros_like(head[name]) for name in ("kernel", "bias")}
    outputs = jax.jit(
        lambda p: three_passes(module, p, *batch, OBJECTIVE, rng=jax.random.key(0))[1]
    )(params)
    assert outputs["true_positive"] + outputs["false_positive"] == outputs["words"] > 0
    assert outputs["accepted"] == 0


def test_draws_follow_the_distribution_and_forced_ones_are_never_gold():
    rng = np.random.default_rng(0)
    count, words = 100_000, 37
    logits = jnp.asarray(rng.normal(0, 2, words), jnp.float32)
    gold = jnp.full((1, count), int(logits.argmax()), jnp.int32)
    objective = Objective(words, temperature=0.5)
    draws = jax.jit(
        lambda key: draw(key, jnp.broadcast_to(logits, (1, count, words)), gold, objective)
    )(jax.random.key(0))
    p = np.asarray(jax.nn.softmax(logits / 0.5), np.float64)
    seen = np.bincount(np.asarray(draws.sampled[0]), minlength=words)
    often = p * count > 5
    statistic = ((seen - p * count)[often] ** 2 / (p * count)[often]).sum()
    assert scipy.stats.chi2.sf(statistic, often.sum() - 1) > 1e-3
    forced = np.bincount(np.asarray(draws.forced[0]), minlength=words)
    assert forced[int(gold[0, 0])] == 0
    q = np.where(np.arange(words) == int(gold[0, 0]), 0, p)
    q, often = q / q.sum(), q / q.sum() * count > 5
    statistic = ((forced - q * count)[often] ** 2 / (q * count)[often]).sum()
    assert scipy.stats.chi2.sf(statistic, often.sum() - 1) > 1e-3


def test_a_certain_gold_token_can_still_be_replaced():
    logits = jnp.zeros((1, 2000, 11)).at[..., 3].set(1000.0)
    draws = draw(jax.random.key(2), logits, jnp.full((1, 2000), 3), Objective(11))
    assert (draws.sampled == 3).all() and not (draws.forced == 3).any()
    assert len(np.unique(draws.forced)) == 10


@pytest.mark.parametrize("words", [1, 2, 5, 64, 1000])
def test_words_without_probability_are_never_drawn(words):
    logits = jnp.where(jnp.arange(words) % 2 == words % 2, -jnp.inf, 0.0)
    logits = logits.at[words - 1].set(1.0)
    drawn = np.asarray(sample_tokens(jax.random.key(0), jnp.broadcast_to(logits, (500, words))))
    assert drawn.min() >= 0 and np.isfinite(logits[drawn]).all()


def test_weights_start_rise_and_stay():
    weight = LossWeight(6.0, warmup_steps=300, start_steps=20)
    np.testing.assert_allclose(weight(np.array([0, 19, 20, 90, 320, 9999])), [0, 0, 0, 1.4, 6, 6])
    np.testing.assert_allclose(LossWeight(3.0, 0, 5)(np.array([4, 5])), [0, 3])
    np.testing.assert_allclose(LossWeight(3.0)(np.array([0, 5])), [3, 3])


def test_while_a_weight_is_zero_its_loss_and_its_counts_are(batch):
    later = dataclasses.replace(
        OBJECTIVE, discriminator=LossWeight(10.0, -1, 5), denoising=LossWeight(1.0, 3, 5)
    )
    detected = ("true_positive", "false_negative", "true_negative", "false_positive")
    module, variables = model()

    @jax.jit
    def at_update(update):
        key = jax.random.key(0)
        return three_passes(module, variables["params"], *batch, later, update=update, rng=key)[1]

    before, at, after = map(at_update, (4, 5, 6))
    np.testing.assert_array_equal(before["loss"], before["generator_loss"])
    for outputs in (before, at):
        assert not any(outputs[k] for k in ("logged_denoising_loss", "accepted", "rejected"))
    assert not before["logged_discriminator_loss"] and not any(before[k] for k in detected)
    assert at["discriminator_loss"] > 0 and sum(at[k] for k in detected) == at["words"]
    assert after["denoising_loss"] > 0 and after["misjudged_count"] > 0


def test_smoothing_moves_mass_to_all_words():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 5)), jnp.float32)
    log_p = np.asarray(jax.nn.log_softmax(logits))[0]
    got = token_losses(logits, jnp.asarray([[1, 4]]), 0.1)[0]
    want = [-(1 - 0.1 - 0.025) * log_p[i, t] - 0.025 * log_p[i].sum() for i, t in ((0, 1), (1, 4))]
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_sentinels_outside_the_dictionary_are_named():
    Objective(59).check(160)
    for mask_id in (60, 160, 0):
        with pytest.raises(ValueError, match=f"mask_id {mask_id} and .* the dictionary of 160"):
            Objective(mask_id).check(160)
