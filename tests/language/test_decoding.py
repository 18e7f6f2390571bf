import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.language import decoding
from tests.language import search_reference as reference

VOCABULARY, BATCH, MAX_NEW = 7, 3, 6
RULES = decoding.Constraints(start=0, eos=2, pad=0, max_new=MAX_NEW)


def model(seed=0, batch=BATCH, ends=1.0):
    """A step whose logits depend on the input and on every token so far, and its reference.

    The cache is the row's own history, so that a wrong reordering of it changes the answer.
    """
    rng = np.random.default_rng(seed)
    table = rng.normal(size=(batch, MAX_NEW + 1, VOCABULARY, VOCABULARY)).astype(np.float32) * 1.5
    table[..., 2] += ends
    table = jnp.asarray(table)

    def step(tokens, position, cache):
        rows = len(tokens)
        cache = cache.at[:, position].set(tokens)
        inputs = jnp.arange(rows) // (rows // batch)
        places = jnp.arange(MAX_NEW)
        each = table[inputs[:, None], places, cache]
        return (each * (places <= position)[None, :, None]).sum(1), cache

    def logits_of(input_):
        host = np.asarray(table)[input_]
        return lambda row: sum(host[i, token] for i, token in enumerate(row))

    return step, logits_of


def empty(rows):
    return jnp.zeros((rows, MAX_NEW), jnp.int32)


def take(cache, rows):
    return cache[rows]


def rows_of(hypotheses, input_):
    return [
        (float(s), [int(t) for t in row[: 1 + int(n)]])
        for row, n, s in zip(*(np.asarray(a[input_]) for a in hypotheses))
    ]


def assert_same(found, wanted):
    assert [r for _, r in found] == [r for _, r in wanted]
    np.testing.assert_allclose([s for s, _ in found], [s for s, _ in wanted], atol=2e-5)


@pytest.mark.parametrize(
    "rule, early, penalty",
    [
        ("hf", False, 1.0),
        ("hf", True, 0.6),
        ("hf", "never", 2.0),
        ("hf", False, 0.0),
        ("fairseq", False, 1.0),
        ("fairseq", False, 0.6),
    ],
)
@pytest.mark.parametrize("ends", [-1.0, 2.0])
def test_beam_search_finds_what_the_plain_python_search_finds(rule, early, penalty, ends):
    step, logits_of = model(seed=int(10 * penalty), ends=ends)
    rules = decoding.Constraints(
        start=0, eos=2, pad=0, max_new=MAX_NEW, force_eos=rule == "fairseq", min_new=1
    )
    beams = 4
    found = jax.jit(
        lambda: decoding.beam_search(
            step,
            empty(BATCH * beams),
            rules,
            batch=BATCH,
            beams=beams,
            returned=beams,
            rule=rule,
            length_penalty=penalty,
            early_stopping=early,
            reorder=take,
        )
    )()
    for i in range(BATCH):
        if rule == "hf":
            wanted = reference.huggingface(logits_of(i), rules, beams, penalty, early)
        else:
            wanted = reference.fairseq(logits_of(i), rules, beams, penalty)
        assert_same(rows_of(found, i), wanted)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_no_ngram_comes_twice_and_forbidden_ids_never(n):
    step, logits_of = model(seed=3, ends=-3.0)
    rules = decoding.Constraints(
        0, 2, 0, MAX_NEW, min_new=2, never=(5,), no_repeat_ngram=n, force_eos=True
    )
    found = jax.jit(
        lambda: decoding.beam_search(
            step,
            empty(BATCH * 3),
            rules,
            batch=BATCH,
            beams=3,
            returned=3,
            rule="fairseq",
            reorder=take,
        )
    )()
    for i in range(BATCH):
        assert_same(rows_of(found, i), reference.fairseq(logits_of(i), rules, 3, 1.0))
        for _, row in rows_of(found, i):
            grams = list(zip(*(row[k:] for k in range(n))))
            assert len(set(grams)) == len(grams)
            assert 5 not in row


