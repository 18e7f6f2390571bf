"""pSp and e4e: the published encoders of single images, trained over a frozen StyleGAN2 generator.

small   python -m train --config configs/e4e.py --workdir runs/e4e
        images that the generator of `tests/golden/video2stylegan/stylegan2_g_ada_s32` makes from
        codes with noise on the low layers, 32 pixels: squared error of unseen codes 0.31
        of the mean latent's (one seed), 80 CPU seconds.
psp     the same images by pSp: all codes free, no discriminator: 0.29.
paper   python -m train --config configs/e4e.py:paper --workdir DIR
            --config.data.options.path=FFHQ
            --config.task_args.generator_from=stylegan2-ffhq-config-f.pt
            --config.task_args.encoder_from=model_ir_se50.pth
            --config.task_args.files.lpips=alexnet.pth+lpips_alex.pth
            --config.task_args.files.identity=model_ir_se50.pth
        e4e's published recipe on FFHQ: 200k steps of 8 images.
paper_psp   pSp's: 500k steps of 8 images.
"""

from configs import video2stylegan
from train.defaults import default_config

PRESETS = ("small", "psp", "paper", "paper_psp")


def get_config(preset: str = "small"):
    """The experiment `preset` (small, psp, paper or paper_psp)."""
    if preset not in PRESETS:
        raise ValueError(f"configs/e4e.py: no preset {preset!r}; known: {', '.join(PRESETS)}")
    small = preset in ("small", "psp")
    config = video2stylegan.get_config("small" if small else "stills")
    config.task = "e4e"
    config.optimizer = default_config().optimizer
    config.optimizer.name = "ranger"
    config.schedule.update(name="constant", warmup_steps=0)
    config.ema.decay = 0.0
    config.precision = "float32"
    config.task_args.weights.w_norm = 0.0
    config.task_args.update(
        adversarial=0.1,
        discriminator_rate=2e-5,
        gamma=10.0,
        r1_every=16,
        pool_size=50,
        delta_norm=2e-4,
        delta_start=20_000,
        delta_every=2000,
    )
    if small:
        config.model_args = {
            "image_size": 32,
            "stylegan_size": 32,
            "w_dim": 32,
            "n_low": 5,
            "ir_layers": 18,
            "width_divisor": 16,
            "se_reduction": 4,
        }
        # Images whose codes differ from layer to layer: a single code cannot reproduce them.
        config.data.options.both = True
        config.schedule.peak = 2e-3
        config.task_args.update(discriminator_rate=5e-4, delta_start=200, delta_every=40)
        config.steps, config.checkpoint.every, config.eval.every = 800, 400, 400
    else:
        config.model_args = {"stylegan_size": 1024}
        config.schedule.peak = 1e-4
        config.steps, config.batch_size = 200_000, 8
    config.model = "video.video_encoder:video_e4e"
    if preset.endswith("psp"):
        config.model = "video.video_encoder:video_psp"
        config.task_args.adversarial = 0.0
        if not small:
            config.steps = 500_000
    return config
