"""Video2StyleGAN's third stage: editing pose and expression through 3-D coordinates.

regressor  python -m train --config configs/pose_control.py:regressor --workdir runs/mesh
           a small mesh regressor for clips that the toy generator makes from mesh codes, 600 steps;
           neither its error nor its time is recorded.
small      python -m train --config configs/pose_control.py --workdir runs/pose
           the control network on such clips; the yaw asked for is measured again (with
           --config.task_args.regressor_from=runs/mesh on the picture as well): correlation 0.998,
           mean error 0.7 degrees (five seeds), under one minute of CPU time.
paper      python -m train --config configs/pose_control.py:paper --workdir DIR
               --config.data.options.path=CLIPS --config.task_args.encoder_from=RUN_OF_STAGE_2
               --config.task_args.files.mesh=deca_model.tar ... as configs/video2stylegan.py
           our reconstruction of the published network, 18 codes of which 8 move.
"""

from configs.video2stylegan import TOY, TOY_GENERATOR
from train.defaults import default_config

PRESETS = ("small", "regressor", "paper")
REGRESSOR = {"stages": (1, 1, 1, 1), "width_divisor": 4, "hidden": 128}
NO_CRITICS = {"lpips": 0.0, "identity": 0.0, "landmarks": 0.0, "mesh": 0.0, "w_norm": 0.0}
EXPRESSION = 50


def get_config(preset: str = "small"):
    """The experiment `preset` (small, regressor or paper)."""
    if preset not in PRESETS:
        known = ", ".join(PRESETS)
        raise ValueError(f"configs/pose_control.py: no preset {preset!r}; known: {known}")
    config = default_config()
    config.optimizer.name = "adam"
    config.optimizer.decoupled = True
    config.schedule.update(name="cosine", peak=1e-3, end=0.0, warmup_steps=50)
    config.schedule.warmup_inside = False
    if preset == "paper":
        _paper(config)
        return config
    config.task_args.generator_args = dict(TOY_GENERATOR)
    config.task_args.generator_from = str(TOY / "weights.safetensors")
    config.data.name = "latent_walks:mesh"
    config.data.options = {"z_dim": 32, "w_dim": 32, "n_low": 5, "expression": EXPRESSION}
    config.log_every = 50
    config.eval.batch_size = 32
    if preset == "regressor":
        config.task = "mesh_regression"
        config.model = "video.mesh_regressor"
        config.model_args = dict(REGRESSOR)
        config.task_args.size = 32
        config.steps, config.batch_size = 600, 16
    else:
        config.task = "pose_control"
        config.model = "video.pose_control"
        config.model_args = {
            "n_low": 5,
            "w_dim": 32,
            "condition_size": 256,
            "num_layers": 3,
            "num_heads": 4,
        }
        config.task_args.weights = dict(NO_CRITICS)
        config.task_args.networks = {"mesh": dict(REGRESSOR)}
        config.task_args.sizes = {"mesh": 32}
        config.task_args.regressor_from = ""
        config.task_args.untrained_critics = False
        # At 32 pixels the codes alone teach as much as pictures, in a fifth of the time.
        config.task_args.parts = {"image": 0.0, "source_identity": 0.0}
        config.steps, config.batch_size = 600, 32
    config.eval.every = config.steps // 2
    config.checkpoint.every = config.steps // 2
    return config


def _paper(config):
    from configs import video2stylegan

    stage = video2stylegan.get_config("paper")
    config.task = "pose_control"
    config.model = "video.pose_control"
    config.model_args = {"n_low": 8, "w_dim": 512}
    config.task_args = stage.task_args
    config.task_args.encoder_args = {
        "hidden_size": 384,
        "num_layers": 12,
        "num_heads": 6,
        "stylegan_size": 1024,
        "scan_layers": True,
    }
    config.task_args.regressor_from = ""
    config.task_args.weights.w_norm = 0.0
    config.data = stage.data
    config.schedule.update(peak=1e-4, warmup_steps=5000)
    config.optimizer.weight_decay = 0.05
    config.optimizer.decay_mask = r"kernel$"
    config.steps, config.batch_size = 100_000, 16
    config.ema.decay = 0.999
    config.precision = "bfloat16"
    config.log_every = 100
    config.eval.every = 5000
    config.checkpoint.every = 5000
