"""Video in, edited video out, frame by frame.

`python -m train.edit_video --config configs/video2stylegan.py --checkpoint RUN --input CLIP
--output OUT [--config.edit.KEY=VALUE ...]`: CLIP is a folder of frames or a video file, OUT a
folder or a file ending in .mp4. Every frame is encoded with the clip's key codes, edited,
synthesized and written before the next one is read.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxmodels.platform_choice import choose_platform

choose_platform()

from train.command_line import read_flags, stop_with_one_line  # noqa: E402
from train.naming import ConfigError  # noqa: E402

FLAGS = {
    "checkpoint": "a run directory of the task video_inversion",
    "input": "a video file, or a folder of frames",
    "output": "a video file, or a folder for frames",
}
STRIP_COLUMNS = 8


def main(argv: list[str]) -> int:
    """Encode, edit and write a clip; say how fast, and how steady it is."""
    config, paths = read_flags(argv, need_workdir=False, strings=FLAGS)
    from train.process import prepare_process

    prepare_process()
    if "edit" not in config:
        raise ConfigError("--config: it has no key `edit`; use configs/video2stylegan.py")
    numbers = edit_clip(config, paths["checkpoint"], paths["input"], paths["output"])
    width = max(map(len, numbers))
    for name, value in numbers.items():
        print(f"{name:<{width}}  {value:.6g}" if isinstance(value, float) else f"{name}  {value}")
    return 0


def edit_clip(config, checkpoint: str, source: str, output: str) -> dict[str, Any]:
    """The command as a function: {number: value} of the finished clip."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxmodels.video import latent_editing, video_metrics
    from jaxmodels.video.video_encoder import stream
    from train import video_files
    from train.initialization import starting_variables
    from train.loop import Plan
    from train.tasks.video_inversion import VideoInversion, encoder_variables
    from train.video_critics import pool

    edit = config.edit
    if not Path(source).exists():
        raise ConfigError(f"--input {source}: no such file or directory")
    if Path(source).absolute() == Path(output).absolute():
        raise ConfigError("--output: it is the input; name another")
    with config.unlocked():
        config.init_from = checkpoint
    plan = Plan(config)
    task = plan.task
    if not isinstance(task, VideoInversion):
        raise ConfigError(f"config.task: {config.task!r} trains no encoder of frames")
    if edit.strip and not Path(edit.strip).absolute().parent.is_dir():
        raise ConfigError(f"config.edit.strip: no folder for {edit.strip!r}")
    params, extra = starting_variables(config, plan.abstract, task, plan.make)
    variables = {"params": params, **extra}
    own, model = encoder_variables(variables), task.model
    direction = _direction(edit, model.w_dim)
    layers = tuple(edit.layers) or None
    size = model.image_size

    style = None
    if edit.style:
        image = next(video_files.read_frames(edit.style))
        still = jnp.asarray(_sized(video_files.to_unit(image), size))[None]
        style = model.apply(own, still, method="encode_key")
    turns = edit.yaw or edit.pitch or edit.roll or edit.expression or edit.driver
    control = _Control(edit, size) if turns else None

    embed = None
    if "identity" in task.critics.modules:
        from jaxmodels.vision.ir_se import embed_faces

        network = task.critics.modules["identity"]
        embed = jax.jit(lambda v, x: embed_faces(network, v["critics"]["identity"], x))

    @jax.jit
    def draw(variables, codes, alpha):
        if style is not None:
            codes = latent_editing.mix_styles(codes, style, model.split)
        if direction is not None:
            codes = latent_editing.move(codes, direction, alpha, layers, edit.absolute)
        images = task.draw(variables, codes)
        return images[0], pool(images)[0]

    frames = _aligned(edit, source, size)
    crops, quads, whole = _tee(frames)
    started, count, first = None, 0, None
    sums = {"flicker": 0.0, "mse": 0.0, "jitter": 0.0}
    before, shown = None, _Shown(config)
    identities: list = []
    fps = edit.fps or video_files.frame_rate(source) or 25
    with video_files.frame_writer(output, fps) as write:
        for frame, encoded in stream(model, own, crops, edit.refresh, edit.every, print):
            codes = encoded if control is None else control(frame, encoded)
            # As the generator makes it, and as measures see it.
            whole_image, image = map(np.asarray, draw(variables, codes, edit.alpha))
            if count == 0:
                # The first frame pays for compilation.
                started, first = time.perf_counter(), codes
            target = np.asarray(_pooled(frame, image.shape[0]))
            sums["mse"] += float(np.square(image - target).mean())
            if before is not None:
                change = (image - before[0]) - (target - before[1])
                sums["flicker"] += float(np.abs(change).mean())
                moved = np.asarray(codes)[:, : model.split] - before[2]
                sums["jitter"] += float(np.abs(moved).mean())
            before = image, target, np.asarray(codes)[:, : model.split]
            if embed is not None:
                identities.append(embed(variables, jnp.stack([image, target])))
            write(_finished(whole_image, quads, whole))
            shown.add(count, target, encoded, image)
            count += 1
    if not count:
        raise ConfigError(f"--input {source}: it has no frames")
    seconds = time.perf_counter() - started
    split = model.split
    numbers: dict[str, Any] = {
        "frames": count,
        "frames_per_s": (count - 1) / max(seconds, 1e-9) if count > 1 else float("nan"),
        "mse": sums["mse"] / count,
    }
    if len(identities) > 1:
        edited, original = jnp.stack(identities, 1)
        numbers["TL-ID"] = float(video_metrics.local_identity(edited, original))
        numbers["TG-ID"] = float(video_metrics.global_identity(edited, original))
    if count > 1:
        numbers["flicker"] = sums["flicker"] / (count - 1)
        numbers["latent jitter"] = sums["jitter"] / (count - 1)
    if edit.refresh == "first":
        same = np.array_equal(np.asarray(first[:, split:]), np.asarray(codes[:, split:]))
        numbers["high codes equal over the clip"] = str(bool(same))
    if edit.strip:
        plain = jax.jit(lambda v, codes: task.synthesize(v, codes)[0])
        numbers |= shown.write(edit, lambda codes: plain(variables, codes))
    return numbers


