"""The second version of the Waymo Open Dataset, in tiny files of the published layout."""

import dataclasses
import io

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from jaxmodels.driving import camera_renderer, driving_scene, range_image
from jaxmodels.driving.patch_classifier import CLASSES
from train.data import driving_frames, pipeline, waymo_frames, waymo_parquet

SEGMENT = "10023947602400723454_1120_000_1140_000"
RING = range_image.waymo_like(16, 180)
CAMERA = camera_renderer.front_camera(0.1)
# The vehicle looks along the global y axis.
POSE = np.asarray([[0, -1, 0, 900], [1, 0, 0, 50], [0, 0, 1, 3], [0, 0, 0, 1]], np.float64)
NUMBERS = {name: number for number, name in waymo_frames.TYPES.items()}


def simulated(seed, time=0.0):
    options = driving_scene.SceneOptions(reach=25.0, pedestrians=(4, 6))
    scene = driving_scene.sample_scene(seed, options)
    frame = camera_renderer.make_frame(scene, seed=seed, sensor=RING, camera=CAMERA)
    return dataclasses.replace(frame, timestamp=time)


def write(root, component, rows, schema, **options):
    """One file of a component: rows of {column: value}, a key column of the segment added."""
    folder = root / component
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"key.segment_context_name": SEGMENT, **row} for row in rows]
    schema = pa.schema([("key.segment_context_name", pa.string()), *schema.items()])
    parquet.write_table(
        pa.Table.from_pylist(rows, schema), folder / f"{SEGMENT}.parquet", **options
    )


TIME = {"key.frame_timestamp_micros": pa.int64()}
MATRIX = pa.list_(pa.float64(), 16)


def write_segment(root, frames):
    """A segment as version 2 stores it: five LiDARs, two cameras, labels of unknown type."""
    first = frames[0]
    micros = [round(frame.timestamp * 1e6) for frame in frames]
    values = "[LiDARComponent].range_image_return1."
    lidars = []
    for frame, time in zip(frames, micros):
        for laser in (5, 3, 1):
            channels = np.zeros((*frame.range.shape, 4), np.float32)
            channels[..., 0] = np.where(frame.range > 0, frame.range, -1)
            channels[..., 2] = frame.elongation
            channels = channels if laser == 1 else channels[:4, :6]
            lidars.append({
                "key.frame_timestamp_micros": time,
                "key.laser_name": laser,
                values + "values": channels.ravel(),
                values + "shape": channels.shape,
            })  # fmt: skip
    write(
        root,
        "lidar",
        lidars,
        {
            **TIME,
            "key.laser_name": pa.int8(),
            values + "values": pa.list_(pa.float32()),
            values + "shape": pa.list_(pa.int32(), 3),
        },
        row_group_size=4,
    )
    name = "[CameraImageComponent]."
    speed = name + "velocity.linear_velocity."
    images = []
    for frame, time in zip(frames, micros):
        jpeg = io.BytesIO()
        Image.fromarray(frame.image).save(jpeg, format="jpeg", quality=95)
        velocity = POSE[:2, :2] @ frame.ego_velocity
        for camera in (2, 1):
            images.append({
                "key.frame_timestamp_micros": time,
                "key.camera_name": camera,
                name + "image": jpeg.getvalue() if camera == 1 else b"",
                name + "pose.transform": POSE.ravel(),
                speed + "x": velocity[0],
                speed + "y": velocity[1],
            })  # fmt: skip
    write(
        root,
        "camera_image",
        images,
        {
            **TIME,
            "key.camera_name": pa.int8(),
            name + "image": pa.binary(),
            name + "pose.transform": MATRIX,
            speed + "x": pa.float32(),
            speed + "y": pa.float32(),
        },
    )
    column = "[VehiclePoseComponent].world_from_vehicle.transform"
    poses = [{"key.frame_timestamp_micros": t, column: POSE.ravel()} for t in micros]
    write(root, "vehicle_pose", poses, {**TIME, column: MATRIX})
    name = "[LiDARCalibrationComponent]."
    beams = np.sort(first.inclinations.astype(float))
    row = {
        "key.laser_name": 1,
        name + "extrinsic.transform": first.lidar_extrinsic.astype(float).ravel(),
        name + "beam_inclination.min": beams[0],
        name + "beam_inclination.max": beams[-1],
        name + "beam_inclination.values": beams,
    }
    other = {**row, "key.laser_name": 2, name + "beam_inclination.values": None}
    write(
        root,
        "lidar_calibration",
        [other, row],
        {
            "key.laser_name": pa.int8(),
            name + "extrinsic.transform": MATRIX,
            name + "beam_inclination.min": pa.float64(),
            name + "beam_inclination.max": pa.float64(),
            name + "beam_inclination.values": pa.list_(pa.float64()),
        },
    )
    name = "[CameraCalibrationComponent]."
    inner = [f"{name}intrinsic.{part}" for part in waymo_parquet._INTRINSIC]
    write(
        root,
        "camera_calibration",
        [
            {
                "key.camera_name": 1,
                **dict(zip(inner, first.camera_intrinsic.astype(float))),
                name + "extrinsic.transform": first.camera_extrinsic.astype(float).ravel(),
                name + "width": first.image.shape[1],
                name + "height": first.image.shape[0],
            }
        ],
        {
            "key.camera_name": pa.int8(),
            **dict.fromkeys(inner, pa.float64()),
            name + "extrinsic.transform": MATRIX,
            name + "width": pa.int32(),
            name + "height": pa.int32(),
        },
    )
    write_labels(root, frames, micros)


