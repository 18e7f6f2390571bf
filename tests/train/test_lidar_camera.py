"""Training the pipeline's two networks: Waymo files, runs of the paper's recipe, prediction."""

import io
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxmodels.driving import box_overlap, camera_renderer, driving_scene, range_image
from jaxmodels.driving.frame import front_view
from jaxmodels.driving.patch_classifier import CLASSES
from train import frame_figures, predict
from train.__main__ import main
from train.data import (
    driving_frames,
    frame_files,
    kitti_frames,
    nuscenes_frames,
    pipeline,
    ranked_detections,
    waymo_frames,
)

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs" / "lidar_camera.py")
RING = range_image.waymo_like(32, 360)
CAMERA = camera_renderer.front_camera(0.15)


def simulated(seed):
    options = driving_scene.SceneOptions(reach=25.0, pedestrians=(4, 6))
    scene = driving_scene.sample_scene(seed, options)
    return camera_renderer.make_frame(scene, seed=seed, sensor=RING, camera=CAMERA)


def waymo_message(frame, *, compress=True, two=True, without=()):
    """A frame as the Waymo Open Dataset stores it; 2-D labels of the classes `without` left out."""
    kinds = waymo_frames.messages()
    message = kinds["Frame"](timestamp_micros=int(frame.timestamp * 1e6))
    context = message.context
    context.name = "segment"
    lidar = context.laser_calibrations.add(name=waymo_frames.TOP)
    lidar.beam_inclinations.extend(np.sort(frame.inclinations.astype(float)).tolist())
    lidar.extrinsic.transform.extend(frame.lidar_extrinsic.astype(float).ravel().tolist())
    camera = context.camera_calibrations.add(name=waymo_frames.FRONT)
    camera.intrinsic.extend(frame.camera_intrinsic.astype(float).tolist())
    camera.extrinsic.transform.extend(frame.camera_extrinsic.astype(float).ravel().tolist())
    camera.height, camera.width = frame.image.shape[:2]
    message.pose.transform.extend(np.eye(4).ravel().tolist())
    matrix = kinds["MatrixFloat"]()
    channels = np.zeros((*frame.range.shape, 4), np.float32)
    channels[..., 0] = np.where(frame.range > 0, frame.range, -1)
    channels[..., 2] = frame.elongation
    matrix.data.extend(channels.ravel().tolist())
    matrix.shape.dims.extend(channels.shape)
    data = matrix.SerializeToString()
    laser = message.lasers.add(name=waymo_frames.TOP)
    laser.ri_return1.range_image_compressed = zlib.compress(data) if compress else data
    jpeg = io.BytesIO()
    Image.fromarray(frame.image).save(jpeg, format="jpeg", quality=95)
    image = message.images.add(name=waymo_frames.FRONT, image=jpeg.getvalue())
    image.velocity.v_x, image.velocity.v_y = map(float, frame.ego_velocity)
    numbers = {name: number for number, name in waymo_frames.TYPES.items()}
    three = frame.labels3d
    for i, box in enumerate(three.boxes.astype(float)):
        label = message.laser_labels.add(
            type=numbers[CLASSES[three.classes[i]]],
            id=f"object {three.ids[i]}",
            num_lidar_points_in_box=int(three.returns[i]),
        )
        names = ("center_x", "center_y", "center_z", "length", "width", "height", "heading")
        for name, value in zip(names, box):
            setattr(label.box, name, value)
        label.metadata.speed_x, label.metadata.speed_y = map(float, three.velocity[i])
    if two:
        labels = message.camera_labels.add(name=waymo_frames.FRONT)
        for box, kind in zip(frame.labels2d.boxes.astype(float), frame.labels2d.classes):
            if CLASSES[kind] in without:
                continue
            label = labels.labels.add(type=numbers[CLASSES[kind]], id="seen")
            label.box.center_x, label.box.center_y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
            label.box.length, label.box.width = box[2] - box[0], box[3] - box[1]
    return message.SerializeToString()


