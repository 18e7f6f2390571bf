"""Super-resolution of compressed images and videos (AIM 2022): Swin2SR, BasicVSR++, IVL.

small        python -m train --config configs/compressed_sr.py --workdir runs/compressed_sr
             six of scikit-image's photographs, x4 after JPEG quality 10; two others test:
             +0.14 dB over bicubic (three seeds), about two minutes of CPU time.
long         the same for 5000 steps of batch 16 with flips and rotations; not trained here.
jpeg         removal of JPEG artifacts (scale 1), quality drawn from 10, 20, 30, 40: +0.08 dB over
             the decoded picture (three seeds), under three minutes of CPU time.
stills       BasicVSR++, small, on single frames of clips rendered from the photographs and coded
             by libx265 at QP 37 (the extra `video`): ten minutes of CPU time; then
clips        --config.init_from=runs/stills: the same network on clips of three, +0.118 dB over
             bicubic (two seeds), seven minutes more.
video        the same network on clips from the start: +0.015 dB, 22 minutes.
ivl          the IVL entry on the same clips, 1500 steps: -0.371 dB against bicubic (one seed; its
             base alone has -0.384), six and a half minutes: so small and short it stays behind.
paper        Swin2SR on DIV2K and Flickr2K as published; --config.data.options.path=DIR with
             DIV2K_train_HR, Flickr2K_HR and DIV2K_valid_HR in it. None of the paper presets was
             trained here.
paper_jpeg, paper_jpeg_color
             artifact removal as published (window 7), gray and color.
paper_classical_x2, paper_classical_x4
             classical super-resolution (bicubic alone, no JPEG), from the start;
paper_classical_x4_from_x2
             --config.init_from=RUN_OR_FILE_OF_X2: the published shorter way, half the rate, half
             the milestones.
paper_lightweight
             the light network, x2, on DIV2K alone.
paper_video  BasicVSR++ on LDV (folders of frames); --config.data.options.path=DIR with
             train/HR, train/LR, valid/HR, valid/LR in it.

See docs/systems/compressed_sr.md for what these reach and how long they take.
"""

from train.defaults import default_config

PRESETS = (
    "small",
    "long",
    "jpeg",
    "stills",
    "video",
    "clips",
    "ivl",
    "paper",
    "paper_jpeg",
    "paper_jpeg_color",
    "paper_classical_x2",
    "paper_classical_x4",
    "paper_classical_x4_from_x2",
    "paper_lightweight",
    "paper_video",
)
# (0-based) KAIR's milestones, at which the rate is halved.
MILESTONES = (250_000, 400_000, 450_000, 475_000)


def get_config(preset: str = "small"):
    """The experiment `preset`."""
    if preset not in PRESETS:
        raise ValueError(
            f"configs/compressed_sr.py: no preset {preset!r}; known: {', '.join(PRESETS)}"
        )
    config = default_config()
    config.optimizer.name = "adam"
    config.checkpoint.best_metric = "psnr"
    if preset in ("small", "long", "jpeg"):
        _small_images(config, preset)
    elif preset in ("stills", "video", "clips", "ivl"):
        _small_videos(config, preset)
    elif preset == "paper_video":
        _paper_video(config)
    else:
        _paper_images(config, preset)
    return config


def _small_images(config, preset):
    config.task = "image_restoration"
    # L1, and L1 of the low-resolution picture that the aux head emits.
    config.task_args = {"aux_weight": 0.0, "aux_image_weight": 1.0, "hf_weight": 0.0}
    config.model = "restoration.swin2sr"
    config.model_args = {
        "upscale": 4,
        "upsampler": "pixelshuffle_aux",
        "img_size": 16,
        "window_size": 8,
        "embed_dim": 24,
        "depths": (2, 2),
        "num_heads": (2, 2),
        "mlp_ratio": 2.0,
    }
    config.data.name = "compressed_images:skimage"
    config.data.options = {"patch": 16, "augment": False}
    config.steps, config.batch_size = 500, 6
    config.schedule.update(name="cosine", peak=1e-3, warmup_steps=50, warmup_inside=False)
    config.log_every = 50
    config.eval.every = 250
    config.checkpoint.every = 250
    if preset == "long":
        config.steps, config.batch_size = 5000, 16
        config.data.options.augment = True
        config.log_every, config.eval.every, config.checkpoint.every = 100, 1000, 1000
    elif preset == "jpeg":
        config.model_args.update(upscale=1, upsampler="", img_size=32)
        config.data.options.update(scale=1, quality=(10, 20, 30, 40), patch=32, augment=True)


