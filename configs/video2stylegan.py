"""Video2StyleGAN: a video encoder over a frozen StyleGAN2 generator.

small   python -m train --config configs/video2stylegan.py --workdir runs/video2stylegan
        clips that the generator of `tests/golden/video2stylegan/stylegan2_g_ada_s32` makes from
        walks of its low codes, 32 pixels: squared error of unseen frames relative to the mean
        latent's (see the docs page for the measured value), some 2 minutes on two cores.
faces   python -m train --config configs/video2stylegan.py:faces --workdir DIR
            --config.task_args.generator_from=RUN_OF_configs/stylegan2.py
        a photographed face under made-up motion, with a generator trained on lfw_subset.
stills  python -m train --config configs/video2stylegan.py:stills --workdir DIR ...
        the first stage: FFHQ's images, the key path alone, by the recipe of pSp and e4e.
paper   python -m train --config configs/video2stylegan.py:paper --workdir DIR
            --config.data.options.path=CLIPS --config.init_from=RUN_OF_STAGE_1
            --config.task_args.generator_from=stylegan2-ffhq-config-f.pt
            --config.task_args.files.lpips=alexnet.pth+lpips_alex.pth
            --config.task_args.files.identity=model_ir_se50.pth
            --config.task_args.files.landmarks=FAN.pth --config.task_args.files.mesh=deca_model.tar
            --config.task_args.face_model_from=flame.npz
        the second stage: pairs of aligned clips, 300k steps of 16 pairs. The recipe is our
        reconstruction (the paper's could not be read).
"""

from pathlib import Path

from ml_collections import ConfigDict

from train.defaults import default_config

PRESETS = ("small", "faces", "stills", "paper")
TOY = Path(__file__).resolve().parents[1] / "tests/golden/video2stylegan/stylegan2_g_ada_s32"
TOY_GENERATOR = {
    "z_dim": 32,
    "w_dim": 32,
    "img_resolution": 32,
    "mapping_layers": 4,
    "channel_base": 1024,
    "channel_max": 40,
}
TERMS = ("lpips", "identity", "landmarks", "mesh")
TOY_ENCODER = {
    "image_size": 32,
    "patch_size": 4,
    "hidden_size": 96,
    "num_layers": 3,
    "num_heads": 4,
    "stylegan_size": 32,
    "w_dim": 32,
    "n_low": 5,
}


def get_config(preset: str = "small"):
    """The experiment `preset` (small, faces, stills or paper)."""
    if preset not in PRESETS:
        known = ", ".join(PRESETS)
        raise ValueError(f"configs/video2stylegan.py: no preset {preset!r}; known: {known}")
    config = default_config()
    config.task = "video_inversion"
    config.model = "video.video_encoder"
    config.optimizer.name = "adam"
    config.optimizer.decoupled = True
    config.optimizer.decay_mask = "matrices"
    config.schedule.name = "cosine"
    # What train.edit_video does to a clip.
    config.edit = ConfigDict(
        {
            "direction": "",  # an npy or npz file with a vector [w_dim]
            "alpha": 0.0,
            "absolute": False,  # alpha is the distance from the boundary, not a step
            "conditions": (),  # directions that the edit leaves alone
            "layers": (),  # (first, one past the last); empty: all
            "style": "",  # an image or clip whose high codes replace the clip's
            "yaw": 0.0,  # degrees, added to the face's own; needs control_from
            "pitch": 0.0,
            "roll": 0.0,
            "expression": "",  # an npy file [E] added to the face's own; needs control_from
            "driver": "",  # an aligned clip whose face the clip's follows; needs control_from
            "control_from": "",  # a run directory of configs/pose_control.py
            "refresh": "first",  # first | every | mean
            "every": 0,
            "landmarks": "",  # npz with landmarks [T, 68, 2]: align, and paste back
            "center_sigma": 1.0,  # frames, of the smoothing of aligned crops
            "axes_sigma": 3.0,
            "strip": "",  # a PNG of frames: input, encoded, edited, change
            "fps": 0.0,  # of a video that is written; 0: the input's (25 for folders)
        }
    )
    if preset in ("small", "faces"):
        _small(config, preset)
    else:
        _paper(config, preset)
    return config


def _small(config, preset):
    config.model_args = dict(TOY_ENCODER)
    config.task_args.generator_args = dict(TOY_GENERATOR)
    config.task_args.generator_from = str(TOY / "weights.safetensors")
    config.task_args.weights = {
        "lpips": 0.0,
        "identity": 0.0,
        "landmarks": 0.0,
        "mesh": 0.0,
        "w_norm": 0.0,
    }
    config.task_args.networks = {name: {} for name in TERMS}
    config.task_args.files = {name: "" for name in TERMS}
    config.task_args.sizes = {"landmarks": 256, "mesh": 224}
    config.data.name = "latent_walks"
    config.data.options = {"z_dim": 32, "w_dim": 32, "n_low": 5, "std": 0.35}
    config.optimizer.weight_decay = 0.01
    config.optimizer.args.b2 = 0.999
    config.schedule.update(peak=6e-4, end=0.0, warmup_steps=50, warmup_inside=False)
    config.steps, config.batch_size = 700, 8
    config.log_every = 50
    config.eval.every = 350
    config.eval.batch_size = 32
    config.checkpoint.every = 350
    if preset == "faces":
        from configs.stylegan2 import SMALL_GENERATOR

        config.task_args.generator_args = dict(SMALL_GENERATOR)
        config.task_args.generator_from = "runs/stylegan2"
        config.model_args.w_dim = SMALL_GENERATOR["w_dim"]
        config.data.name = "face_clips:astronaut"
        config.data.options = {}
        config.eval.batch_size = 8


def _paper(config, preset):
    config.model = "video.video_encoder:video2stylegan_small"
    config.model_args = {"stylegan_size": 1024, "scan_layers": True}
    config.task_args.generator_args = {"img_resolution": 1024}
    config.task_args.generator_from = ""
    config.task_args.weights = {
        "l2": 1.0,
        "lpips": 0.8,
        "identity": 0.1,
        "landmarks": 1.0,
        "mesh": 1.0,
        "w_norm": 0.005,
    }
    config.task_args.networks = {
        "lpips": {"net": "alex"},
        "identity": {},
        "landmarks": {"num_modules": 4},
        "mesh": {},
    }
    config.task_args.files = {"lpips": "", "identity": "", "landmarks": "", "mesh": ""}
    config.task_args.sizes = {"landmarks": 256, "mesh": 224}
    config.task_args.face_model_from = ""
    config.task_args.encoder_from = ""
    config.task_args.untrained_critics = False
    config.optimizer.weight_decay = 0.05
    # Weights of linear maps: no norms, biases, positions or queries.
    config.optimizer.decay_mask = r"kernel$"
    config.schedule.update(peak=1e-4, end=0.0, warmup_steps=5000, warmup_inside=False)
    config.steps, config.batch_size = 300_000, 16
    config.ema.decay = 0.999
    config.precision = "bfloat16"
    config.data.name = "face_clips"
    config.data.options = {"kind": "folder", "image_size": 256, "workers": 8}
    config.log_every = 100
    config.eval.every = 5000
    config.checkpoint.every = 5000
    if preset == "stills":
        config.data.name = "face_stills:ffhq"
        config.data.options = {"image_size": 256, "workers": 8}
        config.task_args.weights.landmarks = 0.0
        config.task_args.weights.mesh = 0.0
        # The recipe of pSp and e4e.
        config.optimizer = default_config().optimizer
        config.optimizer.name = "ranger"
        config.schedule.update(name="constant", warmup_steps=0)
        config.batch_size = 8
