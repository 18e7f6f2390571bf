"""The order of examples is a pure function of (seed, step), on any number of processes."""

import itertools

import ml_collections
import numpy as np
import pytest

from train.data import digits, pipeline


@pytest.fixture(scope="module")
def data(prepared_path):
    return {"name": "digits", "options": {"path": prepared_path, "image_size": 8, "augment": True}}


def take(iterator, count):
    batches = list(itertools.islice(iterator, count))
    iterator.close()
    return batches


def stacked(batches, key="image"):
    return np.concatenate([batch[key] for batch in batches])


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_together_read_the_batches_that_one_process_reads(data, process_count):
    alone = take(pipeline.train_batches(data, batch_size=8, seed=1), 4)
    parts = [
        take(
            pipeline.train_batches(
                data, batch_size=8, seed=1, process_index=p, process_count=process_count
            ),
            4,
        )
        for p in range(process_count)
    ]
    for step, batch in enumerate(alone):
        for key in ("image", "label"):
            together = np.concatenate([part[step][key] for part in parts])
            np.testing.assert_array_equal(together, batch[key])


@pytest.mark.parametrize("start", [1, 3, 700])
def test_starting_at_a_step_gives_the_batches_of_an_uninterrupted_run(data, start):
    # 700 * 8 examples lie in the fifth epoch.
    uninterrupted = pipeline.train_batches(data, batch_size=8, seed=2, start_step=start - 1)
    expected = take(uninterrupted, 3)[1:]
    for p in range(2):
        resumed = take(
            pipeline.train_batches(
                data, batch_size=8, seed=2, start_step=start, process_index=p, process_count=2
            ),
            2,
        )
        for got, want in zip(resumed, expected):
            np.testing.assert_array_equal(got["image"], want["image"][4 * p : 4 * p + 4])


def test_the_seed_alone_decides_the_order(data):
    first, again, other = (
        stacked(take(pipeline.train_batches(data, batch_size=64, seed=seed), 2))
        for seed in (5, 5, 6)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def source_positions(prepared_path, seed, epochs):
    """Which training example each position of the first epochs shows, told by its pixels."""
    options = {"path": prepared_path, "image_size": 8}
    data = {"name": "digits", "options": options}
    pool = digits.source("train", pipeline.resolve(data)[1]).arrays["image"]
    place = {image.tobytes(): i for i, image in enumerate(pool)}
    assert len(place) == 1347  # no two digits are the same, so that pixels tell them apart
    batches = take(pipeline.train_batches(data, batch_size=449, seed=seed), 3 * epochs)
    images = stacked(batches)[..., 0]
    return np.array([place[image.tobytes()] for image in images]).reshape(epochs, 1347)


def test_every_epoch_holds_every_example_once_in_a_new_order(prepared_path):
    first, second, third = source_positions(prepared_path, seed=0, epochs=3)
    for epoch in (first, second, third):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(1347))
    assert np.mean(first == second) < 0.02 and np.mean(second == third) < 0.02
    assert np.mean(first == np.arange(1347)) < 0.02


def test_neighboring_seeds_do_not_share_epochs(prepared_path):
    # Grain seeds epoch e with seed + e; unhashed, seed 0's second epoch would be seed 1's first.
    _, second = source_positions(prepared_path, seed=0, epochs=2)
    (first,) = source_positions(prepared_path, seed=1, epochs=1)
    assert np.mean(first == second) < 0.02


def test_augmentation_differs_between_epochs_and_not_between_runs(data):
    # 1347 = 3 * 449: the batches of steps 0 and 3 show whole thirds of two epochs.
    (one,) = take(pipeline.train_batches(data, batch_size=1347, seed=0), 1)
    (two,) = take(pipeline.train_batches(data, batch_size=1347, seed=0, start_step=1), 1)
    seen = {image.tobytes() for image in one["image"]}
    assert len(seen & {image.tobytes() for image in two["image"]}) < 10


