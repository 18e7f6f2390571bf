"""Exact search against a plain sort, ties, shards, devices; faiss where it is."""

import jax
import numpy as np
import pytest

from jaxmodels.retrieval.index import ExactIndex, FaissIndex

RNG = np.random.default_rng(0)
# Small integers: products are exact, and many documents tie.
DOCUMENTS = RNG.integers(-3, 4, (10_000, 64)).astype(np.float32)
DOCUMENTS[5000:5100] = DOCUMENTS[:100]
QUERIES = RNG.integers(-3, 4, (7, 64)).astype(np.float32)


def sorted_search(queries, documents, k):
    scores = queries @ documents.T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, 1), order


@pytest.mark.parametrize(
    ("chunk", "devices", "count"), [(1, 1, 60), (7, 1, 600), (1000, 8, 10_000)]
)
def test_search_equals_a_stable_sort(chunk, devices, count):
    index = ExactIndex(chunk=chunk, query_chunk=4, devices=jax.devices()[:devices])
    for part in np.array_split(DOCUMENTS[:count], 3):
        index.add(part)
    scores, rows = index.search(QUERIES, 25)
    wanted_scores, wanted_rows = sorted_search(QUERIES, DOCUMENTS[:count], 25)
    np.testing.assert_array_equal(rows, wanted_rows)
    np.testing.assert_array_equal(scores, wanted_scores)


def test_more_than_there_are_documents_is_filled_and_ids_are_given_back():
    index = ExactIndex(devices=jax.devices()[:1])
    index.add(DOCUMENTS[:3], ids=[30, 10, 20])
    scores, ids = index.search(QUERIES, 5)
    assert (ids[:, 3:] == -1).all() and np.isneginf(scores[:, 3:]).all()
    assert set(ids[0, :3]) == {10, 20, 30}


def test_approximate_search_finds_most():
    index = ExactIndex(approximate=0.95, devices=jax.devices()[:1])
    index.add(DOCUMENTS)
    rows = index.search(QUERIES, 10)[1]
    assert rows.shape == (7, 10) and (np.diff(np.sort(rows, 1), axis=1) > 0).all()


def test_faiss_finds_the_same_scores():
    pytest.importorskip("faiss")
    index = FaissIndex(64)
    index.add(DOCUMENTS[:500], ids=np.arange(500) * 2)
    scores, ids = index.search(QUERIES, 10)
    np.testing.assert_allclose(scores, sorted_search(QUERIES, DOCUMENTS[:500], 10)[0], rtol=1e-6)
    assert (ids % 2 == 0).all() and (index.search(QUERIES, 600)[1][:, 500:] == -1).all()


def test_wrong_calls_are_refused():
    index = ExactIndex()
    with pytest.raises(ValueError, match="the index is empty"):
        index.search(QUERIES, 1)
    index.add(DOCUMENTS[:5])
    for call, message in (
        (lambda: index.search(QUERIES, 0), "k must be at least 1, not 0"),
        (lambda: index.search(QUERIES[:, :3], 1), r"queries \(7, 3\) for documents of width 64"),
        (lambda: index.add(DOCUMENTS[:2, :3]), "vectors of width 3 in an index of width 64"),
        (lambda: index.add(DOCUMENTS[:2], [1]), "1 ids for 2 vectors"),
        (lambda: ExactIndex(chunk=0), "chunk 0"),
        (lambda: index.add(DOCUMENTS[:2], [7, 7]), "document id 7 is in the index twice"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    index.add(DOCUMENTS[:2], [8, 9])
    with pytest.raises(ValueError, match="document id 9 is in the index twice"):
        index.add(DOCUMENTS[:2], [10, 9])