def write_labels(root, frames, micros):
    name = "[LiDARBoxComponent]."
    sides = [f"{name}box.{part}.{axis}" for part in ("center", "size") for axis in "xyz"]
    sides.append(name + "box.heading")
    boxes, seen = [], []
    flat = [
        f"[CameraBoxComponent].box.{part}.{axis}" for part in ("center", "size") for axis in "xy"
    ]
    for frame, time in zip(frames, micros):
        three, two = frame.labels3d, frame.labels2d
        for i, box in enumerate(three.boxes.astype(float)):
            velocity = POSE[:2, :2] @ three.velocity[i]
            boxes.append({
                "key.frame_timestamp_micros": time,
                "key.laser_object_id": f"object {three.ids[i]}",
                **dict(zip(sides, box)),
                name + "type": NUMBERS[CLASSES[three.classes[i]]],
                name + "num_lidar_points_in_box": int(three.returns[i]),
                name + "speed.x": velocity[0] if i else None,
                name + "speed.y": velocity[1] if i else None,
            })  # fmt: skip
        boxes.append({**boxes[-1], name + "type": 0})
        for box, kind in zip(two.boxes.astype(float), two.classes):
            center, size = (box[:2] + box[2:]) / 2, box[2:] - box[:2]
            row = {
                "key.frame_timestamp_micros": time,
                "key.camera_object_id": "seen",
                **dict(zip(flat, [*center, *size])),
                "[CameraBoxComponent].type": NUMBERS[CLASSES[kind]],
            }
            seen += [{**row, "key.camera_name": camera} for camera in (3, 1)]
    write(
        root,
        "lidar_box",
        boxes,
        {
            **TIME,
            "key.laser_object_id": pa.string(),
            **dict.fromkeys(sides, pa.float64()),
            name + "type": pa.int8(),
            name + "num_lidar_points_in_box": pa.int64(),
            name + "speed.x": pa.float64(),
            name + "speed.y": pa.float64(),
        },
    )
    write(
        root,
        "camera_box",
        seen,
        {
            **TIME,
            "key.camera_name": pa.int8(),
            "key.camera_object_id": pa.string(),
            **dict.fromkeys(flat, pa.float64()),
            "[CameraBoxComponent].type": pa.int8(),
        },
    )


@pytest.fixture(scope="module")
def waymo(tmp_path_factory):
    root = tmp_path_factory.mktemp("waymo_2")
    write_segment(root / "training", [simulated(1, 1.5), simulated(0, 1.4)])
    return root