class _Shown:
    """Frames for the strip, evenly spread over a clip whose length is not known before its end."""

    def __init__(self, config):
        self.kept: list[tuple] = []
        self.every = 1
        self.wanted = bool(config.edit.strip)

    def add(self, number: int, *parts) -> None:
        """Keep a frame's input, codes before the edit, and picture, where its turn has come."""
        if not self.wanted or number % self.every:
            return
        self.kept.append((number, *parts))
        if len(self.kept) == 2 * STRIP_COLUMNS:
            self.kept, self.every = self.kept[::2], 2 * self.every

    def write(self, edit, draw) -> dict[str, Any]:
        """The strip: input, what its codes draw, what the edited codes draw, and their difference;
        the last two only where an edit was asked for."""
        import numpy as np

        from train import clip_strips, video_files

        places = np.linspace(0, len(self.kept) - 1, min(len(self.kept), STRIP_COLUMNS))
        chosen = [self.kept[i] for i in np.unique(np.round(places).astype(int))]
        numbers, targets, codes, edited = zip(*chosen)
        encoded = np.stack([np.asarray(draw(c)) for c in codes])
        rows = {"input": np.stack(targets), "encoded": encoded}
        asked = asked_for(edit)
        if asked:
            rows["edited"] = np.stack(edited)
        shown = {name: video_files.to_bytes(row) for name, row in rows.items()}
        found: dict[str, Any] = {"strip": edit.strip}
        if asked:
            gray, largest = clip_strips.change(encoded, rows["edited"])
            shown[f"change (white {largest:.2g})"] = gray
            found["mean change by the edit"] = float(np.abs(rows["edited"] - encoded).mean())
        clip_strips.write_strip(edit.strip, shown, numbers, asked or "no edit")
        return found


