"""Components and post-processing: what is kept, what is refused, pure JAX against scipy."""

from types import SimpleNamespace

import numpy as np
import pytest

from jaxmodels.biomedical import (
    components,
    ensembling,
    metrics,
    postprocessing,
    preprocessing,
    ranking,
)
from train import challenge_choices, challenge_report

RNG = np.random.default_rng(2)


def blob_with_islands(seed):
    rng = np.random.default_rng(seed)
    reference = np.zeros((32, 32), np.int32)
    reference[8:20, 6:18] = 1
    reference[12:16, 10:14] = 2
    predicted = reference.copy()
    for y, x in rng.integers(22, 30, (3, 2)):
        predicted[y : y + 2, x : x + 2] = 1
    return reference, predicted


@pytest.mark.parametrize("shape", [(17, 23), (7, 9, 8)])
@pytest.mark.parametrize("connectivity", ["face", "full"])
def test_label_propagation_finds_the_components_of_scipy(shape, connectivity):
    for density in (0.3, 0.5, 0.7):
        mask = RNG.random(shape) < density
        ours = np.asarray(components.propagate_labels(mask, connectivity))
        theirs, _ = components.label_components(mask, connectivity)
        pairs = set(zip(ours.reshape(-1).tolist(), theirs.reshape(-1).tolist()))
        assert len(pairs) == len(set(ours.reshape(-1))) == len(set(theirs.reshape(-1)))