def test_frames_are_those_that_were_stored_in_the_order_of_time(waymo):
    frames = driving_frames.frames({"source": "waymo", "path": str(waymo)}, "train")
    assert [time for _, time in frames.places] == [1_400_000, 1_500_000]
    for found, frame in zip(frames, (simulated(0), simulated(1))):
        np.testing.assert_allclose(found.range, frame.range, atol=1e-6)
        np.testing.assert_allclose(found.inclinations, frame.inclinations, atol=1e-6)
        np.testing.assert_allclose(found.azimuths, frame.azimuths, atol=1e-6)
        np.testing.assert_allclose(found.camera_intrinsic, frame.camera_intrinsic)
        np.testing.assert_allclose(found.camera_extrinsic, frame.camera_extrinsic)
        np.testing.assert_allclose(found.elongation, frame.elongation)
        assert np.abs(found.image.astype(int) - frame.image).mean() < 6 and found.wraps
        three, stored = found.labels3d, frame.labels3d
        np.testing.assert_allclose(three.boxes, stored.boxes, atol=1e-5)
        np.testing.assert_array_equal(three.classes, stored.classes)
        np.testing.assert_array_equal(three.returns, stored.returns)
        # Speeds are global in the files; one is unknown there.
        np.testing.assert_allclose(three.velocity[1:], stored.velocity[1:], atol=1e-5)
        assert not three.velocity[0].any()
        np.testing.assert_allclose(found.labels2d.boxes, frame.labels2d.boxes, atol=1e-4)
        np.testing.assert_array_equal(found.labels2d.classes, frame.labels2d.classes)
        np.testing.assert_allclose(found.ego_velocity, frame.ego_velocity, atol=1e-5)
    assert frames[0].timestamp == pytest.approx(1.4)


def test_batches_of_the_papers_detector_come_from_these_files(waymo):
    options = {"path": str(waymo), "image_size": 64, "workers": 0}
    data = {"name": "driving_detection:waymo", "options": options}
    batch = next(pipeline.train_batches(data, batch_size=2, seed=0))
    assert batch["image"].shape == (2, 64, 64, 3) and batch["present"].sum() > 2


def test_labels_and_poses_may_be_absent_and_what_else_is_missing_is_named(tmp_path):
    write_segment(tmp_path, [simulated(0, 1.4)])
    for component in ("lidar_box", "camera_box", "vehicle_pose"):
        (tmp_path / component / f"{SEGMENT}.parquet").unlink()
        (tmp_path / component).rmdir()
    frames = waymo_parquet.WaymoParquetFrames.below(tmp_path)
    bare = frames[0]
    assert not len(bare.labels3d.boxes) and not len(bare.labels2d.boxes)
    np.testing.assert_allclose(bare.ego_velocity, simulated(0).ego_velocity, atol=1e-5)
    late = waymo_parquet.WaymoParquetFrames(tmp_path, ((SEGMENT, 7),))
    with pytest.raises(ValueError, match=r"lidar.*no row of key\.laser_name 1 at 7 microseconds"):
        late[0]
    image = tmp_path / "camera_image" / f"{SEGMENT}.parquet"
    kept = parquet.read_table(image).drop_columns("[CameraImageComponent].image")
    parquet.write_table(kept, image)
    with pytest.raises(ValueError, match=r"no column \[CameraImageComponent\]\.image"):
        frames[0]
    image.write_bytes(b"PAR1 but no more")
    with pytest.raises(ValueError, match=r"camera_image.*no Parquet file"):
        frames[0]
    image.unlink()
    with pytest.raises(FileNotFoundError, match="no such file of the segment"):
        frames[0]
    image.parent.rmdir()
    with pytest.raises(FileNotFoundError, match="no folder camera_image"):
        waymo_parquet.WaymoParquetFrames.below(tmp_path)
    other = {"source": "waymo", "path": str(tmp_path / "lidar_calibration")}
    with pytest.raises(FileNotFoundError, match=r"version 1.*version 2"):
        driving_frames.frames(other, "train")