def asked_for(edit) -> str:
    """The edit in words, or "" where none was asked for."""
    said = []
    if edit.direction:
        layers = f" of layers {edit.layers[0]} to {edit.layers[1] - 1}" if edit.layers else ""
        name = Path(edit.direction).name
        if edit.conditions:
            name += f" without {', '.join(Path(c).name for c in edit.conditions)}"
        amount = f"to {edit.alpha:g}" if edit.absolute else f"x {edit.alpha:g}"
        said.append(f"{name} {amount}{layers}")
    if edit.style:
        said.append(f"style of {Path(edit.style).name}")
    said += [f"{name} {edit[name]:+g} degrees" for name in ("yaw", "pitch", "roll") if edit[name]]
    if edit.expression:
        said.append(f"expression {Path(edit.expression).name}")
    if edit.driver:
        said.append(f"driven by {Path(edit.driver).name}")
    return ", ".join(said)


class _Control:
    """The control network of a run of `pose_control`, with the regressor that it was trained on."""

    def __init__(self, edit, size: int):
        import jax

        from jaxmodels.video import pose_control
        from train import video_files
        from train.initialization import starting_variables
        from train.loop import Plan

        if not edit.control_from:
            raise ConfigError(
                "config.edit.control_from: moving the head or the face needs a control network"
            )
        other = _run_config(edit.control_from)
        with other.unlocked():
            other.init_from = edit.control_from
        plan = Plan(other)
        params, extra = starting_variables(other, plan.abstract, plan.task, plan.make)
        task = plan.task
        if "mesh" not in task.critics.modules:
            raise ConfigError(
                f"config.edit.control_from: {edit.control_from} has no mesh regressor; train it "
                "with config.task_args.regressor_from"
            )
        editor = pose_control.PoseEditor(task.model, {"params": params}, task.face)
        asked = {k: edit[k] or None for k in ("yaw", "pitch", "roll")}
        expression = None
        if edit.expression:
            expression = _vector(edit.expression, "expression")
            wanted = task.face.expression_size
            if expression.shape != (wanted,):
                raise ConfigError(
                    f"config.edit.expression: {list(expression.shape)} numbers, the face model has "
                    f"{wanted} directions of expression"
                )

        def mesh_of(critics, frame):
            mesh = task.critics.mesh_code(critics, frame)
            return mesh._replace(shape=mesh.shape[:, : task.face.shape_size])

        @jax.jit
        def move(critics, frame, codes, driving):
            mesh = mesh_of(critics, frame)
            target = pose_control.turned(mesh, relative=True, **asked)
            if expression is not None:
                target = target._replace(expression=target.expression + expression)
            if driving is not None:
                target = pose_control.followed(target, *driving)
            return editor.drive(codes, mesh, target)

        self._move, self._mesh_of, self._critics = move, jax.jit(mesh_of), extra["critics"]
        self._driver, self._first, self._size, self._name = None, None, size, edit.driver
        if edit.driver:
            self._driver = video_files.read_frames(edit.driver)

    def __call__(self, frame, codes):
        return self._move(self._critics, frame[None], codes, self._driving())

    def _driving(self):
        """(face now, face at first) of the driver, or None without one."""
        from train import video_files

        if self._driver is None:
            return None
        frame = next(self._driver, None)
        if frame is None:
            raise ConfigError(f"config.edit.driver: {self._name} has fewer frames than the input")
        face = self._mesh_of(self._critics, _sized(video_files.to_unit(frame), self._size)[None])
        self._first = face if self._first is None else self._first
        return face, self._first


def _run_config(run: str):
    """A run's own config, from its config.json."""
    import json

    from ml_collections import ConfigDict

    path = Path(run) / "config.json"
    if not path.is_file():
        raise ConfigError(f"config.edit.control_from: {run} is no run directory (no config.json)")
    return ConfigDict(json.loads(path.read_text(encoding="utf-8")))


