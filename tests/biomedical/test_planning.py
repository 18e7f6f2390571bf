"""Plans, folds and preprocessing: the specification's check values, and what is undone."""

import numpy as np
import pytest

from jaxmodels.biomedical import folds, planning, preprocessing


def plan(spacing, shape, cases=100, **arguments):
    voxels = float(np.prod(shape)) * cases
    return planning.plan_network(
        spacing, shape, channels=1, classes=3, dataset_voxels=voxels, **arguments
    )


def test_check_values_of_three_data_sets():
    hippocampus = plan((1, 1, 1), (36, 50, 35), 260)
    assert hippocampus.patch_size == (40, 56, 40) and hippocampus.batch_size == 9
    assert len(hippocampus.strides) == 4
    liver = plan((1, 0.7676, 0.7676), (482, 512, 512), 131)
    assert liver.patch_size == (128, 128, 128) and liver.batch_size == 2
    assert len(liver.strides) == 6
    flat = plan((1, 1), (512, 512), 20)
    assert flat.patch_size == (512, 512) and len(flat.strides) == 8


def test_the_median_of_an_even_number_of_shapes_may_end_in_a_half():
    assert planning.pool_topology((1, 1, 1), (40.5, 50, 35)).patch == (48, 56, 40)
    assert plan((1, 1, 1), (40.5, 50, 35)).patch_size == (48, 56, 40)
    assert plan((1, 1, 1), (40, 50, 35)).patch_size == (40, 56, 40)


def test_flat_residual_plans_fit_one_pair_of_samples_as_officially():
    # nnunetv2 2.8.1's ResEncUNetPlanner; the plain planner keeps larger patches.
    found = plan((1, 1), (1024, 1024), kind="resenc")
    assert found.patch_size == (512, 512) and found.batch_size == 12


def test_memory_grows_the_patch_and_presets_lift_the_cap():
    kind, memory, cap = planning.PRESETS["resenc_l"]
    large = plan((1, 0.8, 0.8), (482, 512, 512), kind=kind, memory_gb=memory, cap_batch=cap)
    small = plan((1, 0.8, 0.8), (482, 512, 512), kind=kind)
    assert np.prod(large.patch_size) > np.prod(small.patch_size)
    assert large.blocks == (1, 3, 4, 6, 6, 6)[: len(large.blocks)]


def test_a_low_resolution_is_planned_only_where_a_patch_is_a_small_part():
    arguments = dict(dataset_voxels=1e9, channels=1, classes=3)
    full = plan((1, 0.7676, 0.7676), (482, 512, 512))
    low = planning.plan_lowres((1, 0.7676, 0.7676), (482, 512, 512), full, **arguments)
    network, spacing, shape = low
    assert np.prod(network.patch_size) / np.prod(shape) >= 0.25
    assert np.prod(shape) < np.prod((482, 512, 512)) / 2 and min(spacing) > 0.7676
    tiny = plan((1, 1, 1), (36, 50, 35))
    assert planning.plan_lowres((1, 1, 1), (36, 50, 35), tiny, **arguments) is None
    assert planning.uses_batch_dice("2d", False) and not planning.uses_batch_dice("3d_lowres", True)
    assert planning.uses_batch_dice("3d_fullres", True)
    assert not planning.uses_batch_dice("3d_fullres", False)


def test_a_much_coarser_axis_takes_its_tenth_percentile():
    spacings = np.asarray([[5.0, 1, 1]] * 9 + [[2.0, 1, 1]])
    shapes = np.asarray([[20, 200, 200]] * 10)
    target = planning.target_spacing(spacings, shapes)
    np.testing.assert_allclose(target, [np.percentile(spacings[:, 0], 10), 1, 1])
    thick = np.asarray([[150, 200, 200]] * 10)  # not few slices: the median stays
    np.testing.assert_allclose(planning.target_spacing(spacings, thick), [5, 1, 1])
    assert planning.coarsest_axis_first([1, 1, 4]) == (2, 0, 1)


def test_spacings_and_kinds_that_cannot_be_are_refused():
    for spacing in ((0, 1, 1), (float("nan"), 1, 1)):
        with pytest.raises(ValueError, match="positive"):
            plan(spacing, (30, 30, 30))
    with pytest.raises(ValueError, match="not one of plain, resenc"):
        plan((1, 1), (30, 30), kind="fancy")


def test_every_case_is_held_out_once_and_the_order_of_cases_does_not_matter():
    cases = [f"case{i:02d}" for i in range(23)]
    held = folds.cross_validation(cases[::-1])
    assert sorted(c for one in held for c in one) == cases
    assert held == folds.cross_validation(cases)
    assert held[0] == [cases[i] for i in (3, 8, 10, 17, 19)]