def test_with_as_many_beams_as_rows_there_are_the_search_is_exhaustive():
    step, logits_of = model(seed=4, batch=1)
    rules = decoding.Constraints(0, 2, 0, 2)
    found = decoding.beam_search(
        step, empty(VOCABULARY), rules, batch=1, beams=VOCABULARY, length_penalty=0.0, reorder=take
    )
    best = -np.inf
    for row in itertools.product(range(VOCABULARY), repeat=2):
        if row[0] == 2 and row[1] != 0:
            continue
        n = 1 if row[0] == 2 else 2
        total = sum(reference.log_softmax(logits_of(0)([0, *row[:k]]))[row[k]] for k in range(n))
        best = max(best, total)
    np.testing.assert_allclose(found.scores[0, 0], best, atol=1e-5)


def test_one_beam_is_greedy_and_rows_do_not_depend_on_their_neighbors():
    step, _ = model(seed=5, ends=0.5)
    one = decoding.beam_search(step, empty(BATCH), RULES, batch=BATCH, beams=1, reorder=take)
    greedy = decoding.greedy(step, empty(BATCH), RULES, batch=BATCH)
    # The beam may stop before a running row that cannot win any more; its winner ended first.
    assert one.tokens[:, 0].tolist() == greedy.tokens[:, 0].tolist()
    np.testing.assert_allclose(one.scores, greedy.scores, atol=1e-6)
    lengths = np.asarray(greedy.lengths[:, 0])
    for row, n in zip(np.asarray(greedy.tokens[:, 0]), lengths):
        assert (row[1 + n :] == 0).all()


def test_truncation_keeps_the_largest_and_the_nucleus():
    logits = jnp.log(jnp.array([[0.1, 0.4, 0.2, 0.3], [0.7, 0.1, 0.1, 0.1]]))
    kept = lambda x: jnp.isfinite(x).astype(int).tolist()  # noqa: E731
    assert kept(decoding.truncate(logits, top_k=2)[:1]) == [[0, 1, 0, 1]]
    assert kept(decoding.truncate(logits, top_p=0.65)) == [[0, 1, 0, 1], [1, 0, 0, 0]]
    assert kept(decoding.truncate(logits, top_p=0.01)) == [[0, 1, 0, 0], [1, 0, 0, 0]]
    assert decoding.truncate(logits) is logits


def test_samples_follow_the_tempered_distribution_and_top_k_1_is_greedy():
    logits = jnp.array([0.0, 1.0, 2.0, -1.0, 0.5])
    rules = decoding.Constraints(start=0, eos=4, pad=0, max_new=1)
    step = lambda tokens, position, cache: (jnp.tile(logits, (len(tokens), 1)), cache)  # noqa: E731
    draw = jax.jit(
        lambda rng: decoding.sample(step, (), rules, rng, batch=20000, temperature=2.0, top_k=3)
    )
    first = draw(jax.random.key(1))
    rate = np.bincount(np.asarray(first.tokens[:, 0, 1]), minlength=5) / 20000
    wanted = np.asarray(jax.nn.softmax(jnp.array([-jnp.inf, 0.5, 1.0, -jnp.inf, 0.25])))
    np.testing.assert_allclose(rate, wanted, atol=0.015)
    log_p = jax.nn.log_softmax(logits)
    np.testing.assert_allclose(first.scores[:, 0], log_p[first.tokens[:, 0, 1]], atol=1e-6)
    step, _ = model(seed=6)
    sampled = decoding.sample(
        step, empty(BATCH), RULES, jax.random.key(0), batch=BATCH, top_k=1, temperature=0.3
    )
    greedy = decoding.greedy(step, empty(BATCH), RULES, batch=BATCH)
    assert sampled.tokens.tolist() == greedy.tokens.tolist()


def test_wrong_arguments_are_named():
    step, _ = model()
    search = lambda **k: decoding.beam_search(step, empty(BATCH * 8), RULES, batch=BATCH, **k)  # noqa: E731
    with pytest.raises(ValueError, match="2 returned rows from 1 beams"):
        decoding.beam_search(step, empty(BATCH), RULES, batch=BATCH, beams=1, returned=2)
    with pytest.raises(ValueError, match="8 beams are more than the 7 tokens"):
        search(beams=8)
    with pytest.raises(ValueError, match="fairseq"):
        search(beams=8, rule="fair")
    with pytest.raises(ValueError, match="max_new"):
        decoding.Constraints(0, 2, 0, 0)
    with pytest.raises(ValueError, match="temperature"):
        decoding.sample(step, (), RULES, jax.random.key(0), batch=BATCH, temperature=0.0)
    with pytest.raises(ValueError, match="top_p"):
        decoding.truncate(jnp.zeros((1, 3)), top_p=0.0)