def _direction(edit, width: int):
    """The unit vector to edit along, orthogonal to the conditions; None without one."""
    from jaxmodels.video.latent_editing import check_direction, project_boundary

    if not edit.direction:
        for key in ("conditions", "absolute"):
            if edit[key]:
                raise ConfigError(
                    f"config.edit.{key}: it is of an edit along config.edit.direction"
                )
        return None

    def unit(file: str, key: str):
        try:
            return check_direction(_vector(file, key), width)
        except ValueError as error:
            raise ConfigError(f"config.edit.{key}: {file}: {error}") from None

    wanted = unit(edit.direction, "direction")
    others = [unit(file, "conditions")[None] for file in edit.conditions]
    try:
        return project_boundary(wanted[None], *others)[0]
    except ValueError as error:
        raise ConfigError(f"config.edit.conditions: {error}") from None


def _vector(file: str, key: str):
    """The array of an npy file, or the first one of an npz file."""
    import numpy as np

    from jaxmodels.interop.checkpoint import read_npz

    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"config.edit.{key}: no file {file!r}")
    if path.suffix == ".npz":
        arrays = read_npz(path)
        if not arrays:
            raise ConfigError(f"config.edit.{key}: {file} holds no array")
        return next(iter(arrays.values()))
    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ConfigError(f"config.edit.{key}: {file} is no npy file ({error})") from None


def _aligned(edit, source: str, size: int) -> Iterator[tuple[Any, Any, Any]]:
    """(crop float32 [S, S, 3], its quad or None, whole frame or None) of every frame."""
    import numpy as np

    from jaxmodels.video.face_alignment import (
        Quad,
        check_landmarks,
        crop_quad,
        ffhq_quads,
        smooth_quads,
    )
    from jaxmodels.video.video_encoder import check_frames
    from train import video_files
    from train.data.face_clips import read_landmarks

    quads = None
    if edit.landmarks:
        if not Path(edit.landmarks).is_file():
            raise FileNotFoundError(f"config.edit.landmarks: no file {edit.landmarks!r}")
        landmarks = read_landmarks(Path(edit.landmarks))
        # Of a video the number of frames is known at its end.
        folder = Path(source).is_dir()
        known = len(video_files.frame_files(source)) if folder else len(landmarks)
        check_landmarks(landmarks, known)
        quads = smooth_quads(ffhq_quads(landmarks), edit.center_sigma, edit.axes_sigma)
    t = -1
    for t, frame in enumerate(video_files.read_frames(source)):
        unit = video_files.to_unit(frame)
        if quads is None:
            check_frames(unit[None], size)
            crop, quad, whole = unit, None, None
        else:
            if t >= len(quads.center):
                check_landmarks(landmarks, t + 1)
            quad, whole = Quad(*(part[t] for part in quads)), unit
            crop = np.asarray(crop_quad(unit, quad, size))
        yield crop, quad, whole
    if quads is not None:
        check_landmarks(landmarks, t + 1)


def _tee(frames):
    """The crops as a stream; the present quad and whole frame in two boxes beside it."""
    quads, whole = [None], [None]

    def crops():
        for crop, quads[0], whole[0] in frames:
            yield crop

    return crops(), quads, whole


def _finished(image, quads, whole):
    import numpy as np

    from jaxmodels.video.face_alignment import paste_quad
    from train import video_files

    if quads[0] is not None:
        image = np.asarray(paste_quad(whole[0], image, quads[0]))
    return video_files.to_bytes(image)


def _pooled(frame, size: int):
    import jax.numpy as jnp

    from train.video_critics import pool

    return pool(jnp.asarray(frame)[None], size)[0]


def _sized(frame, size: int):
    from jaxmodels.video.video_encoder import check_frames

    check_frames(frame[None], size)
    return frame


if __name__ == "__main__":
    sys.exit(stop_with_one_line(main, sys.argv))