def test_a_long_spiral_is_one_component():
    mask = np.ones((15, 15), bool)
    for k in range(1, 14, 2):
        mask[k, (k // 2) % 2 : 14 + (k // 2) % 2] = False
    labels = np.asarray(components.propagate_labels(mask, "face"))
    assert set(labels[mask]) == {1}


def test_planted_islands_are_removed_and_the_choice_is_stored():
    pairs = [blob_with_islands(seed) for seed in range(4)]
    predictions = [p for _, p in pairs]
    references = [r for r, _ in pairs]
    operations, record = postprocessing.search(predictions, references, [1, 2])
    assert next(o.name for o in operations) == "largest_component"
    again = [postprocessing.Operation.from_json(o.to_json()) for o in operations]
    for p, r in zip(predictions, references):
        np.testing.assert_array_equal(postprocessing.apply(p, again), r)
    assert any(row.get("kept") for row in record)


def test_nothing_is_kept_that_lowers_a_class():
    # Two true objects: keeping the largest would lose one of them.
    reference = np.zeros((20, 20), np.int32)
    reference[2:8, 2:8], reference[12:16, 12:16] = 1, 1
    predicted = reference.copy()
    predicted[10, 2] = 1
    operations, record = postprocessing.search([predicted], [reference], [1])
    assert operations == [] and record[0]["worse_class"]
    # Small objects can go, though, and the size comes from the sweep.
    operations, _ = postprocessing.search([predicted], [reference], [1], optional=True)
    assert [o.name for o in operations] == ["remove_small"]
    np.testing.assert_array_equal(postprocessing.apply(predicted, operations), reference)


def test_a_perfect_prediction_needs_no_post_processing():
    reference, _ = blob_with_islands(0)
    operations, _ = postprocessing.search([reference], [reference], [1, 2], optional=True)
    assert operations == []


def test_unknown_operations_and_other_shapes_are_refused():
    with pytest.raises(ValueError, match="no post-processing operation 'blur'"):
        postprocessing.Operation.from_json({"name": "blur", "labels": [1], "arguments": {}})
    with pytest.raises(ValueError, match="case 0: prediction"):
        postprocessing.search([np.zeros((3, 3))], [np.zeros((4, 3))], [1])
    with pytest.raises(ValueError, match="connectivity 3"):
        components.structure(2, 3)


def test_the_threshold_sweep_takes_the_first_best():
    values, best = postprocessing.threshold_sweep(
        np.asarray([0.1, 0.4, 0.8, 0.9]), np.asarray([0, 0, 1, 1])
    )
    assert values.shape == (101,) and values.max() == 1 and best == pytest.approx(0.41)
    # What two halves have adds up; the order of thresholds is the caller's.
    scores, truth = RNG.random(60).round(2), RNG.random(60) < 0.4
    whole = postprocessing.threshold_counts(scores, truth)
    halves = [postprocessing.threshold_counts(scores[i::2], truth[i::2]) for i in (0, 1)]
    for one, parts in zip(whole, zip(*halves)):
        np.testing.assert_array_equal(one, sum(parts))
    backwards = postprocessing.threshold_counts(scores, truth, postprocessing.THRESHOLDS[::-1])
    np.testing.assert_array_equal(backwards[0][::-1], whole[0])
    t = postprocessing.THRESHOLDS[:, None]
    np.testing.assert_array_equal(whole[0], ((scores >= t) & truth).sum(1))
    np.testing.assert_array_equal(whole[1], (scores >= t).sum(1))


def members(seed, noise, count=2000):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    logits = 1.5 * np.eye(3)[labels] + noise * rng.normal(size=(count, 3))
    e = np.exp(logits)
    return labels, e / e.sum(-1, keepdims=True)


def test_weights_are_fitted_and_never_negative():
    labels, good = members(0, 0.5)
    _, bad = members(1, 1.0)  # of other labels: noise
    weights = ensembling.least_squares_weights([good, bad], labels)
    assert weights[0] > 0.8 and weights.min() >= 0 and weights.sum() == pytest.approx(1)
    mixed = ensembling.average([good, bad], weights)
    assert (mixed.argmax(-1) == labels).mean() >= 0.95 * (good.argmax(-1) == labels).mean()


def test_image_level_ensembles_of_out_of_fold_predictions_beat_the_mean_member():
    from sklearn.datasets import load_breast_cancer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.naive_bayes import GaussianNB
    from sklearn.neighbors import KNeighborsClassifier

    data = load_breast_cancer()
    x, labels = (data.data - data.data.mean(0)) / data.data.std(0), data.target
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    models = (LogisticRegression(max_iter=500), GaussianNB(), KNeighborsClassifier(9))
    p = [cross_val_predict(m, x, labels, cv=folds, method="predict_proba") for m in models]
    single = np.mean([metrics.auroc(labels, q[:, 1]) for q in p])
    weights = ensembling.least_squares_weights(p, labels)
    for combined in (
        ensembling.average(p)[:, 1],
        ensembling.average(p, weights)[:, 1],
        ensembling.median(p)[:, 1],
        ensembling.rank_average([q[:, 1] for q in p]),
        ensembling.stacked(ensembling.fit_stacking(p, labels), p)[:, 1],
    ):
        assert metrics.auroc(labels, combined) > single
    # Ranking by the Brier score of every case: smaller is better, the ensemble is no worse.
    rows = np.stack([(q[:, 1] - labels) ** 2 for q in (*p, ensembling.average(p, weights))])
    found = ranking.bootstrap_ranking(rows, samples=100, larger_better=False)
    assert found.full[3] == 1 and found.interval()[1, 1] == 4


def test_members_of_other_shapes_or_classes_are_refused():
    with pytest.raises(ValueError, match="differ in classes"):
        ensembling.average([np.zeros((4, 2)), np.zeros((4, 3))])
    with pytest.raises(ValueError, match="differ in shape"):
        ensembling.average([np.zeros((4, 2)), np.zeros((5, 2))])


def test_ties_go_to_the_simpler_ensemble_and_leaks_are_named():
    scores = {("a",): 0.8, ("b",): 0.7, ("a", "b"): 0.8}
    assert ensembling.choose(scores).members == ("a",)
    assert ensembling.candidates(["a", "b"]) == [("a",), ("b",), ("a", "b")]
    folds = [["x"], ["y"]]
    ensembling.assert_out_of_fold({"x": 0, "y": 1}, folds)
    with pytest.raises(ValueError, match="'y' was predicted by the model of fold 0"):
        ensembling.assert_out_of_fold({"x": 0, "y": 0}, folds)
    with pytest.raises(ValueError, match="'y' has no out-of-fold prediction"):
        ensembling.assert_out_of_fold({"x": 0}, folds)


KNOWN = {
    "classes": {"regions": False, "outputs": 2, "targets": {"a": [1]}, "ignore_label": 2},
    "regions": {
        "regions": True,
        "region_order": [1, 2],
        "targets": {"whole": [1, 2], "core": [2]},
        "ignore_label": None,
    },
}


@pytest.mark.parametrize("kind", KNOWN)
def test_thresholds_are_kept_where_they_help_out_of_fold(kind):
    known = KNOWN[kind]
    rng = np.random.default_rng(0)
    references, probabilities = {}, {}
    for case in "abc":
        truth = np.zeros((20, 20), np.int16)
        truth[4:14, 5:15] = 1
        truth[6:10, 7:11] = 2 if known["regions"] else 1
        # Too shy: what is there scores about 0.4.
        first = 0.3 * (truth > 0) + 0.2 * rng.random(truth.shape)
        if known["regions"]:
            parts = [first, 0.9 * (truth == 2)]
        else:
            parts = [1 - first, first]
            truth[0, :] = 2
            first[0, :] = 1.0  # nobody looked there
        references[case], probabilities[case] = truth, np.stack(parts, -1)
    found, record = challenge_choices.choose_thresholds(probabilities, references, known)
    assert 0.19 < found[0] <= 0.31 and record[0]["kept"] and record[0]["gain"] > 0.2
    if known["regions"]:
        assert found[1] == 0.5 and not record[1]["kept"]
    order = challenge_choices.region_order(known)
    labels = preprocessing.labels_of(probabilities["a"], order, found)
    seen = references["a"] != (2 if not known["regions"] else -1)
    np.testing.assert_array_equal(labels[seen], references["a"][seen])
    several = {**KNOWN["classes"], "targets": {"a": [1], "b": [2]}, "outputs": 3}
    assert challenge_choices.choose_thresholds(probabilities, references, several) == (None, [])
    with pytest.raises(ValueError, match="2 thresholds for 1 regions or classes"):
        preprocessing.labels_of(np.zeros((2, 2, 2)), None, [0.5, 0.5])


def test_intervals_draw_patients_and_an_empty_answer_to_an_empty_case_is_the_best(tmp_path):
    assert challenge_report.patients_of(["p1_a", "p1_b", "x"], r"^(p\d)_") == ["p1", "p1", "x"]
    assert challenge_report.patients_of(["p1_a"], "") is None
    cases = [f"p{i // 4}_{i}" for i in range(16)]
    gains = {c: float(int(c[1]) % 2) for c in cases}
    zero = dict.fromkeys(cases, 0.0)
    widths = []
    for regex in ("", r"^(p\d)_"):
        low, high = challenge_report._gain(zero, gains, regex).split("[")[1][:-1].split(",")
        widths.append(float(high) - float(low))
    assert widths[1] > 1.5 * widths[0]
    settings = SimpleNamespace(content={"ranking": "aggregate_then_rank", "bootstrap": 20})
    # Nothing is there in case b: one method sees that, the other does not.
    scores = {"right": {"a": 0.8, "b": float("nan")}, "wrong": {"a": 0.8, "b": 0.0}}
    table = challenge_report._ranking(scores, settings, tmp_path)
    assert "| right | 1 | 0.9000" in table and "| wrong | 2 | 0.4000" in table