@pytest.fixture(scope="module")
def waymo(tmp_path_factory):
    root = tmp_path_factory.mktemp("waymo")
    for split, seeds in (("training", range(6)), ("validation", range(6, 9))):
        (root / split).mkdir()
        records = [waymo_message(simulated(seed)) for seed in seeds]
        waymo_frames.write_records(root / split / "segment-1_with_camera_labels.tfrecord", records)
    return root


def test_a_waymo_record_gives_the_frame_that_was_stored():
    frame = simulated(0)
    found = waymo_frames.decode_frame(waymo_message(frame))
    np.testing.assert_allclose(found.range, frame.range, atol=1e-6)
    np.testing.assert_allclose(found.inclinations, frame.inclinations, atol=1e-6)
    np.testing.assert_allclose(found.azimuths, frame.azimuths, atol=1e-6)
    np.testing.assert_allclose(found.labels3d.boxes, frame.labels3d.boxes, atol=1e-5)
    np.testing.assert_array_equal(found.labels3d.classes, frame.labels3d.classes)
    np.testing.assert_array_equal(found.labels3d.returns, frame.labels3d.returns)
    np.testing.assert_allclose(found.labels2d.boxes, frame.labels2d.boxes, atol=1e-4)
    np.testing.assert_allclose(found.ego_velocity, frame.ego_velocity)
    assert np.abs(found.image.astype(int) - frame.image).mean() < 6 and found.wraps
    projected = waymo_frames.decode_frame(waymo_message(frame, two=False)).labels2d
    assert len(projected.boxes) >= len(frame.labels2d.boxes)


def test_signs_that_waymos_cameras_do_not_label_come_from_their_3d_boxes():
    options = driving_scene.SceneOptions(reach=25.0, signs=(3, 3), walls=(0, 0))
    sign = CLASSES.index("sign")

    def with_a_sign():
        for seed in range(30):
            scene = driving_scene.sample_scene(seed, options)
            frame = camera_renderer.make_frame(scene, seed=seed, sensor=RING, camera=CAMERA)
            two, three = frame.labels2d, frame.labels3d
            hit = three.ids[three.returns > 0]
            wanted = two.boxes[(two.classes == sign) & np.isin(two.ids, hit)]
            if len(wanted):
                return frame, wanted

    frame, wanted = with_a_sign()
    found = waymo_frames.decode_frame(waymo_message(frame, without=("sign",))).labels2d
    others = found.classes != sign
    np.testing.assert_allclose(
        found.boxes[others], frame.labels2d.boxes[frame.labels2d.classes != sign], atol=1e-4
    )
    overlap = box_overlap.iou(wanted, found.boxes[~others])
    assert (overlap.max(1) > 0.2).all() and len(found.ids) == len(found.boxes)


def test_a_front_view_of_waymos_lidar_keeps_the_published_columns(waymo, tmp_path):
    _, options = pipeline.resolve({"name": "driving_patches:waymo", "options": {"path": waymo}})
    front = driving_frames.frames(options, "train")[0]
    whole = driving_frames.frames(options | {"half_angle": 180.0}, "train")[0]
    start, end = range_image.front_columns(360, 26.0)
    assert whole.wraps and not front.wraps and front.range.shape == (32, end - start)
    assert range_image.front_columns(2650) == (1134, 1516)
    np.testing.assert_array_equal(front.range, whole.range[:, start:end])
    np.testing.assert_array_equal(front.elongation, whole.elongation[:, start:end])
    assert np.degrees(np.abs(front.azimuths)).max() <= 26.0
    assert front_view(front) is front
    files = frame_files.copy_frames(tmp_path, "waymo", waymo, frames=5, first=1)
    assert [file.name for file in files] == ["000001.npz", "000002.npz"]  # three test frames
    stored = driving_frames.load_frame(files[0])
    assert stored.range.shape == front.range.shape and not stored.wraps


