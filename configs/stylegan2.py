"""StyleGAN2: a small generator of real faces; the published FFHQ recipe.

small   python -m train --config configs/stylegan2.py --workdir runs/stylegan2
        scikit-image's `lfw_subset` (80 gray faces of 25 pixels) at 32 pixels: sliced Wasserstein
        distance to the training images 0.195 (noise 0.240, held-out faces 0.143; one seed), 3.5
        CPU minutes. Pictures by seeds as the official `generate.py`:
        python -m train.predict --config configs/stylegan2.py --checkpoint runs/stylegan2
            --input seeds.txt --output drawn [--config.task_args.truncation=0.7]
paper   python -m train --config configs/stylegan2.py:paper --workdir DIR
            --config.data.options.path=FFHQ
        configuration F at 1024 pixels, batch 32, 25 million images, mixed regularization.
"""

from train.defaults import default_config

PRESETS = ("small", "paper")
SMALL_GENERATOR = {
    "z_dim": 32,
    "w_dim": 32,
    "img_resolution": 32,
    "mapping_layers": 4,
    "channel_base": 512,
    "channel_max": 32,
}


def get_config(preset: str = "small"):
    """The experiment `preset` (small or paper)."""
    if preset not in PRESETS:
        raise ValueError(f"configs/stylegan2.py: no preset {preset!r}; known: {', '.join(PRESETS)}")
    config = default_config()
    config.task = "stylegan2"
    config.model = "video.stylegan2"
    # The task has its own optimizers.
    config.schedule.update(name="constant", peak=0.0)
    config.task_args.update(gamma=10.0, r1_every=16, pl_weight=2.0, pl_every=4, style_mixing=0.9)
    if preset == "small":
        config.model_args = dict(SMALL_GENERATOR)
        sizes = {k: SMALL_GENERATOR[k] for k in ("img_resolution", "channel_base", "channel_max")}
        config.task_args.discriminator_args = sizes
        config.task_args.gamma = 1.0
        config.task_args.ema_images = 1000.0
        config.data.name = "face_stills"
        config.data.options = {"image_size": 32}
        config.steps, config.batch_size = 1500, 8
        config.log_every = 50
        config.eval.every = 500
        config.checkpoint.every = 500
        return config
    config.model_args = {"img_resolution": 1024}
    config.task_args.discriminator_args = {"img_resolution": 1024}
    config.data.name = "face_stills:ffhq"
    config.data.options = {"image_size": 1024, "workers": 16}
    config.steps, config.batch_size = 25_000_000 // 32, 32
    config.log_every = 50
    config.eval.every = 5000
    config.checkpoint.every = 5000
    return config
