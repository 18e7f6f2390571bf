"""Metrics against scikit-learn and geometry: spacing, empty masks, ties, one class."""

import numpy as np
import pytest
from sklearn import metrics as reference

from jaxmodels.biomedical import metrics, surface_distance
from jaxmodels.biomedical.surface_table import NEIGHBOR_NORMALS

RNG = np.random.default_rng(1)


def ball(center, radius, shape=(20, 22, 18)):
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), -1)
    return ((grid - center) ** 2).sum(-1) <= radius**2


@pytest.mark.parametrize("distances", ["surface_distances", "voxel_distances"])
def test_doubling_the_spacing_doubles_every_distance(distances):
    find = getattr(surface_distance, distances)
    a, b = ball((9, 10, 8), 5), ball((10, 12, 9), 6)
    one, two = find(a, b, (1.5, 1, 0.7)), find(a, b, (3, 2, 1.4))
    for percent in (95, 100):
        assert np.isclose(
            2 * surface_distance.hausdorff(one, percent), surface_distance.hausdorff(two, percent)
        )
    assert np.allclose(
        2 * surface_distance.average_surface_distance(one),
        surface_distance.average_surface_distance(two),
    )
    assert np.isclose(surface_distance.surface_dice(one, 1), surface_distance.surface_dice(two, 2))


@pytest.mark.parametrize("distances", ["surface_distances", "voxel_distances"])
def test_a_shifted_mask_is_as_far_as_it_was_shifted_wherever_it_lies(distances):
    find = getattr(surface_distance, distances)
    mask = np.zeros((12, 12), bool)
    mask[0:5, 3:8] = True  # touches the border
    moved = np.roll(mask, 2, axis=0)
    assert surface_distance.hausdorff(find(mask, moved, (3, 1))) == pytest.approx(6)
    assert surface_distance.hausdorff(find(mask, mask, (3, 1))) == 0
    assert surface_distance.surface_dice(find(mask, mask), 0) == 1


def test_empty_masks_are_infinite_missing_or_zero():
    full, empty = ball((9, 9, 9), 4), np.zeros((20, 22, 18), bool)
    one, both = (surface_distance.surface_distances(x, empty) for x in (full, empty))
    assert surface_distance.hausdorff(one, 95) == np.inf
    assert surface_distance.hausdorff(both) == 0
    assert np.isinf(surface_distance.average_surface_distance(one)).all()
    assert np.isnan(surface_distance.symmetric_surface_distance(both))
    assert surface_distance.surface_dice(one, 5) == 0
    assert np.isnan(surface_distance.surface_dice(both, 5))
    assert np.isnan(metrics.dice(empty, empty)) and metrics.dice(empty, empty, 1.0) == 1
    assert metrics.dice(full, empty) == metrics.iou(empty, full) == 0


def test_the_area_of_a_plane_and_of_a_ball_are_right():
    assert NEIGHBOR_NORMALS.shape == (256, 4, 3)
    half = np.zeros((10, 6, 6), bool)
    half[:5] = True
    codes = surface_distance.neighbor_codes(half)[1:-1, 1:-1, 1:-1]
    areas = surface_distance.area_table((2, 3, 5))[codes]
    assert areas.sum() == pytest.approx(25 * 3 * 5)
    found = surface_distance.surface_distances(ball((9, 10, 8), 7), ball((9, 10, 8), 7))
    assert found.sizes[0].sum() == pytest.approx(4 * np.pi * 7**2, rel=0.1)


def test_masks_of_different_shapes_are_refused():
    for function in (metrics.dice, metrics.iou, surface_distance.surface_distances):
        with pytest.raises(ValueError, match="shape"):
            function(np.zeros((3, 3)), np.zeros((3, 4)))


def test_means_leave_out_missing_classes_and_say_how_many():
    table = np.asarray([[1.0, np.nan], [0.5, 0.25]])
    with pytest.warns(UserWarning, match="1 of 4 values"):
        means, mean = metrics.mean_over_cases(table)
    np.testing.assert_allclose(means, [0.75, 0.25])
    assert mean == 0.5


def test_image_level_metrics_equal_scikit_learn_with_ties():
    labels = RNG.integers(0, 2, 60)
    scores = np.round(RNG.random(60) + 0.3 * labels, 1)
    assert metrics.auroc(labels, scores) == pytest.approx(reference.roc_auc_score(labels, scores))
    assert metrics.average_precision(labels, scores) == pytest.approx(
        reference.average_precision_score(labels, scores)
    )
    p = np.clip(scores / 2, 0, 1)
    assert metrics.brier(labels, p) == pytest.approx(reference.brier_score_loss(labels, p))
    labels, predicted = RNG.integers(0, 4, 80), RNG.integers(0, 4, 80)
    found = metrics.classification_report(labels, predicted, 4)
    assert found["mcc"] == pytest.approx(reference.matthews_corrcoef(labels, predicted))
    assert found["f1"] == pytest.approx(reference.f1_score(labels, predicted, average="macro"))
    assert found["balanced_accuracy"] == pytest.approx(
        reference.balanced_accuracy_score(labels, predicted)
    )


def test_one_class_is_an_error_and_not_a_number():
    for call in (
        lambda: metrics.auroc([1, 1], [0.2, 0.3]),
        lambda: metrics.average_precision([0, 0], [0.2, 0.3]),
        lambda: metrics.classification_report([1, 1], [0, 1], 2),
    ):
        with pytest.raises(ValueError, match=r"both classes|one class"):
            call()


def test_calibration_error_is_zero_when_confidence_is_accuracy():
    p = np.tile([0.25, 0.75], (400, 1))
    labels = np.asarray([0, 1, 1, 1] * 100)
    assert metrics.expected_calibration_error(labels, p) == pytest.approx(0)
    assert metrics.expected_calibration_error(1 - labels, p) == pytest.approx(0.5)


def test_instances_are_matched_once_and_missed_ones_count():
    reference_map = np.zeros((10, 30), int)
    for k in range(3):
        reference_map[2:8, 10 * k + 1 : 10 * k + 7] = k + 1
    predicted = np.where(reference_map == 3, 0, reference_map)
    predicted[2:8, 11:13] = 0  # the second object loses a third
    predicted[0:2, 25:29] = 9
    for greedy in (False, True):
        found = metrics.detection_scores(reference_map, predicted, greedy=greedy)
        assert found["detection_f1"] == pytest.approx(4 / 6)
        assert found["segmentation_quality"] == pytest.approx((1 + 2 / 3) / 2)
        assert found["panoptic_quality"] == pytest.approx(4 / 6 * 5 / 6)


def test_intervals_cover_the_mean_and_widen_for_clusters():
    values = RNG.normal(size=40).repeat(5)
    mean, low, high = metrics.bootstrap_interval(values)
    _, far_low, far_high = metrics.bootstrap_interval(values, groups=np.arange(40).repeat(5))
    assert low < mean < high and far_high - far_low > 1.5 * (high - low)
    gain = metrics.paired_interval({"a": 0.5, "b": 0.6}, {"a": 0.7, "b": 0.8})
    np.testing.assert_allclose(gain, (0.2, 0.2, 0.2))