def test_damaged_waymo_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="not zlib data"):
        waymo_frames.decode_frame(waymo_message(simulated(0), compress=False))
    with pytest.raises(ValueError, match="no top LiDAR"):
        waymo_frames.decode_frame(waymo_frames.messages()["Frame"]().SerializeToString())
    file = tmp_path / "a.tfrecord"
    waymo_frames.write_records(file, [b"x" * 50, b"y" * 9])
    assert [n for _, n in waymo_frames.record_places(file)] == [50, 9]
    file.write_bytes(file.read_bytes()[:-6])
    with pytest.raises(ValueError, match="cut off"):
        waymo_frames.record_places(file)
    file.write_bytes(b"not a record of any kind")
    with pytest.raises(ValueError, match="no TFRecord at byte 0"):
        waymo_frames.record_places(file)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        driving_frames.frames({"source": "waymo", "path": None}, "train")
    with pytest.raises(ValueError, match="known are simulated"):
        driving_frames.frames({"source": "nuscene", "path": None}, "train")


def test_frames_survive_their_files(tmp_path):
    frame = simulated(1)
    driving_frames.save_frame(tmp_path / "a.npz", frame)
    found = driving_frames.load_frame(tmp_path / "a.npz")
    np.testing.assert_array_equal(found.range, frame.range)
    np.testing.assert_array_equal(found.labels2d.boxes, frame.labels2d.boxes)
    assert found.wraps and found.timestamp == frame.timestamp
    np.savez(tmp_path / "b.npz", range=frame.range)
    with pytest.raises(ValueError, match=r"b\.npz: no readable frame"):
        driving_frames.load_frame(tmp_path / "b.npz")