def test_patients_stay_together_and_leaks_are_refused():
    cases = [f"p{i // 2}_scan{i % 2}" for i in range(12)]
    groups = {c: folds.patient_of(c, r"(p\d+)_") for c in cases}
    held = folds.cross_validation(cases, 3, groups=groups)
    folds.check_leakage(held, groups)
    with pytest.raises(ValueError, match="are of one patient"):
        folds.cross_validation(cases, 3, group_regex=r"(p\d+)_")
    with pytest.raises(ValueError, match="stands in folds"):
        folds.check_leakage([["p0_scan0"], ["p0_scan1"]], groups)
    with pytest.raises(ValueError, match="occur twice"):
        folds.cross_validation(["a", "a", "b"], 2)
    with pytest.raises(ValueError, match="at least as many cases"):
        folds.cross_validation(["a", "b"], 5)
    labels = {c: i % 2 for i, c in enumerate(cases)}
    for one in folds.cross_validation(cases, 3, labels=labels):
        assert sum(labels[c] for c in one) == 2


STATISTICS = [{"mean": 50.0, "std": 10.0, "percentile_00_5": 30.0, "percentile_99_5": 80.0}]


def test_ct_is_clipped_by_pooled_statistics_and_others_are_standardized_per_case():
    image = np.asarray([[0.0, 50.0, 100.0]])[..., None]
    found = preprocessing.normalize(image, ["CT"], STATISTICS)
    np.testing.assert_allclose(found[0, :, 0], [-2, 0, 3])
    own = preprocessing.normalize(image, ["zscore"], STATISTICS)
    assert abs(own.mean()) < 1e-6 and own.std() == pytest.approx(1)
    mask = np.asarray([[False, True, True]])
    inside = preprocessing.normalize(image, ["zscore"], STATISTICS, mask)
    np.testing.assert_allclose(inside[0, :, 0], [0, -1, 1])
    assert preprocessing.normalization_of("ct") == "CT"
    assert preprocessing.normalization_of("T1") == "zscore"
    with pytest.raises(ValueError, match="no normalization"):
        preprocessing.normalize(image, ["magic"], STATISTICS)


def test_preprocessing_is_undone_on_the_original_grid():
    rng = np.random.default_rng(0)
    label = np.zeros((24, 20, 10), np.int16)
    label[6:16, 5:14, 3:8] = 1
    image = np.zeros((24, 20, 10, 1), np.float32)
    image[2:22, 3:18, 1:9] = rng.normal(3, 1, (20, 15, 8, 1))
    image[..., 0] += 4 * label
    array, small, geometry = preprocessing.preprocess(
        image,
        (1.0, 1.0, 2.0),
        transpose=(2, 0, 1),
        target_spacing=(2.0, 0.5, 2.0),
        schemes=["zscore"],
        statistics=STATISTICS,
        use_mask=True,
        label=label,
    )
    assert array.shape[:3] == small.shape == geometry.target_shape == (8, 40, 8)
    again = preprocessing.Geometry.from_json(geometry.to_json())
    assert again == geometry
    p = np.eye(2, dtype=np.float32)[small]
    restored = preprocessing.restore_probabilities(p, geometry)
    assert restored.shape == (*label.shape, 2)
    found = preprocessing.labels_of(restored)
    assert 2 * (found * label).sum() / (found.sum() + label.sum()) > 0.85
    np.testing.assert_allclose(restored[:, :, 0], np.broadcast_to([1, 0], (24, 20, 2)))


def test_a_coarse_axis_is_resampled_on_its_own_by_nearest_slices():
    image = np.arange(4, dtype=np.float32)[:, None, None, None] * np.ones((1, 6, 6, 1), np.float32)
    found = preprocessing.resample(image, (8, 12, 12), (6, 1, 1), (3, 0.5, 0.5))
    np.testing.assert_allclose(np.unique(np.round(found, 5)), [0, 1, 2, 3])
    assert preprocessing.separate_axis((1, 1, 1), (1, 1, 5)) == 2
    assert preprocessing.separate_axis((1, 1, 2), (1, 1, 1)) is None
    labels = (image[..., 0] > 1).astype(np.int16)
    moved = preprocessing.resample_labels(labels, (8, 12, 12), (6, 1, 1), (3, 0.5, 0.5))
    assert moved.mean() == pytest.approx(0.5)


def test_regions_above_one_half_write_in_order():
    p = np.asarray([[0.9, 0.2], [0.9, 0.7], [0.1, 0.4]])
    assert preprocessing.labels_of(p, regions=(1, 2)).tolist() == [1, 2, 0]


def test_regions_outside_the_crop_are_absent_and_unknown_voxels_are_background():
    geometry = preprocessing.Geometry((0,), (4,), (1.0,), ((1, 3),), (1.0,), (2,))
    p = np.full((2, 2), 0.9, np.float32)
    regions = preprocessing.restore_probabilities(p, geometry, regions=True)
    np.testing.assert_allclose(regions[:, 0], [0, 0.9, 0.9, 0])
    classes = preprocessing.restore_probabilities(p, geometry)
    np.testing.assert_allclose(classes[:, 0], [1, 0.9, 0.9, 1])
    predicted, reference = preprocessing.annotated(np.asarray([1, 1]), np.asarray([1, 3]), 3)
    assert predicted.tolist() == reference.tolist() == [1, 0]
