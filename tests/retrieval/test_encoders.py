"""Dual, cross and late-interaction encoders, and losses over many devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxmodels
from jaxmodels.interop import catalog
from jaxmodels.interop.conversion import CheckpointMismatch
from jaxmodels.retrieval import losses
from jaxmodels.retrieval.cross_encoder import CrossEncoder
from jaxmodels.retrieval.dual_encoder import DualEncoder, in_chunks
from jaxmodels.retrieval.late_interaction import maxsim

TINY = dict(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=16,
    max_position_embeddings=10,
)
RNG = np.random.default_rng(0)
QUERIES = jnp.asarray(RNG.integers(1, 40, (8, 5)))
DOCUMENTS = jnp.asarray(RNG.integers(1, 40, (16, 9)))


@functools.cache
def dual(share_weight=False):
    module = DualEncoder(**TINY, share_weight=share_weight)
    return module, catalog.initialize(module)


def loss_and_gradient(params, queries, documents, chunks=1, rng=None):
    module, _ = dual()

    def loss_of(params):
        def encode(method, ids, key):
            return module.apply(
                {"params": params},
                ids,
                None,
                key is not None,
                method=method,
                rngs=None if key is None else {"dropout": key},
            )

        vectors = [
            in_chunks(functools.partial(encode, method), chunks, ids, rng=rng)
            for method, ids in (("encode_queries", queries), ("encode_documents", documents))
        ]
        return losses.in_batch_nll(*vectors, scales=(0.25, 1.0))[0]

    return jax.value_and_grad(loss_of)(params)


def over(count, *arrays):
    mesh = Mesh(np.array(jax.devices()[:count]), ("data",))
    return [jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))) for x in arrays]


def test_loss_and_gradient_are_those_of_one_device_on_any_number():
    params = dual()[1]["params"]
    wanted = jax.jit(loss_and_gradient)(params, QUERIES, DOCUMENTS)
    got = jax.jit(loss_and_gradient)(params, *over(8, QUERIES, DOCUMENTS))
    np.testing.assert_allclose(got[0], wanted[0], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got[1], wanted[1])
    vectors = [jnp.asarray(RNG.standard_normal((n, 6)), jnp.float32) for n in (8, 16)]
    of_vectors = jax.jit(jax.value_and_grad(lambda q, d: losses.in_batch_nll(q, d)[0], (0, 1)))
    wanted = of_vectors(*vectors)
    for count in (2, 4):
        got = of_vectors(*over(count, *vectors))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, wanted)


def test_gathering_in_a_mapped_function_has_the_true_gradient_or_the_originals():
    queries, documents = (jnp.asarray(RNG.standard_normal((n, 6)), jnp.float32) for n in (8, 16))
    wanted = jax.grad(lambda q, d: losses.in_batch_nll(q, d)[0], (0, 1))(queries, documents)
    devices = 4

    def mapped(gradient):
        def one(weight, q, d):
            def loss_of(weight):
                whole = (losses.gather(x * weight, "i", gradient) for x in (q, d))
                return losses.in_batch_nll(*whole)[0]

            return jax.lax.pmean(jax.grad(loss_of)(weight), "i")

        split = (x.reshape(devices, -1, 6) for x in (queries, documents))
        run = jax.pmap(one, "i", in_axes=(None, 0, 0), devices=jax.devices()[:devices])
        return float(run(jnp.float32(1.0), *split)[0])

    truth = sum(float((g * x).sum()) for g, x in zip(wanted, (queries, documents)))
    assert mapped("true") == pytest.approx(truth, rel=1e-5)
    assert mapped("local_average") == pytest.approx(truth / devices, rel=1e-5)
    with pytest.raises(ValueError, match="gather_gradient 'mean'; known"):
        losses.gather(queries, "i", "mean")


@pytest.mark.parametrize("rng", [None, jax.random.key(3)])
def test_chunks_give_the_direct_gradient(rng):
    params = dual()[1]["params"]
    run = jax.jit(loss_and_gradient, static_argnums=3)
    loss, gradient = run(params, QUERIES, DOCUMENTS, 4, rng)
    if rng is None:
        wanted = run(params, QUERIES, DOCUMENTS, 1)
        np.testing.assert_allclose(loss, wanted[0], rtol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradient, wanted[1])
    else:
        # Dropout is drawn alike in both passes: a step against the gradient goes down.
        lower = run(
            jax.tree.map(lambda p, g: p - 0.05 * g, params, gradient), QUERIES, DOCUMENTS, 4, rng
        )
        assert lower[0] < loss
    with pytest.raises(ValueError, match="8 rows do not divide into 3 chunks"):
        in_chunks(lambda x, rng: x, 3, QUERIES)


def test_shared_towers_travel_under_both_prefixes_and_must_agree():
    module, variables = dual(share_weight=True)
    state = catalog.export("retrieval.dual_encoder", module, variables)
    assert sum(k.startswith("ctx_model.") for k in state) == len(state) // 2
    _, loaded = jaxmodels.load("retrieval.dual_encoder", state, **TINY, share_weight=True)
    q, d = module.apply(loaded, QUERIES, None, QUERIES)
    np.testing.assert_array_equal(q, d)
    name = "ctx_model.pooler.dense.bias"
    with pytest.raises(CheckpointMismatch, match=r"ctx_model\.pooler\.dense\.bias differs"):
        jaxmodels.load(
            "retrieval.dual_encoder", {**state, name: state[name] + 1}, **TINY, share_weight=True
        )


def test_padding_rows_become_zero_vectors_under_jit_and_errors_outside():
    module, variables = dual()
    ids = QUERIES.at[3].set(0)
    encode = functools.partial(module.apply, variables, method="encode_queries")
    vectors = jax.jit(encode)(ids)
    assert not vectors[3].any() and np.isfinite(vectors).all() and vectors[2].any()
    with pytest.raises(ValueError, match="row 3 is all padding"):
        encode(ids)


def test_layer_scores_of_the_cross_encoder_end_in_its_relevance():
    module = CrossEncoder(**{**TINY, "num_hidden_layers": 2}, binary_head=False)
    variables = catalog.initialize(module)
    rows = DOCUMENTS.reshape(4, 4, 9)
    layers = module.apply(variables, rows, method="layer_relevance")
    assert layers.shape == (2, 4, 4)
    np.testing.assert_allclose(layers[-1], module.apply(variables, rows), atol=1e-6)
    official = {**catalog.export("retrieval.cross_encoder", module, variables)}
    official |= {"binary.weight": np.zeros((2, 16)), "binary.bias": np.zeros(2)}
    arguments = {**TINY, "num_hidden_layers": 2, "binary_head": False}
    jaxmodels.load("retrieval.cross_encoder", official, **arguments)


def test_maxsim_ignores_masked_tokens_and_equals_the_plain_formula():
    q, d = (jnp.asarray(RNG.standard_normal(s), jnp.float32) for s in ((2, 3, 4), (5, 6, 4)))
    mask = jnp.ones((5, 6), jnp.int32)
    plain = jnp.einsum("bqh,dlh->bdql", q, d).max(-1).sum(-1)
    np.testing.assert_allclose(maxsim(q, d, mask), plain, atol=1e-6)
    hidden = mask.at[:, 4:].set(0)
    changed = d.at[:, 4:].set(100.0)
    np.testing.assert_array_equal(maxsim(q, changed, hidden), maxsim(q, d, hidden))
    with pytest.raises(ValueError, match=r"document mask None"):
        maxsim(q, d, None)


def test_losses_refuse_what_does_not_fit():
    q, d = jnp.ones((3, 2)), jnp.ones((7, 2))
    with pytest.raises(ValueError, match="7 documents are not a multiple of 3 queries"):
        losses.in_batch_nll(q, d)
    with pytest.raises(ValueError, match=r"positive_index 0\.\.7 for 7 documents of 3 queries"):
        losses.in_batch_nll(q, d, np.array([0, 3, 7]))
    with pytest.raises(ValueError, match="temperature must be positive, not 0"):
        losses.distillation(q, q, 0)
    with pytest.raises(ValueError, match="loss weight kd must be a number >= 0, not -1"):
        losses.check_weights(kd=-1)
    with pytest.raises(ValueError, match=r"student scores \(3, 2\), teacher scores \(7, 2\)"):
        losses.logit_distance(q, d)


def test_divergence_is_finite_at_extreme_scores_and_zero_of_equal_ones():
    extreme = jnp.array([[1e4, 0.0, -1e4]])
    assert np.isfinite(losses.kl(extreme, -extreme)) and losses.kl(extreme, extreme) == 0