def test_kitti_points_and_labels_meet_in_the_image(tmp_path):
    folder = tmp_path / "training"
    for name in ("velodyne", "calib", "label_2", "image_2"):
        (folder / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    # A car's rear, 15 m ahead of the LiDAR and 2 m to the left, 1.6 m high on the road.
    rear = np.stack(
        [0 * np.ones(600) + 15, rng.uniform(1, 3, 600), rng.uniform(-1.6, -0.2, 600)], 1
    )
    points = np.concatenate([rear, np.zeros((600, 1))], axis=1).astype(np.float32)
    points.tofile(folder / "velodyne" / "000000.bin")
    Image.fromarray(np.zeros((375, 1242, 3), np.uint8)).save(folder / "image_2" / "000000.png")
    camera = "700 0 600 0 0 700 180 0 0 0 1 0"
    move = "0 -1 0 0 0 0 -1 0 1 0 0 0"
    (folder / "calib" / "000000.txt").write_text(
        f"P2: {camera}\nR0_rect: 1 0 0 0 1 0 0 0 1\nTr_velo_to_cam: {move}\n"
    )
    (folder / "label_2" / "000000.txt").write_text(
        "Car 0 0 0 460 189 553 260 1.6 2.0 4.0 -2.0 1.73 17.0 -1.5708\nDontCare 0 0 0 1 1 2 2\n"
    )
    frame = kitti_frames.KittiFrames.below(tmp_path, "train")[0]
    box = frame.labels3d.boxes[0]
    np.testing.assert_allclose(box, [17, 2, 0.8, 4, 2, 1.6, 0], atol=1e-3)
    # The points lie on the box's rear face: rounding decides which half is inside.
    assert 100 < frame.labels3d.returns[0] <= 600
    turned = [[17, 2, 0.8, 4, 2, 1.6, np.pi / 2], [17, 2, 0.8, 4, 2, 1.6, 0]]
    some = [[17, 3.9, 0.5], [18.5, 2, 0.5], [17, 2, 1.7]]
    assert box_overlap.points_inside(turned, some).tolist() == [1, 1]
    from jaxmodels.driving import camera_projection

    placed, valid = range_image.range_to_points(
        frame.range, frame.inclinations, frame.azimuths, frame.lidar_extrinsic
    )
    shown = camera_projection.project_points(np.asarray(placed)[np.asarray(valid)], frame.camera)
    low, high = np.asarray(shown.uv).min(0), np.asarray(shown.uv).max(0)
    assert valid.sum() > 50
    assert (low > np.asarray([455, 180])).all() and (high < np.asarray([560, 265])).all()


def flags(workdir, waymo, preset, *more):
    return [
        "train",
        f"--config={CONFIG}:{preset}",
        f"--workdir={workdir}",
        f"--config.data.options.path={waymo}",
        "--config.data.options.workers=0",
        "--config.model_args.embedding_size=4",
        "--config.model_args.hidden_sizes=(4, 4, 4, 8)",
        "--config.model_args.depths=(1, 1, 1, 1)",
        "--config.precision=float32",
        "--config.batch_size=8",
        "--config.log_every=5",
        "--config.eval.every=0",
        "--config.schedule.warmup_steps=2",
        *more,
    ]


@pytest.fixture(scope="module")
def paper_run(waymo, tmp_path_factory):
    """Twenty steps of `:paper` at reduced size, on an 8-device mesh of data and fsdp."""
    workdir = tmp_path_factory.mktemp("patches")
    words = flags(
        workdir,
        waymo,
        "paper",
        "--config.data.options.image_size=32",
        "--config.data.options.every=1",
        "--config.task_args.sizes=(32,)",
        "--config.schedule.peak=0.02",
        "--config.parallel.data=4",
        "--config.parallel.fsdp=2",
        "--config.steps=20",
        "--config.checkpoint.every=10",
    )
    assert main(words) == 0
    return workdir, words


def test_the_papers_recipe_runs_twenty_steps_on_waymo_files(paper_run):
    workdir, _ = paper_run
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = [r["loss"] for r in rows if r["kind"] == "train"]
    assert len(losses) == 4 and np.isfinite(losses).all() and losses[-1] < losses[0]
    report = (workdir / "report.md").read_text()
    assert "majority_class" in report and "nearest_mean_color" in report and "box_iou" in report


def test_a_stopped_run_goes_on_bit_for_bit(paper_run, tmp_path):
    import shutil

    from train.checkpoints import load_params

    workdir, words = paper_run
    again = tmp_path / "again"
    shutil.copytree(workdir, again)
    shutil.rmtree(again / "checkpoints" / "20")
    assert main([f"--workdir={again}" if "--workdir" in w else w for w in words]) == 0
    first, second = load_params(workdir), load_params(again)
    import jax

    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_prediction_orders_the_detections_of_frames(paper_run, tmp_path):
    workdir, words = paper_run
    (tmp_path / "frames").mkdir()
    for seed in range(2):
        driving_frames.save_frame(tmp_path / "frames" / f"{seed}.npz", simulated(seed))
    output = tmp_path / "found.csv"
    kept = [w for w in words if "workdir" not in w and "task_args.sizes" not in w]
    paths = [
        f"--checkpoint={workdir}",
        f"--input={tmp_path / 'frames'}",
        f"--output={output}",
        "--config.task_args.pipeline.buckets=(32,)",
    ]
    assert predict.main(["predict", *kept[1:], *paths]) == 0
    lines = output.read_text().splitlines()
    assert lines[0].startswith("file,place,class,score,x1") and len(lines) > 4
    finished = [float(line.split(",")[-1]) for line in lines[1:] if line.split(",")[0] == "0.npz"]
    reached = [f for f in finished if f >= 0]
    assert reached == sorted(reached)


def test_frames_and_their_pictures_are_one_command_each(paper_run, tmp_path):
    workdir, words = paper_run
    files = frame_files.write_frames(tmp_path / "frames", 2, scale=0.1)
    assert [f.name for f in files] == ["000.npz", "001.npz"]
    first, second = (driving_frames.load_frame(f).timestamp for f in files)
    assert abs(second - first - 0.1) < 1e-6
    kept = [w for w in words if "workdir" not in w and "task_args.sizes" not in w]
    picture = tmp_path / "frame.png"
    paths = [
        f"--checkpoint={workdir}",
        f"--input={tmp_path / 'frames'}",
        f"--output={picture}",
        "--config.task_args.pipeline.buckets=(32,)",
    ]
    assert frame_figures.main(["figures", *kept[1:], *paths]) == 0
    for name in ("frame_000.png", "frame_001.png"):
        assert (tmp_path / name).stat().st_size > 20_000
    assert not picture.exists()


def test_the_detectors_recipe_learns_two_waymo_frames_by_heart(tmp_path):
    """Every step sees the same two frames, so that the loss has to fall, and far: 50 to 16."""
    for split, seeds in (("training", (0, 3)), ("validation", (0, 3))):
        (tmp_path / split).mkdir()
        records = [waymo_message(simulated(seed)) for seed in seeds]
        waymo_frames.write_records(tmp_path / split / "segment-1.tfrecord", records)
    words = flags(
        tmp_path / "run",
        tmp_path,
        "paper_detector",
        "--config.data.options.image_size=64",
        "--config.data.options.shift=0.0",
        "--config.data.options.color=0.0",
        "--config.batch_size=2",
        "--config.parallel.data=1",
        "--config.schedule.peak=0.01",
        "--config.steps=60",
        "--config.checkpoint.every=0",
    )
    assert main(words) == 0
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    losses = [r["loss"] for r in rows if r["kind"] == "train"]
    assert len(losses) == 12 and losses[-1] < 0.4 * losses[0]
    assert "mAP" in [r for r in rows if r["kind"] == "eval"][-1]


def test_simulated_frames_are_a_function_of_their_seed(tmp_path):
    options = {"path": str(tmp_path), "train_frames": 3, "test_frames": 2, "image_scale": 0.05}
    data = {"name": "driving_detection", "options": {**options, "columns": 360, "image_size": 64}}
    assert pipeline.split_sizes(data) == {"train": 3, "test": 2}
    batch = next(pipeline.train_batches(data, batch_size=2, seed=0))
    assert batch["image"].shape == (2, 64, 64, 3) and batch["present"].sum() > 0
    _, chosen = pipeline.resolve(data)
    stored = driving_frames.frames(chosen, "train")
    settings = driving_frames.simulation_options(chosen)
    fresh = list(driving_frames.simulated_drives("train", settings))
    np.testing.assert_allclose(stored[2].range, fresh[2].range, atol=1e-3)
    np.testing.assert_array_equal(stored[2].image, fresh[2].image)
    np.testing.assert_allclose(stored[2].labels3d.boxes, fresh[2].labels3d.boxes)
    np.testing.assert_array_equal(stored[1].labels2d.classes, fresh[1].labels2d.classes)
    assert stored[1].timestamp == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config.data.options.image_size=7"], "image_size must be an integer >= 16"),
        (["--config.data.options.source=nuscene"], "known are simulated"),
        (["--config.data.options.source=waymo", "--config.data.options.path=/none"], "no such"),
        (["--config.model_args.layer_type=wide"], "known are basic"),
    ],
)
def test_a_config_mistake_is_one_line(words, message, tmp_path, capsys):
    from train.command_line import stop_with_one_line

    flags_ = ["train", f"--config={CONFIG}", f"--workdir={tmp_path / 'run'}", *words]
    code = stop_with_one_line(main, flags_)
    assert code not in (0, None)
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_detection_files_of_other_detectors_are_read(tmp_path):
    file = tmp_path / "found.json"
    rows = [[1, 2, 30, 40, 0.9, 0.5, 2], [0, 0, 5, 5, 0.8, 1.0, 60], [3, 3, 9, 9, 1.0, 0.25, 0]]
    file.write_text(json.dumps({"segment": {"10_20_ctx_7_FRONT": rows}}))
    found = ranked_detections.read_detections(file)[("10_20_ctx", 7, "FRONT")]
    assert found.classes.tolist() == [0, 1] and found.scores.tolist() == [0.45, 0.25]
    assert found.objectness.tolist() == [0.5, 0.25]  # the confidence of the published recall
    every = ranked_detections.read_detections(file, every_class=True)[("10_20_ctx", 7, "FRONT")]
    assert every.classes.tolist() == [0, -1, 1] and len(every.boxes) == 3
    file.write_text(json.dumps({"segment": {"ctx_7_FRONT": [[5, 2, 3, 40, 0.9, 0.5, 2]]}}))
    with pytest.raises(ValueError, match="ctx_7_FRONT: boxes: row 0 has x2 < x1"):
        ranked_detections.read_detections(file)