@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_evaluation_shows_every_example_once_and_masks_the_padding(prepared_path, process_count):
    data = {"name": "digits", "options": {"path": prepared_path, "image_size": 8}}
    parts = [
        list(
            pipeline.eval_batches(
                data, "test", batch_size=64, process_index=p, process_count=process_count
            )
        )
        for p in range(process_count)
    ]
    assert {len(part) for part in parts} == {8}  # ceil(450 / 64)
    for batch in itertools.chain(*parts):
        assert batch["image"].shape == (64 // process_count, 8, 8, 3)
        assert batch["mask"].shape == (64 // process_count,)
        assert batch["mask"].dtype == np.float32
    rows = [np.concatenate([part[t]["image"] for part in parts]) for t in range(8)]
    masks = [np.concatenate([part[t]["mask"] for part in parts]) for t in range(8)]
    images, mask = np.concatenate(rows), np.concatenate(masks)
    np.testing.assert_array_equal(mask, np.arange(512) < 450)
    assert not images[450:].any()
    expected = digits.source("test", pipeline.resolve(data)[1]).arrays["image"]
    np.testing.assert_array_equal(images[:450, :, :, 0], expected)


@pytest.mark.parametrize("name", ["digits", "textures", "faces", "imagenet"])
def test_element_spec_needs_no_data(name, monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "absent"))
    spec = pipeline.element_spec({"name": name, "options": {"image_size": 64}})
    assert spec["image"].shape == (64, 64, 3) and spec["image"].dtype == np.float32
    assert spec["label"].shape == () and spec["label"].dtype == np.int32
    assert set(pipeline.split_sizes({"name": name})) == set(pipeline.load(name).SPLITS)
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize("name", ["digits", "textures", "faces"])
def test_batches_and_sizes_are_as_the_specification_says(name, prepared_path):
    data = {"name": name, "options": {"path": prepared_path, "image_size": 32}}
    spec, sizes = pipeline.element_spec(data), pipeline.split_sizes(data)
    (batch,) = take(pipeline.train_batches(data, batch_size=4, seed=0), 1)
    assert set(batch) == set(spec)
    for key, value in batch.items():
        assert type(value) is np.ndarray
        assert value.shape == (4, *spec[key].shape) and value.dtype == spec[key].dtype
    shown = sum(
        batch["mask"].sum()
        for batch in pipeline.eval_batches(data, pipeline.eval_split(data), batch_size=32)
    )
    assert shown == sizes[pipeline.eval_split(data)]


def test_worker_processes_give_the_same_batches_as_threads(imagenet_path):
    options = {"path": imagenet_path, "image_size": 16}
    by_threads, by_workers = (
        take(
            pipeline.train_batches(
                {"name": "imagenet", "options": {**options, "workers": workers}},
                batch_size=4,
                seed=3,
                start_step=2,
            ),
            5,
        )
        for workers in (0, 2)
    )
    for threads, workers in zip(by_threads, by_workers):
        np.testing.assert_array_equal(threads["image"], workers["image"])
        np.testing.assert_array_equal(threads["label"], workers["label"])
        assert type(workers["image"]) is np.ndarray


def test_config_dicts_are_read_as_plain_mappings_are(prepared_path):
    config = ml_collections.ConfigDict(
        {"name": "digits", "options": {"path": prepared_path, "image_size": 8}}
    )
    plain = {"name": "digits", "options": {"path": prepared_path, "image_size": 8}}
    for given in (config, ml_collections.FrozenConfigDict(config)):
        (got,), (want,) = (
            take(pipeline.train_batches(d, batch_size=8, seed=0), 1) for d in (given, plain)
        )
        np.testing.assert_array_equal(got["image"], want["image"])


def test_a_closed_iterator_is_at_its_end(data):
    batches = pipeline.train_batches(data, batch_size=4, seed=0)
    next(batches)
    batches.close()
    assert next(batches, None) is None
    batches.close()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"name": "digit"}, r"unknown data.name 'digit'; did you mean 'digits'\?"),
        (
            {"name": "pipeline"},
            r"unknown data.name 'pipeline'.*digits, .*faces, .*imagenet, .*textures",
        ),
        ({"name": "imagenet:folder"}, "variant of imagenet 'folder'; did you mean 'folders'"),
        ({"name": "digits", "options": {"imagesize": 32}}, "did you mean 'image_size'"),
        ({"name": "digits", "options": {"image_size": 2}}, "data.options.image_size .* >= 8"),
        ({"name": "textures", "options": {"image_size": 200}}, "from 1 to 172, not 200"),
        ({"options": {}}, "config.data needs a key `name`"),
    ],
)
def test_a_wrong_config_is_one_line_with_what_would_be_right(wrong, message):
    with pytest.raises(ValueError, match=message) as caught:
        pipeline.element_spec(wrong)
    assert "\n" not in str(caught.value)


def test_a_batch_that_the_processes_cannot_share_is_refused(data):
    with pytest.raises(ValueError, match="batch_size = 10 must be a positive multiple of the 4"):
        pipeline.train_batches(data, batch_size=10, seed=0, process_count=4)
    with pytest.raises(ValueError, match="batch_size = 10"):
        pipeline.eval_batches(data, "test", batch_size=10, process_count=4)
    with pytest.raises(ValueError, match=r"unknown split of digits 'tests'; did you mean 'test'"):
        pipeline.eval_batches(data, "tests", batch_size=10)
