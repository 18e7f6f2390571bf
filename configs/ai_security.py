"""The networks of the AI security competition's tracks; `train.competition` attacks and scores.

All as `python -m train --config configs/ai_security.py:PRESET --workdir DIR`. Times are CPU
seconds; numbers are of one run at seed 0 where no more are named.

small       Which tool forged it: nine procedures on photographs, five of them known; NMI of novel
            tools beside k-means on supervised features. Five seeds: known tools .92 to .96, novel
            ones .11 to .35 (k-means .05 to .14); nine minutes of a slow core.
detection   real or fake, Xception, fixed residual filters beside the pixels: AUC of frames .958, of
            videos .998, ten minutes of a core; detection_b0 with an EfficientNet-B0. Pixels alone
            (--config.task_args.frequency=False) reach .64 in 600 steps.
face        ArcFace on letters; verification .974 (five seeds, 300 steps; now 400), 100 s
face_softmax  its baseline, plain softmax; .993 (the same)
face_resnet   a plain ResNet; .996 after 300 steps (now 500)
face_vgg      a VGG; not measured with this recipe
driving     the detector of the driving track; recall of vehicles 1.0, 110 s
paper       --config.data.options.path=DIR
            Attribution by ResNet-50 at 256 pixels on cropped faces below
            DIR/<group>/<method>/<dataset>/*.png: protocol 1, eight known of twenty classes. It
            starts officially from ImageNet's ResNet-50: --config.init_from=FILE
            --config.init_skip="(bottleneck|bnneck.|fc2)".
paper_face  IResNet-50 with ArcFace on DIR/train/<identity>/*.jpg, DIR/test/<identity>/*.jpg.
paper_detection  Xception on the same folders as `paper`, a method named `real` among them.
"""

from train.defaults import default_config

PRESETS = (
    *("small", "detection", "detection_b0", "face", "face_softmax", "face_resnet", "face_vgg"),
    "driving",
    *("paper", "paper_face", "paper_detection"),
)


def get_config(preset: str = "small"):
    """The experiment `preset`."""
    if preset not in PRESETS:
        known = ", ".join(PRESETS)
        raise ValueError(f"configs/ai_security.py: no preset {preset!r}; known: {known}")
    config = default_config()
    config.optimizer.name = "adam"
    config.log_every = 50
    _SETTINGS[preset](config)
    return config


def _attribution(config):
    config.task = "attribution"
    config.model = "security.attribution"
    config.model_args = {
        "classes": 9,
        "layers": (1, 1, 1, 1),
        "width": 12,
        "block": "basic",
        "stem": "cifar",
    }
    # A third of this is too short: known tools .853, novel NMI .031 above k-means.
    config.task_args = {"known": 5, "supervised_steps": 600, "rounds": (1200, 1500)}
    config.data.name = "forgeries:attribution"
    config.data.options = {"image_size": 32, "test_examples": 540}
    config.steps, config.batch_size = 1800, 32
    config.optimizer.weight_decay = 1e-5
    config.optimizer.decay_mask = "all"
    config.optimizer.freeze = r"^(bottleneck|bnneck\d)\.bias$"
    config.schedule.update(name="cosine", peak=2e-3, end=1e-4, warmup_steps=40)
    config.eval.batch_size = 108
    config.checkpoint.every = 600


def _detection(config):
    config.task = "forgery_detection"
    config.model = "vision.xception"
    config.model_args = {"channels": (16, 24, 32, 48, 64, 80, 96, 128), "n_middle": 1}
    # On small pictures of few tools what tells lies in the noise, which pixels alone show late.
    config.task_args = {"frequency": True}
    config.data.name = "forgeries:detection"
    config.data.options = {"image_size": 64, "test_examples": 480}
    config.steps, config.batch_size = 3000, 32
    config.optimizer.weight_decay = 5e-4
    config.schedule.update(name="cosine", peak=2e-3, end=2e-5, warmup_steps=30)
    config.eval.batch_size = 120
    config.checkpoint.every = 500


def _detection_b0(config):
    _detection(config)
    config.model = "vision.efficientnet:efficientnet_b0"
    config.model_args = {"channel_multiplier": 0.25, "num_classes": 2, "dropout": 0.1}


def _face(config):
    config.task = "face_recognition"
    config.model = "vision.iresnet"
    config.model_args = {
        "layers": (1, 1, 1, 1),
        "width": 12,
        "num_features": 64,
        "input": (48, 48),
    }
    config.task_args = {"classes": 0, "margin": "arcface", "scale": 32.0}
    config.data.name = "identities:glyphs"
    config.data.options = {"image_size": 48}
    config.steps, config.batch_size = 400, 64
    config.optimizer.weight_decay = 5e-4
    config.optimizer.freeze = r"^features\.scale$"
    config.schedule.update(name="cosine", peak=3e-3, end=3e-5, warmup_steps=40)
    config.eval.batch_size = 104
    config.checkpoint.every = 200


