"""LiDAR first, camera later: the patch classifier and the full-frame detector it is compared with.

small     python -m train --config configs/lidar_camera.py --workdir runs/patches
          patches of LiDAR clusters in simulated street scenes, tiny ResNet, 600 steps: accuracy
          0.92 on test patches. Baselines: majority class 0.35, nearest mean color 0.21. Making the
          300 frames takes about 2 minutes of two idle cores.
detector  python -m train --config configs/lidar_camera.py:detector --workdir runs/detector
          YOLOv3-style detector on the same backbone, whole images of the same scenes.
paper     python -m train --config configs/lidar_camera.py:paper --workdir DIR
              --config.data.options.path=/path/to/waymo
          ResNet-18 on patches of Waymo Open Dataset frames (perception, version 1 or 2).
paper_detector  the same for the full-frame detector.

The paper (arXiv 2111.09799) does not say what it trained; `paper` is the specification's recipe.
"""

from train.defaults import default_config

PRESETS = ("small", "detector", "paper", "paper_detector")


def get_config(preset: str = "small"):
    """The experiment `preset`."""
    if preset not in PRESETS:
        known = ", ".join(PRESETS)
        raise ValueError(f"configs/lidar_camera.py: no preset {preset!r}; known: {known}")
    config = default_config()
    config.optimizer.name = "sgd"
    config.optimizer.args.momentum = 0.9
    config.optimizer.weight_decay = 5e-4
    config.schedule.name = "cosine"
    config.data.options = {"path": None}
    if preset.endswith("detector"):
        _detector(config)
    else:
        _patches(config)
    if preset.startswith("paper"):
        _paper(config, preset)
    config.schedule.warmup_steps = config.steps // 20
    return config


def _patches(config):
    config.task = "patch_classification"
    config.task_args = {
        "label_smoothing": 0.1,
        "sizes": (32, 64),
        "box_weight": 1.0,
        "pipeline": {"buckets": (32, 64)},
        "detector": "",
        "detector_model": "driving.frame_detector:detector_tiny",
        "detector_size": 320,
    }
    config.model = "driving.patch_classifier:patch_tiny"
    config.model_args = {"box_head": True}
    config.data.name = "driving_patches"
    config.data.options.image_size = 64
    config.steps, config.batch_size = 600, 64
    config.schedule.peak = 0.05
    config.log_every, config.eval.every, config.checkpoint.every = 50, 200, 100


def _detector(config):
    config.task = "frame_detection"
    config.model = "driving.frame_detector:detector_tiny"
    config.model_args = {}
    config.data.name = "driving_detection"
    config.data.options.image_size = 320
    config.steps, config.batch_size = 600, 8
    config.optimizer.clip_norm = 10.0
    config.schedule.peak = 0.005
    config.log_every, config.eval.every, config.checkpoint.every = 50, 300, 50


def _paper(config, preset):
    # 798 segments of 200 frames, every fifth; some ten patches a frame (recalled, not counted).
    frames = 798 * 200
    config.precision = "bfloat16"
    config.log_every = 100
    config.data.options.workers = 16
    if preset == "paper_detector":
        config.model = "driving.frame_detector:detector_resnet18"
        config.data.name = "driving_detection:waymo"
        config.data.options.image_size = 416
        config.batch_size, config.schedule.peak = 64, 0.01
        config.steps = 30 * frames // config.batch_size
    else:
        config.model = "driving.patch_classifier:patch_resnet18"
        config.data.name = "driving_patches:waymo"
        config.data.options.image_size = 256
        config.task_args.sizes = (32, 64, 128, 256)
        config.task_args.pipeline = {}
        config.batch_size, config.schedule.peak = 256, 0.1
        config.steps = 30 * (frames // 5 * 10) // config.batch_size
    config.eval.every = config.checkpoint.every = config.steps // 30