def _small_videos(config, preset):
    config.task = "video_restoration"
    config.data.name = "compressed_videos:skimage"
    config.schedule.update(name="cosine", end=1e-7, warmup_steps=0)
    config.optimizer.args = {"b1": 0.9, "b2": 0.99}
    config.log_every = 10
    if preset != "ivl":
        config.model = "restoration.basicvsrpp"
        config.model_args = {
            "mid_channels": 16,
            "num_blocks": 1,
            "spatial_blocks": 2,
            "hr_channels": 16,
            "spynet_channels": (8, 16, 8, 4),
            # The gradient of deformable sampling costs by group: 16 take four times the step.
            "deform_groups": 2,
            "he_init": True,
        }
        config.data.options = {"patch": 64, "frames": 3}
        config.steps, config.batch_size = 900, 1
        config.schedule.peak = 1e-3
        config.optimizer.groups = (("^spynet\\.", 0.25, 0),)
        if preset == "stills":
            # A frame alone has no flow and nothing to align: a sixth of the time a step.
            config.data.options.frames = 1
            config.steps = 2000
        elif preset == "clips":
            config.steps, config.schedule.peak = 300, 3e-4
    else:
        config.model = "restoration.ivl"
        config.data.options = {"patch": 32, "frames": 5}
        # From PyTorch's initial weights it learns a constant in as many steps.
        config.model_args = {"he_init": True}
        config.steps, config.batch_size = 1500, 2
        config.schedule.peak = 5e-4
    config.eval.every = config.checkpoint.every = config.steps // 2


def _paper_images(config, preset):
    config.task = "image_restoration"
    config.data.name = "compressed_images"
    config.data.options = {
        "hr": "DIV2K_train_HR,Flickr2K_HR",
        "patch": 48,
        "kept": 0,
        "crops": 1,
        "workers": 16,
    }
    config.model = "restoration.swin2sr:compressed_sr_x4_48"
    config.steps, config.batch_size = 500_000, 32
    config.task_args = {"tile": 256}
    config.schedule.update(name="step", peak=2e-4, boundaries=MILESTONES, factor=0.5)
    config.ema.decay = 0.999
    config.log_every = 200
    config.eval.every = config.checkpoint.every = 5000
    if preset.startswith("paper_jpeg"):
        gray = preset == "paper_jpeg"
        config.model = f"restoration.swin2sr:jpeg_{'gray' if gray else 'color'}"
        config.steps = 800_000
        # KAIR's for JPEG, halved as the run is.
        config.schedule.boundaries = (400_000, 600_000, 700_000, 750_000)
        config.data.options.update(patch=126, scale=1, quality=(10, 20, 30, 40), gray=gray, grid=1)
        config.task_args.tile = 252
    elif preset != "paper":
        _paper_classical(config, preset)


def _paper_classical(config, preset):
    """Super-resolution of pictures that nobody compressed: L1 alone, crops anywhere."""
    scale = 4 if "x4" in preset else 2
    config.model = f"restoration.swin2sr:classical_sr_x{scale}_64"
    config.data.options.update(scale=scale, patch=64, grid=1, quality=0, val_quality=0)
    config.task_args.update(aux_weight=0.0, aux_image_weight=0.0, hf_weight=0.0)
    if preset == "paper_classical_x4":
        config.steps = 400_000
    elif preset == "paper_classical_x4_from_x2":
        config.steps = 250_000
        config.schedule.peak = 1e-4
        config.schedule.boundaries = tuple(step // 2 for step in MILESTONES)
        # The second enlargement by two is new.
        config.init_skip = r"upsample\.2"
    elif preset == "paper_lightweight":
        config.model = "restoration.swin2sr:lightweight_x2_64"
        config.data.options.hr = "DIV2K_train_HR"
        config.batch_size = 64


def _paper_video(config):
    config.task = "video_restoration"
    config.task_args = {"frames_at_once": 30}
    config.model = "restoration.basicvsrpp:basicvsrpp_reds4"
    config.model_args = {"remat": True}
    config.data.name = "compressed_videos"
    config.data.options = {"patch": 64, "frames": 30, "workers": 16}
    config.steps, config.batch_size = 600_000, 8
    config.optimizer.args = {"b1": 0.9, "b2": 0.99}
    # The flow network learns at a quarter of the rate, after 5000 steps at rest.
    config.optimizer.groups = (("^spynet\\.", 0.25, 5000),)
    config.schedule.update(name="cosine", peak=1e-4, end=1e-7)
    config.log_every = 100
    config.eval.every = config.checkpoint.every = 5000