def _face_softmax(config):
    _face(config)
    config.task_args.margin = "softmax"


def _face_resnet(config):
    _face(config)
    config.model = "vision.resnet"
    config.model_args = {"layers": (1, 1, 1, 1), "width": 12, "num_classes": 64, "leaky": 0.0}
    # ArcFace's logits take these networks longer: .927 after 150 steps of 600, .996 after 300.
    config.steps, config.schedule.warmup_steps = 500, 50


def _face_vgg(config):
    _face(config)
    config.model = "vision.vgg"
    config.model_args = {"cfg": (24, "M", 48, "M", 64, "M", 96, "M"), "num_classes": 64}
    config.steps, config.schedule.warmup_steps = 600, 60


def _driving(config):
    config.task = "vehicle_detection"
    config.model = "security.vehicle_detector"
    config.model_args = {"width": 12}
    config.data.name = "drive_up"
    config.steps, config.batch_size = 500, 32
    config.schedule.update(name="cosine", peak=3e-3, end=3e-5, warmup_steps=30)
    config.eval.batch_size = 64
    config.checkpoint.every = 250


def _paper(config):
    config.task = "attribution"
    config.model = "security.attribution"
    config.model_args = {"classes": 20}
    # Protocol 1's methods, the data's default.
    config.task_args = {"known": 8, "supervised_steps": 3910, "rounds": (19550, 23460)}
    config.data.name = "forgeries:attribution"
    config.data.options = {
        "set": "folders",
        "image_size": 256,
        "resized_crop": 0.2,
        "light": 0.2,
        "workers": 16,
    }
    # 50 epochs of some 100,000 faces, 64 labeled and 64 unlabeled images a step.
    epoch = 782
    config.steps, config.batch_size, config.seed = 50 * epoch, 64, 2000
    config.optimizer.weight_decay = 1e-5
    config.optimizer.decay_mask = "all"
    config.optimizer.freeze = r"^(bottleneck|bnneck\d)\.bias$"
    boundaries = tuple(10 * k * epoch for k in range(1, 5))
    config.schedule.update(name="step", peak=2e-4, boundaries=boundaries, factor=0.2)
    config.eval.every = epoch
    config.checkpoint.update(every=epoch, best_metric="all_nmi")


def _paper_face(config):
    _face(config)
    config.model = "vision.iresnet:iresnet50"
    config.model_args = {"num_features": 512}
    config.task_args = {"classes": 93431, "margin": "arcface", "scale": 64.0}
    config.data.name = "identities:folders"
    config.data.options = {"image_size": 112, "workers": 16}
    # MS1MV3: 5,179,510 images of 93,431 identities, 8 x 128 a step, 20 epochs.
    epoch = 5179510 // 1024
    config.steps, config.batch_size = 20 * epoch, 1024
    config.optimizer.name = "sgd"
    config.optimizer.args = {"momentum": 0.9}
    # What is trained of the backbone alone, not the class centers.
    config.optimizer.clip_norm = 5.0
    config.optimizer.clip_groups = (r"!^(margin_head\.|features\.scale$)",)
    config.optimizer.weight_decay = 5e-4
    config.optimizer.decay_mask = "all"
    config.schedule.update(name="polynomial", peak=0.1, end=0.0, power=2.0, warmup_steps=0)
    config.precision = "bfloat16"
    config.eval.every = config.checkpoint.every = epoch


def _paper_detection(config):
    _detection(config)
    config.model_args = {}
    config.data.options = {
        "set": "folders",
        "image_size": 256,
        "workers": 16,
        "blur": 0.5,
        "blur_sigma": (0.8, 1.4),  # OpenCV's of kernels 3 to 7
        "brightness": 0.1,
        "jpeg": 0.5,
        "jpeg_quality": (40, 100),
    }
    config.task_args.frequency = False
    config.steps, config.batch_size = 36000, 32  # 10 epochs of 720 videos, 32 frames each, + fakes
    config.schedule.update(name="constant", peak=2e-4, warmup_steps=0)
    config.optimizer.decay_mask = "all"
    config.eval.every = config.checkpoint.every = 3600


_SETTINGS = {
    "small": _attribution,
    "detection": _detection,
    "detection_b0": _detection_b0,
    "face": _face,
    "face_softmax": _face_softmax,
    "face_resnet": _face_resnet,
    "face_vgg": _face_vgg,
    "driving": _driving,
    "paper": _paper,
    "paper_face": _paper_face,
    "paper_detection": _paper_detection,
}
