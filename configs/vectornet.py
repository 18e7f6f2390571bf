"""VectorNet: forecasts on simulated roads; the published Argoverse recipe.

small     python -m train --config configs/vectornet.py --workdir runs/vectornet
          simulated traffic on bent roads: DE@3s 3.1 m (three seeds, 2.9 to 3.4; constant
          velocity 6.0), half a minute on two cores.
track     the same from the target's track alone, no map and no agents: 4.3 m
no_map    the same without the map: 3.5 m
complete  small with node completion (hidden polylines): 3.8 m; it needs longer runs
          (--config.steps=2400 --config.schedule.boundaries=960,1440,1920: 2.2 m, two minutes)
crossing  intersections: the map shows three routes
highway   a straight road of three lanes with lane changes: the driving track's forecaster, ten
          minutes of a core
raster    the ConvNet baseline (k3, crop along the trajectory) on rasters of 64 px
paper     python -m train --config configs/vectornet.py:paper --workdir DIR
              --config.data.options.path=/path/to/argoverse
          Argoverse 1 forecasting: Adam 1e-3, times 0.3 every 5 of 25 epochs; published validation
          DE@1s/2s/3s 0.92/2.06/3.67 m, ADE 1.66.
paper_raster  the ConvNet baseline by the same recipe, 400 px of 130 m; published DE@3s 4.49.
"""

from train.defaults import default_config

PRESETS = (
    *("small", "track", "no_map", "complete", "crossing", "highway", "raster"),
    *("paper", "paper_raster"),
)
# Argoverse 1 forecasting, version 1.1.
_TRAIN_SEQUENCES = 205_942


def get_config(preset: str = "small"):
    """The experiment `preset`."""
    if preset not in PRESETS:
        raise ValueError(f"configs/vectornet.py: no preset {preset!r}; known: {', '.join(PRESETS)}")
    config = default_config()
    config.task = "motion_forecasting"
    config.task_args = {
        "completion": True,
        "alpha": 1.0,
        "mask_rate": 0.15,
        "exactly_one": False,
        "space": "offset",
        "delta": 1.0,
    }
    config.optimizer.name = "adam"
    config.schedule.update(name="step", peak=1e-3, factor=0.3)
    config.model = "driving.vectornet:vectornet_base"
    config.model_args = {"horizon": 30}
    if preset.startswith("paper"):
        _paper(config, raster=preset == "paper_raster")
    else:
        _small(config, preset)
    return config


def _small(config, preset):
    config.data.name = "motion_scenes"
    config.data.options = {"max_polylines": 12, "max_vectors": 19, "heading_min_disp": 0.3}
    config.task_args.completion = preset == "complete"
    if preset == "track":
        config.data.options.update(use_map=False, use_agents=False)
    elif preset == "no_map":
        config.data.options.use_map = False
    elif preset == "crossing":
        config.data.name = "motion_scenes:crossing"
        config.data.options = {"max_polylines": 24}
    elif preset == "highway":
        config.data.name = "motion_scenes:highway"
        config.data.options = {"max_polylines": 16, "max_vectors": 19, "heading_min_disp": 0.3}
    elif preset == "raster":
        config.model = "driving.raster_convnet:raster_k3_traj"
        config.model_args = {"horizon": 30, "in_ch": 60}
        config.data.options = {
            "inputs": "raster",
            "raster_size": 64,
            "raster_metres": 100.0,
            "heading_min_disp": 0.3,
        }
    config.steps, config.batch_size = 600, 32
    if preset == "raster":
        # A pass costs a hundred of VectorNet's.
        config.steps, config.batch_size = 300, 16
    if preset == "highway":
        # Ends are 90 m ahead there, and constant velocity comes within 2.3 m of them: 600 steps
        # end at 1.75 of its error; 4000 at 0.97, and longer runs too, if there are 1500 scenes to
        # learn by heart.
        config.steps = 9000
        config.data.options.scenes = (8000, 300, 300)
    # Times 0.3 in stages after 40 % of the steps.
    config.schedule.boundaries = tuple(config.steps * k // 10 for k in (4, 6, 8))
    config.eval.batch_size = 100
    config.log_every = 100
    config.checkpoint.every = 300


def _paper(config, raster: bool):
    config.data.name = "motion_scenes:argoverse"
    # 128 polylines of 19 vectors, rasters of 400 px and 130 m: what the data's kind says (another
    # for Argoverse 2).
    config.data.options = {"path": "", "workers": 8}
    if raster:
        config.model = "driving.raster_convnet:raster_k3_traj"
        config.model_args = {"horizon": 30, "in_ch": 60}
        config.data.options.inputs = "raster"
    # Eight devices as published; the batch a device, 64, is ours.
    config.batch_size = 512
    epoch = _TRAIN_SEQUENCES // config.batch_size
    config.steps = 25 * epoch
    config.schedule.boundaries = tuple(5 * k * epoch for k in range(1, 5))
    config.eval.every = epoch
    config.log_every = 100
    config.checkpoint.update(every=epoch, best_metric="DE@3s", best_mode="min")