def test_nuscenes_points_and_labels_meet_in_the_image(tmp_path):
    # The vehicle looks north; its LiDAR's x points right, its camera's z ahead.
    half = float(np.sqrt(0.5))
    north, right = [half, 0.0, 0.0, half], [half, 0.0, 0.0, -half]
    tables = {
        "scene": [{"token": "scene"}],
        "sample": [
            {"token": "s0", "scene_token": "scene", "timestamp": 0, "next": "s1", "prev": ""},
            {"token": "s1", "scene_token": "scene", "timestamp": 500_000, "next": "", "prev": "s0"},
        ],
        "sensor": [
            {"token": "lidar", "channel": "LIDAR_TOP"},
            {"token": "front", "channel": "CAM_FRONT"},
        ],
        "calibrated_sensor": [
            {"token": "l", "sensor_token": "lidar", "translation": [1, 0, 1.8], "rotation": right},
            {
                "token": "c",
                "sensor_token": "front",
                "translation": [1.5, 0, 1.5],
                "rotation": [0.5, -0.5, 0.5, -0.5],
                "camera_intrinsic": [[1000, 0, 800], [0, 1000, 450], [0, 0, 1]],
            },
        ],
        "ego_pose": [
            {"token": "e0", "translation": [100, 50, 0], "rotation": north},
            {"token": "e1", "translation": [100, 54, 0], "rotation": north},
        ],
        "category": [{"token": "car", "name": "vehicle.car"}],
        "instance": [{"token": "it", "category_token": "car"}],
        "sample_annotation": [
            {
                "token": f"a{i}",
                "sample_token": f"s{i}",
                "instance_token": "it",
                "translation": [98, 70 + 5 * i, 0.8],
                "size": [2.0, 4.0, 1.6],
                "rotation": north,
                "num_lidar_pts": 50,
                "prev": "a0" if i else "",
                "next": "" if i else "a1",
            }
            for i in range(2)
        ],
        "sample_data": [
            {
                "token": f"{name}{i}",
                "sample_token": f"s{i}",
                "ego_pose_token": f"e{i}",
                "calibrated_sensor_token": name,
                "is_key_frame": True,
                "filename": f"{name}{i}",
            }
            for i in range(2)
            for name in "lc"
        ],
    }
    folder = tmp_path / "v1.0-mini"
    folder.mkdir()
    for name, rows in tables.items():
        (folder / f"{name}.json").write_text(json.dumps(rows))
    rng = np.random.default_rng(0)
    # The car's rear, seen from the LiDAR: 17 m ahead (y) and 2 m to the left (-x).
    rear = np.stack([rng.uniform(-3, -1, 400), np.full(400, 17.0), rng.uniform(-1.7, -0.3, 400)], 1)
    for i in range(2):
        np.concatenate([rear, np.zeros((400, 2))], 1).astype(np.float32).tofile(tmp_path / f"l{i}")
        Image.fromarray(np.zeros((900, 1600, 3), np.uint8)).save(tmp_path / f"c{i}", format="jpeg")
    frames = nuscenes_frames.NuScenesFrames.below(tmp_path, "train")
    assert len(frames) == 2
    frame = frames[0]
    np.testing.assert_allclose(frame.labels3d.boxes[0], [20, 2, 0.8, 4, 2, 1.6, 0], atol=1e-4)
    np.testing.assert_allclose(frame.labels3d.velocity[0], [10, 0], atol=1e-4)
    np.testing.assert_allclose(frame.ego_velocity, [8, 0], atol=1e-4)
    from jaxmodels.driving import camera_projection

    placed, valid = range_image.range_to_points(
        frame.range, frame.inclinations, frame.azimuths, frame.lidar_extrinsic
    )
    shown = camera_projection.project_points(np.asarray(placed)[np.asarray(valid)], frame.camera)
    inside = np.asarray(shown.uv)
    low, high = frame.labels2d.boxes[0, :2], frame.labels2d.boxes[0, 2:]
    assert valid.sum() > 20 and (inside > low - 16).all() and (inside < high + 16).all()
